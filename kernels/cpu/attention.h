// Tree attention over paged KV. The queries of a sequence and KV head, all rows of its tree times the heads of the group, are taken up to 16
// at a time, and their keys a segment at a time; the segments' sums are folded in order, as flash decoding does. Segments begin at fixed
// positions: a result depends neither on the number of threads nor on what else is in the batch. Each thread gets a stretch of segments that
// cost alike. Few rows wait for memory: all their heads take a segment of the keys before any goes on, for these lie side by side, and
// meanwhile the next segment's keys and values are fetched.
// On AVX-512 BF16 vectors, a vector holds 16 keys' scores, or 16 columns of values, of one query (scores lie query by query), so few queries
// take little time. On AMX tiles, and in float32 and float16, it holds the same thing for 16 queries (scores lie key by key): nothing is
// summed across a vector, and keys need no transposition. In bfloat16 probabilities are rounded to bfloat16, as flash attention does.
#pragma once

#include "common.h"

namespace specfx {

constexpr int64_t kSegment = 512;  // keys whose scores are held at a time, and the least that a thread takes on
constexpr int64_t kFew = 64;       // queries of a sequence and KV head that go through the keys together
constexpr int64_t kBlock = 64;     // keys that are widened to float, or transposed, at a time
constexpr int64_t kTile = 8;       // keys (or value columns) that share each load of a query (or weight) vector
constexpr int64_t kMost = 6;       // queries that share each load of a vector of keys (or values) on AVX-512 BF16: 24 vectors of sums

// Queries `first` to `last`, (row, head of the group) pairs, and the keys at `begin` to `end` of a sequence and KV head. Among all segments,
// `opens` and `closes` are the first and the last of these queries, and `next` the first of other keys; those of queries that take turns
// with these have another `turn`.
struct Segment {
  int64_t sequence, group, first, last, begin, end, turn, opens, closes, next;
};

// What the segments of 16 queries add up to: their highest scores, and the sums of exp(score - highest) and of the values weighted by it.
struct Sums {
  Vec top, total;
  std::vector<float> values;  // [queries, width], or on vectors [width, 16 queries]
};

// Everything that one segment needs, reused from one to the next by a thread.
template <typename T>
class Attention {
 public:
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
    dots = dots && !tiles;
#endif
  }

  // All work, in order: with few queries by segments of the keys, with many (a prompt) by queries.
  std::vector<Segment> segments() const {
    std::vector<Segment> all;
    std::vector<int64_t> opens, closes;
    for (int64_t s = 0; s < b.sequences; ++s) {
      const int64_t rows = b.starts[s + 1] - b.starts[s], length = b.lengths[s], queries = rows * share, of_sequence = all.size();
      const bool few = queries <= kFew, runs = b.causal(rows);
      const int64_t blocks = (queries + kLanes - 1) / kLanes, turns = groups * blocks, count = (length + rows + kSegment - 1) / kSegment;
      opens.assign(turns, -1);
      closes.assign(turns, -1);
      for (int64_t i = 0; i < turns * count; ++i) {
        const int64_t turn = few ? i % turns : i / count, start = (few ? i / turns : i % count) * kSegment, n = all.size();
        const int64_t first = turn % blocks * kLanes, last = std::min(first + kLanes, queries);
        // With a window no query of these sees a key before `seen` (in a tree, depths start at 0).
        const int64_t seen = window > 0 ? std::max<int64_t>(0, length + (runs ? first / share : 0) - window + 1) / kLanes * kLanes : 0;
        const int64_t keys = length + (runs ? (last - 1) / share + 1 : rows);
        const int64_t begin = std::max(seen, start), end = std::min(keys, start + kSegment);
        if (begin >= end) continue;
        if (opens[turn] < 0) opens[turn] = n;
        closes[turn] = n;
        all.push_back({s, turn / blocks, first, last, begin, end, turn});
      }
      int64_t next = all.size();
      for (int64_t n = next - 1; n >= of_sequence; --n) {
        Segment& segment = all[n];
        segment.opens = opens[segment.turn];
        segment.closes = closes[segment.turn];
        segment.next = next;
        if (!few)
          segment.turn = 0;  // one after the other
        else if (n > of_sequence && all[n - 1].begin / kSegment != segment.begin / kSegment)
          next = n;
      }
    }
    return all;
  }

  // Where in `all` each of `threads` stretches of like cost begins, and where the last ends.
  static std::vector<int64_t> stretches(const std::vector<Segment>& all, int64_t threads) {
    const auto cost = [](const Segment& s) { return (s.end - s.begin + 16) * (s.last - s.first + 4); };
    int64_t whole = 0, passed = 0;
    for (const Segment& s : all) whole += cost(s);
    std::vector<int64_t> starts{0};
    for (int64_t n = 0; n < static_cast<int64_t>(all.size()); ++n) {
      while (static_cast<int64_t>(starts.size()) < threads && passed + cost(all[n]) / 2 >= whole * static_cast<int64_t>(starts.size()) / threads)
        starts.push_back(n);
      passed += cost(all[n]);
    }
    starts.resize(threads + 1, all.size());
    return starts;
  }

  // Segments `begin` to `end` of `all`. Those of queries that have others elsewhere are left in `parts`, for `join`.
  void run(const std::vector<Segment>& all, int64_t begin, int64_t end, std::vector<Sums>& parts) {
    for (int64_t n = begin; n < end; ++n) {
      const Segment& s = all[n];
      if (n == begin || s.next != segment.next) look_ahead(all, s.next, end);
      take(s);
      compute();
      if (s.opens < begin || s.closes >= end) {
        parts[n] = part;
        continue;
      }
      if (s.turn >= static_cast<int64_t>(sums.size())) sums.resize(s.turn + 1);
      if (n == s.opens)
        std::swap(sums[s.turn], part);
      else
        fold(sums[s.turn], part);
      if (n == s.closes) finish(sums[s.turn]);
    }
  }

  // The results of the queries whose first segment is all[n], from all their `parts`.
  void join(const std::vector<Segment>& all, int64_t n, std::vector<Sums>& parts) {
    take(all[n]);
    for (int64_t i = n + 1; i <= segment.closes; ++i)
      if (all[i].opens == n) fold(parts[n], parts[i]);
    finish(parts[n]);
  }

 private:
  void compute() {
#ifdef SPECFX_AMX
    if (tiles) {
      configure_tiles({16, 16, 16, 16, 16, 16, 16, 16});
      scores_on_tiles();
      weigh_by_key();
      values_on_tiles();
      _tile_release();
      return;
    }
#endif
#ifdef SPECFX_DOT
    if (dots) {
      scores_on_dots();
      weigh_by_query();
      values_on_dots();
      return;
    }
#endif
    scores_on_vectors();
    weigh_by_key();
    values_on_vectors();
  }

  void take(const Segment& next) {
    segment = next;
    row0 = b.starts[segment.sequence];
    rows = b.starts[segment.sequence + 1] - row0;
    length = b.lengths[segment.sequence];
    causal = b.causal(rows);
    count = segment.last - segment.first;
    from = segment.begin;
    keys = segment.end;
    for (int64_t i = 0; i < kLanes; ++i) {  // idle lanes repeat the first query
      const int64_t query = segment.first + (i < count ? i : 0);
      row_of[i] = query / share;
      head_of[i] = segment.group * share + query % share;
      standing[i] = length + b.depth(row0 + row_of[i], row_of[i], rows);
    }
    stride = (keys - from + kBlock - 1) / kBlock * kBlock;
    lines.resize(dots ? count * stride : (keys - from + 32) * kLanes);
    part.values.resize((by_query() ? count : kLanes) * dv);
    find_slots();
  }

  // Where the tokens from `from` on lie in the pools.
  void find_slots() {
    slots.resize(keys - from);
    const int32_t* table = b.table + segment.sequence * b.pages_a_sequence;
    for (int64_t j = from; j < keys;) {
      const int64_t within = j % page, n = std::min(page - within, keys - j), first = table[j / page] * page + within;
      for (int64_t i = 0; i < n; ++i) slots[j - from + i] = first + i;
      j += n;
    }
  }

  const T* key(int64_t position) const { return K + slots[position - from] * slot_k + segment.group * dk; }
  const T* value(int64_t position) const { return V + slots[position - from] * slot_v + segment.group * dv; }
  const T* query(int64_t lane) const { return Q + ((row0 + row_of[lane]) * heads + head_of[lane]) * dk; }
  T* result(int64_t lane) const { return O + ((row0 + row_of[lane]) * heads + head_of[lane]) * dv; }
  float* line(int64_t position) { return &lines[(position - from) * kLanes]; }  // 16 queries' scores of one key
  float& score(int64_t position, int64_t lane) { return lines[dots ? lane * stride + position - from : (position - from) * kLanes + lane]; }

  bool by_query() const { return dots || tiles; }

  // What this thread reads after the present keys: the keys and values of all[n] and of those that share them.
  void look_ahead(const std::vector<Segment>& all, int64_t n, int64_t end) {
    fetched = to_fetch = 0;
    if (n >= end) return;
    ahead = all[n].sequence;
    fetched = all[n].begin;
    to_fetch = all[all[n].next - 1].end;
  }

  // While `passed` keys of a segment are computed, a like part of the keys and values ahead comes into the second cache.
  void fetch(int64_t passed) {
    const int32_t* table = b.table + ahead * b.pages_a_sequence;
    for (const int64_t end = std::min(fetched + passed / groups + 1, to_fetch); fetched < end; ++fetched) {
      const int64_t slot = static_cast<int64_t>(table[fetched / page]) * page + fetched % page;
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
      fetch(kBlock / 2);
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

  // Scale and cap the scores, and hide what a query doesn't see.
  void settle() {
    const int64_t lanes = dots ? count : kLanes, all = dots ? count * stride : (keys - from) * kLanes;
    for (int64_t i = 0; i < all; i += kLanes) store(&lines[i], load(&lines[i]) * scale);
    if (softcap > 0)
      for (int64_t i = 0; i < all; ++i) lines[i] = softcap * std::tanh(lines[i] / softcap);
    const int64_t placed = causal ? keys : std::min(length, keys);  // keys before this one stand where they are placed
    for (int64_t i = 0; i < lanes; ++i) {
      if (window > 0) hide(i, from, std::min(placed, standing[i] - window + 1));
      if (standing[i] >= skip) hide(i, from, std::min(placed, skip));
      if (causal) hide(i, std::max(from, standing[i] + 1), keys);
    }
    for (int64_t r = std::max<int64_t>(0, from - length); r < keys - placed; ++r) {
      const int64_t stands = length + b.depth(row0 + r, r, rows);
      for (int64_t i = 0; i < lanes; ++i) {
        const bool ancestor = (b.mask[row0 + row_of[i]] >> r) & 1, skipped = stands < skip && standing[i] >= skip;
        if (!ancestor || skipped || (window > 0 && stands <= standing[i] - window)) score(length + r, i) = kHidden;
      }
    }
  }

  void hide(int64_t lane, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) score(j, lane) = kHidden;
  }

  // Scores to weights, in place; `part` keeps the highest scores and the weights' sums.
  void weigh_by_key() {
    settle();
    Vec top = Vec{} + kLowest;
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
    part.top = top;
    part.total = sum;
  }

  void values_on_vectors() {
    float* out = part.values.data();
    std::fill_n(out, dv * kLanes, 0.f);
    block.resize((kBlock + kTile) * dv);
    for (int64_t j0 = from; j0 < keys; j0 += kBlock) {
      const int64_t n = std::min(kBlock, keys - j0);
      fetch(kBlock / 2);
      for (int64_t j = 0; j < n; ++j) {
        const T* src = value(j0 + j);
        for (int64_t d = 0; d < dv; ++d) block[j * dv + d] = to_float(src[d]);
      }
      for (int64_t d = 0; d < dv; d += kTile) {
        Vec sum[kTile];
        const int64_t width = std::min(kTile, dv - d);
        for (int64_t t = 0; t < kTile; ++t) sum[t] = t < width ? load(out + (d + t) * kLanes) : Vec{};
        for (int64_t j = 0; j < n; ++j) {
          const Vec p = load(line(j0 + j));
          for (int64_t t = 0; t < kTile; ++t) sum[t] += block[j * dv + d + t] * p;
        }
        for (int64_t t = 0; t < width; ++t) store(out + (d + t) * kLanes, sum[t]);
      }
    }
  }

  // Add a later segment's sums.
  void fold(Sums& sums, const Sums& later) const {
    const Vec top = later.top > sums.top ? later.top : sums.top;
    const Vec kept = exp_nonpositive(sums.top - top), added = exp_nonpositive(later.top - top);
    sums.top = top;
    sums.total = sums.total * kept + later.total * added;
    for (int64_t n = 0; n < static_cast<int64_t>(later.values.size()); n += kLanes) {
      float* x = &sums.values[n];
      if (by_query())
        store(x, load(x) * kept[n / dv] + load(&later.values[n]) * added[n / dv]);
      else
        store(x, load(x) * kept + load(&later.values[n]) * added);
    }
  }

  // The results of this segment's queries from their sums over all keys.
  void finish(const Sums& sums) const {
    for (int64_t i = 0; i < count; ++i) {
      float over = 1.f / sums.total[i];
      if (sinks) {  // a sink is one more score, without a value
        const float sink = sinks[head_of[i]], top = std::max(sums.top[i], sink), kept = std::exp(sums.top[i] - top);
        over = kept / (sums.total[i] * kept + std::exp(sink - top));
      }
      T* out = result(i);
      if (!by_query()) {
        for (int64_t d = 0; d < dv; ++d) out[d] = static_cast<T>(sums.values[d * kLanes + i] * over);
        continue;
      }
#ifdef SPECFX_DOT
      for (int64_t d = 0; d < dv; d += kLanes) store_narrow(out + d, (__m512)(load(&sums.values[i * dv + d]) * over));
#endif
    }
  }

#ifdef SPECFX_DOT
  // As `weigh_by_key`; the weights are `shares`, in bfloat16.
  void weigh_by_query() {
    settle();
    part.top = part.total = Vec{};
    shares.resize(count * stride);
    for (int64_t i = 0; i < count; ++i) {
      float* row = &lines[i * stride];
      std::fill(row + keys - from, row + stride, kHidden);
      Vec tops = Vec{} + kLowest, sum = Vec{};
      for (int64_t j = 0; j < stride; j += kLanes) {
        const Vec x = load(row + j);
        tops = x > tops ? x : tops;
      }
      const float top = _mm512_reduce_max_ps((__m512)tops);
      for (int64_t j = 0; j < stride; j += kLanes) {
        const Vec p = exp_nonpositive(load(row + j) - top);
        sum += p;
        store_narrow(&shares[i * stride + j], (__m512)p);
      }
      part.top[i] = top;
      part.total[i] = _mm512_reduce_add_ps((__m512)sum);
    }
  }

  // out[c]: the 32-bit numbers c of 16 rows; out's rows lie `apart` numbers from each other.
  static void transpose(__m512i (&rows)[16], uint32_t* out, int64_t apart) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // 128 bits of `rows[i + c]`: four rows of each column c, c + 4, c + 8, c + 12
      rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512i even0 = _mm512_shuffle_i32x4(rows[c], rows[c + 4], 0x88), odd0 = _mm512_shuffle_i32x4(rows[c], rows[c + 4], 0xdd);
      const __m512i even1 = _mm512_shuffle_i32x4(rows[c + 8], rows[c + 12], 0x88), odd1 = _mm512_shuffle_i32x4(rows[c + 8], rows[c + 12], 0xdd);
      _mm512_storeu_si512(out + c * apart, _mm512_shuffle_i32x4(even0, even1, 0x88));
      _mm512_storeu_si512(out + (c + 4) * apart, _mm512_shuffle_i32x4(odd0, odd1, 0x88));
      _mm512_storeu_si512(out + (c + 8) * apart, _mm512_shuffle_i32x4(even0, even1, 0xdd));
      _mm512_storeu_si512(out + (c + 12) * apart, _mm512_shuffle_i32x4(odd0, odd1, 0xdd));
    }
  }

  static void store_narrow(void* to, __m512 x) { _mm256_storeu_si256(static_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x)); }

  static __m512 add_products(__m512 sum, const void* both, __m512i lanes) {  // both: two bfloat16, multiplied with each lane's two
    int32_t pair;
    std::memcpy(&pair, both, sizeof pair);
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)lanes);
  }

  // A block of keys is transposed: `pairs` holds their first pair of numbers, their second, ...; then each query runs over it.
  void scores_on_dots() {
    const int64_t whole = (dk + 31) / 32;
    pairs.resize(whole * 16 * kBlock);
    for (int64_t j0 = from; j0 < keys; j0 += kBlock) {
      const int64_t vectors = (std::min(kBlock, keys - j0) + kLanes - 1) / kLanes;
      for (int64_t v = 0; v < vectors; ++v) {
        fetch(kLanes / 2);  // and as many with the values: caches take few lines at a time
        for (int64_t d = 0; d < whole; ++d) {
          const __mmask16 there = dk - d * 32 >= 32 ? 0xffff : (1 << (dk / 2 - d * 16)) - 1;
          __m512i rows[kLanes];
#pragma GCC unroll 16
          for (int64_t t = 0; t < kLanes; ++t) rows[t] = _mm512_maskz_loadu_epi32(there, key(std::min(j0 + v * kLanes + t, keys - 1)) + d * 32);
          transpose(rows, &pairs[d * 16 * kBlock + v * kLanes], kBlock);
        }
      }
      for (int64_t i = 0; i < count; i += kMost) {
        if (vectors > 2)
          scores_of<kMost, 4>(i, std::min(kMost, count - i), j0 - from);
        else
          scores_of<kMost, 2>(i, std::min(kMost, count - i), j0 - from);
      }
    }
  }

  // Of `queries` queries from `first` on and a block of keys.
  template <int64_t most, int64_t vectors>
  void scores_of(int64_t first, int64_t queries, int64_t at) {
    if constexpr (most > 1)
      if (queries < most) return scores_of<most - 1, vectors>(first, queries, at);
    __m512 sum[most][vectors];
    const T* src[most];
#pragma GCC unroll 6
    for (int64_t i = 0; i < most; ++i) {
      src[i] = query(first + i);
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) sum[i][v] = _mm512_setzero_ps();
    }
    for (int64_t d = 0; d < dk / 2; ++d) {
      __m512i lanes[vectors];
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) lanes[v] = _mm512_loadu_si512(&pairs[d * kBlock + v * kLanes]);
#pragma GCC unroll 6
      for (int64_t i = 0; i < most; ++i)
#pragma GCC unroll 4
        for (int64_t v = 0; v < vectors; ++v) sum[i][v] = add_products(sum[i][v], src[i] + 2 * d, lanes[v]);
    }
#pragma GCC unroll 6
    for (int64_t i = 0; i < most; ++i)
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) _mm512_storeu_ps(&lines[(first + i) * stride + at + v * kLanes], sum[i][v]);
  }

  void values_on_dots() {
    for (int64_t i = 0; i < count; i += kMost)
      for (int64_t d = 0; d < dv;) {
        if (dv - d >= 64)
          values_of<kMost, 2>(i, std::min(kMost, count - i), d), d += 64;
        else
          values_of<kMost, 1>(i, std::min(kMost, count - i), d), d += 32;
      }
  }

  // Of `queries` queries from `first` on, 32 * `vectors` columns from `d0` on, as far as there are so many.
  template <int64_t most, int64_t vectors>
  void values_of(int64_t first, int64_t queries, int64_t d0) {
    if constexpr (most > 1)
      if (queries < most) return values_of<most - 1, vectors>(first, queries, d0);
    const __m512i lower = interleaving(0), upper = interleaving(16);
    const int64_t there = std::min<int64_t>(32 * vectors, dv - d0);
    const __mmask32 tail = there % 32 ? 0xffff : ~__mmask32(0);  // dv is a multiple of 16
    const T nothing[32 * vectors] = {};  // beside a last key without a second
    __m512 sum[most][2 * vectors];
#pragma GCC unroll 6
    for (int64_t i = 0; i < most; ++i)
#pragma GCC unroll 4
      for (int64_t v = 0; v < 2 * vectors; ++v) sum[i][v] = _mm512_setzero_ps();
    for (int64_t j = from; j < keys; j += 2) {
      if (first == 0 && d0 == 0 && j % kLanes == 0) fetch(kLanes / 2);
      const T *even = value(j) + d0, *odd = j + 1 < keys ? value(j + 1) + d0 : nothing;
      __m512i lanes[2 * vectors];
#pragma GCC unroll 2
      for (int64_t v = 0; v < vectors; ++v) {
        const __mmask32 mask = v + 1 == vectors ? tail : ~__mmask32(0);
        const __m512i x = _mm512_maskz_loadu_epi16(mask, even + v * 32), y = _mm512_maskz_loadu_epi16(mask, odd + v * 32);
        lanes[2 * v] = _mm512_permutex2var_epi16(x, lower, y);
        lanes[2 * v + 1] = _mm512_permutex2var_epi16(x, upper, y);
      }
#pragma GCC unroll 6
      for (int64_t i = 0; i < most; ++i)
#pragma GCC unroll 4
        for (int64_t v = 0; v < 2 * vectors; ++v) sum[i][v] = add_products(sum[i][v], &shares[(first + i) * stride + j - from], lanes[v]);
    }
#pragma GCC unroll 6
    for (int64_t i = 0; i < most; ++i)
#pragma GCC unroll 4
      for (int64_t v = 0; v < 2 * vectors; ++v)
        if (v * 16 < there) _mm512_storeu_ps(&part.values[(first + i) * dv + d0 + v * 16], sum[i][v]);
  }

  // Picks 16 numbers of each of two vectors, from `first` on, in turn.
  static __m512i interleaving(int first) {
    alignas(64) uint16_t index[32];
    for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(first + i / 2 + 32 * (i % 2));
    return _mm512_load_si512(index);
  }
#endif

#ifdef SPECFX_AMX
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

  // Tile 0: 16 keys x 16 queries of sums; 1: 16 keys x 32 of their width; 2: as much of the queries, pairs of numbers transposed.
  void scores_on_tiles() {
    gather_pairs();
    for (int64_t j = from; j < keys; j += 16) {  // a page is a multiple of 16 tokens: these 16 lie behind each other
      const T* src = key(j);
      fetch(8);
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
    alignas(64) float held[16 * 64];
    for (int64_t j = keys; j < keys + 32; ++j) store(line(j), Vec{});
    for (int64_t d0 = 0; d0 < dv; d0 += 64) {
      const int64_t width = std::min<int64_t>(64, dv - d0);
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t j = from; j < keys; j += 32) {
        if (d0 == 0) fetch(16);
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
      _tile_stored(0, held, 256);
      _tile_stored(1, held + 16, 256);
      _tile_stored(2, held + 32, 256);
      _tile_stored(3, held + 48, 256);
      for (int64_t i = 0; i < count; ++i) std::copy_n(held + i * 64, width, &part.values[i * dv + d0]);
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
  bool dots = false, tiles = false;  // which instructions the products run on; on dots, scores lie query by query
  // of the present segment
  Segment segment{};
  int64_t row0 = 0, rows = 0, length = 0, count = 0, keys = 0, from = 0;
  int64_t stride = 0;  // on dots: what the scores of two queries lie apart
  bool causal = false;
  int64_t row_of[kLanes] = {}, head_of[kLanes] = {}, standing[kLanes] = {};
  Sums part;
  std::vector<Sums> sums;  // up to this segment, of those that take turns
  std::vector<float> lines, wide, block;
  std::vector<int64_t> slots;
  std::vector<uint32_t> pairs;
  std::vector<uint16_t> shares;
  // of the keys that come next: their sequence, and the positions not yet asked for
  int64_t ahead = 0, fetched = 0, to_fetch = 0;
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

// Whether nothing is read beyond its end: of a batch that is to have so many queries, keys and words of the mask, in pages of `page` tokens.
inline void require_room(const Batch& b, const Tensor& table, const Tensor& starts, int64_t queries, int64_t keys, int64_t words, int64_t page) {
  TORCH_CHECK(table.size(0) == b.sequences && starts.size(0) == b.sequences + 1, "specfx::tree_attention_: ", b.sequences,
              " sequences don't fit a page table of ", table.sizes(), " and row_starts of ", starts.sizes());
  const int64_t rows = b.starts[b.sequences];
  TORCH_CHECK(rows <= queries && rows <= keys && (!b.mask || rows <= words), "specfx::tree_attention_: the batch has ", rows, " rows, there are ", queries,
              " queries, ", keys, " keys and ", words, " words of the mask");
  for (int64_t s = 0; s < b.sequences; ++s) {
    const int64_t tokens = b.lengths[s] + b.starts[s + 1] - b.starts[s];
    TORCH_CHECK(tokens <= b.pages_a_sequence * page, "specfx::tree_attention_: sequence ", s, " has ", tokens, " tokens, the page table room for ",
                b.pages_a_sequence * page);
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
  TORCH_CHECK(k_pages.sizes().slice(0, 3) == v_pages.sizes().slice(0, 3) && q_.size(2) == k_pages.size(3) && q_.size(1) % k_pages.size(2) == 0,
              "specfx::tree_attention_: queries ", q_.sizes(), " don't fit the pools ", k_pages.sizes(), ", ", v_pages.sizes());
  const Tensor q = q_.contiguous(), k = rows_in_one_piece(k_) ? k_ : k_.contiguous(), v = rows_in_one_piece(v_) ? v_ : v_.contiguous();
  const Batch b = view(tree_mask, page_table, lengths, row_starts);
  require_room(b, page_table, row_starts, q.size(0), std::min(k.size(0), v.size(0)), tree_mask ? tree_mask->numel() : 0, k_pages.size(1));
  append(k, k_pages, b, moves);
  append(v, v_pages, b, moves);
  Tensor out = at::empty({q.size(0), q.size(1), v.size(2)}, q.options());
  std::optional<Tensor> extra;
  if (sinks.has_value()) extra = sinks->to(at::kFloat).contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "tree_attention_", [&] {
    const Attention<scalar_t> first(q, k_pages, v_pages, b, out, scale, window, softcap, extra ? extra->const_data_ptr<float>() : nullptr,
                                    skip);
    const auto all = first.segments();
    const auto starts = first.stretches(all, at::get_num_threads());
    std::vector<Sums> parts(all.size());
    at::parallel_for(0, starts.size() - 1, 1, [&](int64_t begin, int64_t end) {
      Attention(first).run(all, starts[begin], starts[end], parts);
    });
    for (int64_t n = 0; n < static_cast<int64_t>(all.size()); ++n)
      if (all[n].opens == n && !parts[n].values.empty()) Attention(first).join(all, n, parts);
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
