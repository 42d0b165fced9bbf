// Tree attention over paged KV: a work item is (sequence, KV head, 16 queries), where the queries are all rows of the tree times the
// heads of the group. One vector holds the same thing for 16 queries: nothing is summed across a vector, and keys need no
// transposition. In bfloat16 the two products run on AMX tiles or AVX-512 BF16 vectors (probabilities are rounded to bfloat16, as flash
// attention does).
#pragma once

#include "common.h"

namespace specfx {

constexpr int64_t kBlock = 64;  // keys that are widened to float at a time
constexpr int64_t kTile = 8;    // keys (or value columns) that share each load of a query (or weight) vector

// Everything that one work item needs, reused from item to item by one thread.
template <typename T>
class Attention {
 public:
  struct Item {
    int64_t sequence, group, first, last;  // queries first..last of (row, head of the group) pairs
  };

  Attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Batch& batch, Tensor& out, float scale, int64_t window,
            float softcap, const float* sinks, int64_t skip)
      : b(batch), Q(q.const_data_ptr<T>()), K(k_pages.const_data_ptr<T>()), V(v_pages.const_data_ptr<T>()), O(out.mutable_data_ptr<T>()),
        heads(q.size(1)), dk(q.size(2)), dv(v_pages.size(3)), page(k_pages.size(1)), groups(k_pages.size(2)), share(heads / groups),
        slot_k(groups * dk), slot_v(groups * dv), window(window), scale(scale), softcap(softcap), sinks(sinks),
        skip(skip) {
#ifdef SPECFX_DOT
    dots = std::is_same_v<T, at::BFloat16> && dk % 2 == 0 && dv % 16 == 0;
#endif
#ifdef SPECFX_AMX
    tiles = dots && dk % 32 == 0 && page % 16 == 0 && has_tiles();
#endif
  }

  std::vector<Item> items() const {
    std::vector<Item> all;
    for (int64_t s = 0; s < b.sequences; ++s) {
      const int64_t queries = (b.starts[s + 1] - b.starts[s]) * share;
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t i = 0; i < queries; i += kLanes) all.push_back({s, g, i, std::min(i + kLanes, queries)});
    }
    return all;
  }

  void run(const Item& next) {
    begin(next);
#ifdef SPECFX_AMX
    if (tiles) {
      configure_tiles({16, 16, 16, 16, 16, 16, 16, 16});
      scores_on_tiles();
      softmax();
      values_on_tiles();
      _tile_release();
      return;
    }
#endif
#ifdef SPECFX_DOT
    if (dots) {
      scores_on_dots();
      softmax();
      values_on_dots();
      return;
    }
#endif
    scores_on_vectors();
    softmax();
    values_on_vectors();
  }

 private:
  void begin(const Item& next) {
    item = next;
    row0 = b.starts[item.sequence];
    rows = b.starts[item.sequence + 1] - row0;
    length = b.lengths[item.sequence];
    table = b.table + item.sequence * b.pages_a_sequence;
    causal = b.causal(rows);
    count = item.last - item.first;
    keys = length + (causal ? (item.last - 1) / share + 1 : rows);
    // With a window no query of this item sees a key before `from` (in a tree, depths start at 0).
    const int64_t first_row = causal ? item.first / share : 0;
    from = window > 0 ? std::max<int64_t>(0, length + first_row - window + 1) / 16 * 16 : 0;
    for (int64_t i = 0; i < kLanes; ++i) {  // idle lanes repeat the first query
      const int64_t query = item.first + (i < count ? i : 0);
      row_of[i] = query / share;
      head_of[i] = item.group * share + query % share;
      standing[i] = length + b.depth(row0 + row_of[i], row_of[i], rows);
    }
    lines.resize((keys - from + 32) * kLanes);
    find_slots();
    if (item.group == 0 && item.first == 0) {
      to_fetch = item.sequence + 1 < b.sequences ? b.lengths[item.sequence + 1] : 0;
      fetched = window > 0 ? std::max<int64_t>(0, to_fetch - window) : 0;
    }
  }

  // Where the tokens from `from` on lie in the pools.
  void find_slots() {
    slots.resize(keys - from);
    for (int64_t j = from; j < keys;) {
      const int64_t within = j % page, n = std::min(page - within, keys - j), first = table[j / page] * page + within;
      for (int64_t i = 0; i < n; ++i) slots[j - from + i] = first + i;
      j += n;
    }
  }

  const T* key(int64_t position) const { return K + slots[position - from] * slot_k + item.group * dk; }
  const T* value(int64_t position) const { return V + slots[position - from] * slot_v + item.group * dv; }
  const T* query(int64_t lane) const { return Q + ((row0 + row_of[lane]) * heads + head_of[lane]) * dk; }
  T* result(int64_t lane) const { return O + ((row0 + row_of[lane]) * heads + head_of[lane]) * dv; }
  float* line(int64_t position) { return &lines[(position - from) * kLanes]; }  // 16 queries' scores of one key

  // While `passed` keys of this sequence are computed, a like part of the next sequence's comes from memory into the second cache.
  void fetch(int64_t passed) {
    const int32_t* pages = b.table + (item.sequence + 1) * b.pages_a_sequence;
    for (const int64_t end = std::min(fetched + passed / groups + 1, to_fetch); fetched < end; ++fetched) {
      const int64_t slot = static_cast<int64_t>(pages[fetched / page]) * page + fetched % page;
      fetch_line_by_line(K + slot * slot_k, slot_k);
      fetch_line_by_line(V + slot * slot_v, slot_v);
    }
  }

  static void fetch_line_by_line(const T* x, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(x + i, 0, 2);
  }

  void scores_on_vectors() {
    wide.resize(dk * kLanes);
    block.resize((kBlock + kTile) * dk);
    for (int64_t i = 0; i < kLanes; ++i)
      for (int64_t d = 0; d < dk; ++d) wide[d * kLanes + i] = to_float(query(i)[d]);
    for (int64_t j0 = from; j0 < keys; j0 += kBlock) {
      const int64_t n = std::min(kBlock, keys - j0);
      fetch(kBlock);
      for (int64_t j = 0; j < n; ++j) {
        const T* src = key(j0 + j);
        for (int64_t d = 0; d < dk; ++d) block[j * dk + d] = to_float(src[d]);
      }
      for (int64_t j = 0; j < n; j += kTile) {
        Vec sum[kTile] = {};
        for (int64_t d = 0; d < dk; ++d) {
          const Vec q = load(&wide[d * kLanes]);
          for (int64_t t = 0; t < kTile; ++t) sum[t] += block[(j + t) * dk + d] * q;
        }
        for (int64_t t = 0; t < std::min(kTile, n - j); ++t) store(line(j0 + j + t), sum[t]);
      }
    }
  }

  // Scores to weights, in place; `total` keeps their sums.
  void softmax() {
    for (int64_t j = from; j < keys; ++j) store(line(j), load(line(j)) * scale);
    if (softcap > 0)
      for (int64_t j = 0; j < (keys - from) * kLanes; ++j) lines[j] = softcap * std::tanh(lines[j] / softcap);
    if (window > 0)
      for (int64_t i = 0; i < kLanes; ++i)
        for (int64_t j = from; j < std::min(length, standing[i] - window + 1); ++j) line(j)[i] = kHidden;
    for (int64_t i = 0; i < kLanes; ++i)
      if (standing[i] >= skip)
        for (int64_t j = from; j < std::min(length, skip); ++j) line(j)[i] = kHidden;
    for (int64_t r = std::max<int64_t>(0, from - length); r < keys - length; ++r) {
      const int64_t stands = length + b.depth(row0 + r, r, rows);
      for (int64_t i = 0; i < kLanes; ++i) {
        const bool ancestor = causal ? r <= row_of[i] : (b.mask[row0 + row_of[i]] >> r) & 1;
        const bool skipped = stands < skip && standing[i] >= skip;
        if (!ancestor || skipped || (window > 0 && stands <= standing[i] - window)) line(length + r)[i] = kHidden;
      }
    }
    Vec top = Vec{} + kHidden;
    if (sinks)
      for (int64_t i = 0; i < kLanes; ++i) top[i] = sinks[head_of[i]];
    for (int64_t j = from; j < keys; ++j) {
      const Vec x = load(line(j));
      top = x > top ? x : top;
    }
    Vec sum = Vec{};
    for (int64_t j = from; j < keys; ++j) {
      const Vec p = exp_nonpositive(load(line(j)) - top);
      store(line(j), p);
      sum += p;
    }
    total = sum;
    if (sinks)
      for (int64_t i = 0; i < kLanes; ++i) total[i] += std::exp(sinks[head_of[i]] - top[i]);
  }

  void values_on_vectors() {
    wide.assign(dv * kLanes, 0.f);
    block.resize((kBlock + kTile) * dv);
    for (int64_t j0 = from; j0 < keys; j0 += kBlock) {
      const int64_t n = std::min(kBlock, keys - j0);
      for (int64_t j = 0; j < n; ++j) {
        const T* src = value(j0 + j);
        for (int64_t d = 0; d < dv; ++d) block[j * dv + d] = to_float(src[d]);
      }
      for (int64_t d = 0; d < dv; d += kTile) {
        Vec sum[kTile];
        const int64_t width = std::min(kTile, dv - d);
        for (int64_t t = 0; t < kTile; ++t) sum[t] = t < width ? load(&wide[(d + t) * kLanes]) : Vec{};
        for (int64_t j = 0; j < n; ++j) {
          const Vec p = load(line(j0 + j));
          for (int64_t t = 0; t < kTile; ++t) sum[t] += block[j * dv + d + t] * p;
        }
        for (int64_t t = 0; t < width; ++t) store(&wide[(d + t) * kLanes], sum[t]);
      }
    }
    normalize();
  }

  // `wide`, the sums of the weighted values, are those of weights that sum to `total`.
  void normalize() {
    for (int64_t i = 0; i < count; ++i) {
      const float inverse = 1.f / total[i];
      for (int64_t d = 0; d < dv; ++d) result(i)[d] = static_cast<T>(wide[d * kLanes + i] * inverse);
    }
  }

#ifdef SPECFX_DOT
  // Pairs of numbers of each query, transposed: 16 queries' first pair, their second, ...
  void gather_pairs() {
    pairs.resize(dk / 2 * kLanes);
    for (int64_t i = 0; i < kLanes; ++i) {
      const char* src = reinterpret_cast<const char*>(query(i));
      for (int64_t d = 0; d < dk / 2; ++d) std::memcpy(&pairs[d * kLanes + i], src + d * 4, 4);
    }
  }

  static __m512i widen(const T* x) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
  static __m512i joined(__m512i even, __m512i odd) { return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)); }

  static __m512i narrow_pair(Vec even, Vec odd) {  // 16 queries: (even, odd) as two bfloat16 in one 32-bit number
    return joined(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even)),
                  _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd)));
  }

  // 16 columns from `d` on of the values of keys j and j + 1, paired; a key that is not there has zeros.
  __m512i value_pair(int64_t j, int64_t d) const {
    const __m512i zero = _mm512_setzero_si512();
    return joined(j < keys ? widen(value(j) + d) : zero, j + 1 < keys ? widen(value(j + 1) + d) : zero);
  }

  static __m512 add_products(__m512 sum, uint32_t both, __m512i lanes) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(both)), (__m512bh)lanes);
  }

  void scores_on_dots() {
    gather_pairs();
    for (int64_t j = from; j < keys; j += kTile) {
      fetch(kTile);
      __m512 sum[kTile];
      const uint32_t* src[kTile];
#pragma GCC unroll 8
      for (int64_t t = 0; t < kTile; ++t) {
        sum[t] = _mm512_setzero_ps();
        src[t] = reinterpret_cast<const uint32_t*>(key(std::min(j + t, keys - 1)));
      }
      for (int64_t d = 0; d < dk / 2; ++d) {
        const __m512i lanes = _mm512_loadu_si512(&pairs[d * kLanes]);
#pragma GCC unroll 8
        for (int64_t t = 0; t < kTile; ++t) sum[t] = add_products(sum[t], src[t][d], lanes);
      }
#pragma GCC unroll 8
      for (int64_t t = 0; t < kTile; ++t) store(line(j + t), (Vec)sum[t]);  // there is room behind the last key
    }
  }

  void values_on_dots() {
    wide.assign(dv * kLanes, 0.f);
    pairs.resize(kBlock / 2 * (dv + kLanes));
    uint32_t *weights = pairs.data(), *columns = weights + kBlock / 2 * kLanes;  // of a block of keys, in pairs
    store(line(keys), Vec{});
    for (int64_t j0 = from; j0 < keys; j0 += kBlock) {
      const int64_t n = (std::min(kBlock, keys - j0) + 1) / 2;
      for (int64_t p = 0; p < n; ++p) {
        const int64_t j = j0 + 2 * p;
        _mm512_storeu_si512(weights + p * kLanes, narrow_pair(load(line(j)), load(line(j + 1))));
        for (int64_t d = 0; d < dv; d += 16) _mm512_storeu_si512(columns + p * dv + d, value_pair(j, d));
      }
      for (int64_t d = 0; d < dv; d += 16) {
        __m512 sum[16];
#pragma GCC unroll 16
        for (int64_t t = 0; t < 16; ++t) sum[t] = _mm512_loadu_ps(&wide[(d + t) * kLanes]);
        for (int64_t p = 0; p < n; ++p) {
          const __m512i lanes = _mm512_loadu_si512(weights + p * kLanes);
#pragma GCC unroll 16
          for (int64_t t = 0; t < 16; ++t) sum[t] = add_products(sum[t], columns[p * dv + d + t], lanes);
        }
#pragma GCC unroll 16
        for (int64_t t = 0; t < 16; ++t) _mm512_storeu_ps(&wide[(d + t) * kLanes], sum[t]);
      }
    }
    normalize();
  }
#endif

#ifdef SPECFX_AMX
  // Tile 0: 16 keys x 16 queries of sums; 1: 16 keys x 32 of their width; 2: as much of the queries, pairs of numbers transposed.
  void scores_on_tiles() {
    gather_pairs();
    for (int64_t j = from; j < keys; j += 16) {  // a page is a multiple of 16 tokens: these 16 lie behind each other
      const T* src = key(j);
      fetch(16);
      _tile_zero(0);
      for (int64_t d = 0; d < dk; d += 32) {
        _tile_loadd(1, src + d, slot_k * 2);
        _tile_loadd(2, &pairs[d / 2 * kLanes], 64);
        _tile_dpbf16ps(0, 1, 2);
      }
      _tile_stored(0, line(j), 64);
    }
  }

  // Tiles 0..3: 16 queries x 64 columns of sums; 4: weights of 32 keys; 5: their values, pairs of keys transposed.
  void values_on_tiles() {
    const __m512i row = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(16));
    alignas(64) uint32_t weights[16 * 16], columns[16 * 16];
    alignas(64) float sums[16 * 64];
    for (int64_t j = keys; j < keys + 32; ++j) store(line(j), Vec{});
    for (int64_t d0 = 0; d0 < dv; d0 += 64) {
      const int64_t width = std::min<int64_t>(64, dv - d0);
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t j = from; j < keys; j += 32) {
        for (int64_t p = 0; p < 16; ++p)
          _mm512_i32scatter_epi32(weights + p, row, narrow_pair(load(line(j + 2 * p)), load(line(j + 2 * p + 1))), 4);
        _tile_loadd(4, weights, 64);
        for (int64_t d = 0; d < width; d += 16) {
          for (int64_t p = 0; p < 16; ++p) _mm512_store_si512(columns + p * 16, value_pair(j + 2 * p, d0 + d));
          _tile_loadd(5, columns, 64);
          switch (d / 16) {
            case 0: _tile_dpbf16ps(0, 4, 5); break;
            case 1: _tile_dpbf16ps(1, 4, 5); break;
            case 2: _tile_dpbf16ps(2, 4, 5); break;
            default: _tile_dpbf16ps(3, 4, 5);
          }
        }
      }
      _tile_stored(0, sums, 256);
      _tile_stored(1, sums + 16, 256);
      _tile_stored(2, sums + 32, 256);
      _tile_stored(3, sums + 48, 256);
      for (int64_t i = 0; i < count; ++i) {
        const float inverse = 1.f / total[i];
        for (int64_t d = 0; d < width; ++d) result(i)[d0 + d] = static_cast<T>(sums[i * 64 + d] * inverse);
      }
    }
  }
#endif

  const Batch& b;
  const T *Q, *K, *V;
  T* O;
  const int64_t heads, dk, dv, page, groups, share, slot_k, slot_v, window;
  const float scale, softcap;
  const float* sinks;
  const int64_t skip;
  bool dots = false, tiles = false;  // which instructions the products run on
  // of the present item
  Item item;
  int64_t row0, rows, length, count, keys, from;
  const int32_t* table;
  bool causal;
  int64_t row_of[kLanes], head_of[kLanes], standing[kLanes];
  Vec total;
  std::vector<float> lines, wide, block;
  std::vector<int64_t> slots;
  // of the next sequence: tokens before `to_fetch`, of which those before `fetched` have been asked for
  int64_t fetched = 0, to_fetch = 0;
  std::vector<uint32_t> pairs;
};

// Whether each row lies in one piece; the rows may stand apart (a slice of a fused projection).
inline bool rows_in_one_piece(const Tensor& x) { return x.stride(2) == 1 && x.stride(1) == x.size(2); }

inline void append(const Tensor& rows, Tensor& pages, const Batch& b, const Tensor& moves) {
  const int64_t bytes = pages.size(2) * pages.size(3) * pages.element_size(), page = pages.size(1), count = moves.size(1);
  char* base = static_cast<char*>(pages.mutable_data_ptr());
  const int64_t* move = moves.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < count; ++m)
    if (move[m] >= 0) std::memmove(base + move[count + m] * bytes, base + move[m] * bytes, bytes);
  const char* src = static_cast<const char*>(rows.const_data_ptr());
  const int64_t apart = rows.stride(0) * rows.element_size();
  for (int64_t s = 0; s < b.sequences; ++s)
    for (int64_t r = b.starts[s]; r < b.starts[s + 1]; ++r) {
      const int64_t position = b.lengths[s] + r - b.starts[s];
      const int64_t slot = static_cast<int64_t>(b.table[s * b.pages_a_sequence + position / page]) * page + position % page;
      std::memcpy(base + slot * bytes, src + r * apart, bytes);
    }
}

inline Tensor tree_attention_(const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& tree_mask, const Tensor& page_table,
                       const Tensor& lengths, const Tensor& row_starts, const Tensor& moves, Tensor k_pages, Tensor v_pages, double scale,
                       int64_t window, double softcap, const std::optional<Tensor>& sinks, int64_t skip) {
  TORCH_CHECK(k_pages.is_contiguous() && v_pages.is_contiguous() && moves.is_contiguous(), "specfx::tree_attention_: pools and moves must be contiguous");
  for (const Tensor& x : {k_, v_, k_pages, v_pages})
    TORCH_CHECK(x.scalar_type() == q_.scalar_type(), "specfx::tree_attention_: q is ", q_.scalar_type(), ", k, v or a pool is ", x.scalar_type());
  TORCH_CHECK(k_.sizes().slice(1) == k_pages.sizes().slice(2) && v_.sizes().slice(1) == v_pages.sizes().slice(2),
              "specfx::tree_attention_: rows of k ", k_.sizes(), " and v ", v_.sizes(), " don't fit the pools ", k_pages.sizes(), ", ", v_pages.sizes());
  const Tensor q = q_.contiguous(), k = rows_in_one_piece(k_) ? k_ : k_.contiguous(), v = rows_in_one_piece(v_) ? v_ : v_.contiguous();
  const Batch b = view(tree_mask, page_table, lengths, row_starts);
  append(k, k_pages, b, moves);
  append(v, v_pages, b, moves);
  Tensor out = at::empty({q.size(0), q.size(1), v.size(2)}, q.options());
  std::optional<Tensor> extra;
  if (sinks.has_value()) extra = sinks->to(at::kFloat).contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "tree_attention_", [&] {
    const Attention<scalar_t> first(q, k_pages, v_pages, b, out, scale, window, softcap, extra ? extra->const_data_ptr<float>() : nullptr,
                                    skip);
    const auto items = first.items();
    at::parallel_for(0, items.size(), 1, [&](int64_t begin, int64_t end) {
      Attention<scalar_t> attention(first);
      for (int64_t n = begin; n < end; ++n) attention.run(items[n]);
    });
  });
  return out;
}

inline Tensor tree_positions(const std::optional<Tensor>& tree_mask, const Tensor& lengths, const Tensor& row_starts, const Tensor& input_ids) {
  const Batch b = view(tree_mask, Tensor(), lengths, row_starts);
  Tensor out = at::empty(input_ids.sizes(), input_ids.options().dtype(at::kLong));
  int64_t* position = out.mutable_data_ptr<int64_t>();
  for (int64_t s = 0; s < b.sequences; ++s) {
    const int64_t rows = b.starts[s + 1] - b.starts[s];
    for (int64_t i = 0; i < rows; ++i) position[b.starts[s] + i] = b.lengths[s] + b.depth(b.starts[s] + i, i, rows);
  }
  return out;
}

inline Tensor tree_parents(const std::optional<Tensor>& tree_mask, const Tensor& row_starts, const Tensor& input_ids) {
  const Batch b = view(tree_mask, Tensor(), row_starts, row_starts);
  const int64_t sequences = row_starts.size(0) - 1;
  Tensor out = at::empty({input_ids.size(1)}, input_ids.options().dtype(at::kLong));
  int64_t* place = out.mutable_data_ptr<int64_t>();
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t begin = b.starts[s], rows = b.starts[s + 1] - begin;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t parent = b.parent(begin + i, i, rows);
      place[begin + i] = parent < 0 ? s : sequences + begin + parent;
    }
  }
  return out;
}

}  // namespace specfx
