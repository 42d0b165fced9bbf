// CPU kernels of the specfx ops. Built once per machine by kernels/cpu_build.py; the references in Python are the specification.
//
// attention: a work item is (sequence, KV head, 16 queries), where the queries are all rows of the tree times the heads of the group.
// One vector holds the same thing for 16 queries, so nothing is summed across a vector and keys need no transposition.
// packed_linear: AMX bf16 tiles over pre-packed weights; one pass over the weights serves up to 32 rows.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define SPECFX_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using at::Tensor;
constexpr int64_t kMaskBits = 64;
constexpr int64_t kLanes = 16;  // queries (pairs of row and head) that share one vector, and one work item
constexpr int64_t kBlock = 64;  // keys that are widened to float at a time
constexpr int64_t kTile = 8;    // keys (or value columns) that share each load of a query (or weight) vector
constexpr float kHidden = -std::numeric_limits<float>::infinity();
typedef float Vec __attribute__((vector_size(64)));

template <typename T> inline float to_float(T x) { return static_cast<float>(x); }
template <> inline float to_float<c10::BFloat16>(c10::BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

// exp(x) for x <= 0, relative error below 2e-7 (Cephes' expf polynomial); 0 below -87.3.
inline Vec exp_nonpositive(Vec x) {
  typedef int32_t Ints __attribute__((vector_size(64)));
  const Vec floor = Vec{} - 87.3f;
  const Ints tiny = x < floor;
  x = tiny ? floor : x;
  const Ints whole = __builtin_convertvector(x * 1.44269504088896341f - 0.5f, Ints);  // rounds to nearest: x is not positive
  const Vec n = __builtin_convertvector(whole, Vec);
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec y = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r + 1.6666665459e-1f) * r +
          5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  const Ints bits = (whole + 127) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return tiny ? Vec{} : y * power;
}

struct Batch {
  const int64_t* mask;  // null: causal runs
  const int32_t *table, *lengths, *starts;
  int64_t sequences, pages_a_sequence;
  bool causal(int64_t rows) const { return mask == nullptr || rows > kMaskBits; }
  int64_t depth(int64_t row, int64_t i, int64_t rows) const { return causal(rows) ? i : __builtin_popcountll(mask[row]) - 1; }
};

Batch view(const std::optional<Tensor>& mask, const Tensor& table, const Tensor& lengths, const Tensor& starts) {
  for (const Tensor& x : {mask.value_or(Tensor()), table, lengths, starts})
    TORCH_CHECK(!x.defined() || x.is_contiguous(), "specfx: tree_mask, page_table, lengths and row_starts must be contiguous");
  return {mask.has_value() ? mask->const_data_ptr<int64_t>() : nullptr, table.defined() ? table.const_data_ptr<int32_t>() : nullptr,
          lengths.const_data_ptr<int32_t>(), starts.const_data_ptr<int32_t>(), lengths.size(0), table.defined() ? table.size(1) : 0};
}

template <typename T>
void attend(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Batch& b, Tensor& out, float scale, int64_t window,
            float softcap, const float* sinks) {
  const int64_t heads = q.size(1), dk = q.size(2), page = k_pages.size(1), groups = k_pages.size(2), dv = v_pages.size(3);
  const int64_t share = heads / groups, slot_k = groups * dk, slot_v = groups * dv;
  const T *Q = q.const_data_ptr<T>(), *K = k_pages.const_data_ptr<T>(), *V = v_pages.const_data_ptr<T>();
  T* O = out.mutable_data_ptr<T>();
  struct Item { int64_t sequence, group, first, last; };  // queries first..last of (row, head of the group) pairs
  std::vector<Item> items;
  for (int64_t s = 0; s < b.sequences; ++s) {
    const int64_t queries = (b.starts[s + 1] - b.starts[s]) * share;
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < queries; i += kLanes) items.push_back({s, g, i, std::min(i + kLanes, queries)});
  }
  at::parallel_for(0, items.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores, queries(dk * kLanes), sums(dv * kLanes), keys_block((kBlock + kTile) * std::max(dk, dv));
    for (int64_t n = begin; n < end; ++n) {
      const Item& item = items[n];
      const int64_t row0 = b.starts[item.sequence], rows = b.starts[item.sequence + 1] - row0, length = b.lengths[item.sequence];
      const int64_t count = item.last - item.first, first_row = item.first / share, last_row = (item.last - 1) / share;
      const bool causal = b.causal(rows);
      const int64_t keys = length + (causal ? last_row + 1 : rows);
      const int32_t* table = b.table + item.sequence * b.pages_a_sequence;
      auto slot = [&](int64_t position) { return static_cast<int64_t>(table[position / page]) * page + position % page; };
      int64_t row_of[kLanes], head_of[kLanes], standing[kLanes];
      Vec top = Vec{} + kHidden, total = {};
      for (int64_t i = 0; i < kLanes; ++i) {  // idle lanes repeat the first query
        const int64_t query = item.first + (i < count ? i : 0);
        row_of[i] = query / share;
        head_of[i] = item.group * share + query % share;
        standing[i] = length + b.depth(row0 + row_of[i], row_of[i], rows);
        const T* src = Q + ((row0 + row_of[i]) * heads + head_of[i]) * dk;
        for (int64_t d = 0; d < dk; ++d) queries[d * kLanes + i] = to_float(src[d]) * scale;
        if (sinks) top[i] = sinks[head_of[i]];
      }
      // With a window no query of this item sees a key before `from` (in a tree, depths start at 0).
      const int64_t from = window > 0 ? std::max<int64_t>(0, length + (causal ? first_row : 0) - window + 1) : 0;
      scores.resize((keys - from) * kLanes);
      auto line = [&](int64_t position) { return &scores[(position - from) * kLanes]; };
      for (int64_t j0 = from; j0 < keys; j0 += kBlock) {
        const int64_t block = std::min(kBlock, keys - j0);
        for (int64_t j = 0; j < block; ++j) {
          const T* src = K + slot(j0 + j) * slot_k + item.group * dk;
          for (int64_t d = 0; d < dk; ++d) keys_block[j * dk + d] = to_float(src[d]);
        }
        for (int64_t j = 0; j < block; j += kTile) {
          Vec sum[kTile] = {};
          for (int64_t d = 0; d < dk; ++d) {
            const Vec query = load(&queries[d * kLanes]);
            for (int64_t t = 0; t < kTile; ++t) sum[t] += keys_block[(j + t) * dk + d] * query;
          }
          for (int64_t t = 0; t < std::min(kTile, block - j); ++t) store(line(j0 + j + t), sum[t]);
        }
      }
      if (softcap > 0)
        for (float& x : scores) x = softcap * std::tanh(x / softcap);
      if (window > 0)
        for (int64_t i = 0; i < kLanes; ++i)
          for (int64_t j = from; j < std::min(length, standing[i] - window + 1); ++j) line(j)[i] = kHidden;
      for (int64_t r = std::max<int64_t>(0, from - length); r < keys - length; ++r) {
        const int64_t stands = length + b.depth(row0 + r, r, rows);
        for (int64_t i = 0; i < kLanes; ++i) {
          const bool visible = (causal ? r <= row_of[i] : (b.mask[row0 + row_of[i]] >> r) & 1) && (window <= 0 || stands > standing[i] - window);
          if (!visible) line(length + r)[i] = kHidden;
        }
      }
      for (int64_t j = from; j < keys; ++j) {
        const Vec x = load(line(j));
        top = x > top ? x : top;
      }
      for (int64_t j = from; j < keys; ++j) {
        const Vec p = exp_nonpositive(load(line(j)) - top);
        store(line(j), p);
        total += p;
      }
      if (sinks)
        for (int64_t i = 0; i < kLanes; ++i) total[i] += std::exp(sinks[head_of[i]] - top[i]);
      std::fill(sums.begin(), sums.end(), 0.f);
      for (int64_t j0 = from; j0 < keys; j0 += kBlock) {
        const int64_t block = std::min(kBlock, keys - j0);
        for (int64_t j = 0; j < block; ++j) {
          const T* src = V + slot(j0 + j) * slot_v + item.group * dv;
          for (int64_t d = 0; d < dv; ++d) keys_block[j * dv + d] = to_float(src[d]);
        }
        for (int64_t d = 0; d < dv; d += kTile) {
          Vec sum[kTile];
          const int64_t width = std::min(kTile, dv - d);
          for (int64_t t = 0; t < kTile; ++t) sum[t] = t < width ? load(&sums[(d + t) * kLanes]) : Vec{};
          for (int64_t j = 0; j < block; ++j) {
            const Vec p = load(line(j0 + j));
            for (int64_t t = 0; t < kTile; ++t) sum[t] += keys_block[j * dv + d + t] * p;
          }
          for (int64_t t = 0; t < width; ++t) store(&sums[(d + t) * kLanes], sum[t]);
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        const float inverse = 1.f / total[i];
        T* dst = O + ((row0 + row_of[i]) * heads + head_of[i]) * dv;
        for (int64_t d = 0; d < dv; ++d) dst[d] = static_cast<T>(sums[d * kLanes + i] * inverse);
      }
    }
  });
}

void append(const Tensor& rows, Tensor& pages, const Batch& b, const Tensor& moves) {
  const int64_t bytes = pages.size(2) * pages.size(3) * pages.element_size(), page = pages.size(1), count = moves.size(1);
  char* base = static_cast<char*>(pages.mutable_data_ptr());
  const int64_t* move = moves.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < count; ++m)
    if (move[m] >= 0) std::memmove(base + move[count + m] * bytes, base + move[m] * bytes, bytes);
  const char* src = static_cast<const char*>(rows.const_data_ptr());
  for (int64_t s = 0; s < b.sequences; ++s)
    for (int64_t r = b.starts[s]; r < b.starts[s + 1]; ++r) {
      const int64_t position = b.lengths[s] + r - b.starts[s];
      const int64_t slot = static_cast<int64_t>(b.table[s * b.pages_a_sequence + position / page]) * page + position % page;
      std::memcpy(base + slot * bytes, src + r * bytes, bytes);
    }
}

Tensor tree_attention_(const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& tree_mask, const Tensor& page_table,
                       const Tensor& lengths, const Tensor& row_starts, const Tensor& moves, Tensor k_pages, Tensor v_pages, double scale,
                       int64_t window, double softcap, const std::optional<Tensor>& sinks) {
  TORCH_CHECK(k_pages.is_contiguous() && v_pages.is_contiguous() && moves.is_contiguous(), "specfx::tree_attention_: pools and moves must be contiguous");
  for (const Tensor& x : {k_, v_, k_pages, v_pages})
    TORCH_CHECK(x.scalar_type() == q_.scalar_type(), "specfx::tree_attention_: q is ", q_.scalar_type(), ", k, v or a pool is ", x.scalar_type());
  TORCH_CHECK(k_.sizes().slice(1) == k_pages.sizes().slice(2) && v_.sizes().slice(1) == v_pages.sizes().slice(2),
              "specfx::tree_attention_: rows of k ", k_.sizes(), " and v ", v_.sizes(), " don't fit the pools ", k_pages.sizes(), ", ", v_pages.sizes());
  const Tensor q = q_.contiguous(), k = k_.contiguous(), v = v_.contiguous();
  const Batch b = view(tree_mask, page_table, lengths, row_starts);
  append(k, k_pages, b, moves);
  append(v, v_pages, b, moves);
  Tensor out = at::empty({q.size(0), q.size(1), v.size(2)}, q.options());
  std::optional<Tensor> extra;
  if (sinks.has_value()) extra = sinks->to(at::kFloat).contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "tree_attention_", [&] {
    attend<scalar_t>(q, k_pages, v_pages, b, out, scale, window, softcap, extra ? extra->const_data_ptr<float>() : nullptr);
  });
  return out;
}

Tensor tree_positions(const std::optional<Tensor>& tree_mask, const Tensor& lengths, const Tensor& row_starts, const Tensor& input_ids) {
  const Batch b = view(tree_mask, Tensor(), lengths, row_starts);
  Tensor out = at::empty(input_ids.sizes(), input_ids.options().dtype(at::kLong));
  int64_t* position = out.mutable_data_ptr<int64_t>();
  for (int64_t s = 0; s < b.sequences; ++s) {
    const int64_t rows = b.starts[s + 1] - b.starts[s];
    for (int64_t i = 0; i < rows; ++i) position[b.starts[s] + i] = b.lengths[s] + b.depth(b.starts[s] + i, i, rows);
  }
  return out;
}

#ifdef SPECFX_AMX
struct __attribute__((packed)) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0, 1: sums of rows 0..15; 2, 3: of rows 16..31; 4, 5: inputs; 6, 7: weights.
void configure(int64_t upper, int64_t lower) {
  TileConfig c;
  const int64_t rows[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
  for (int i = 0; i < 8; ++i) {
    c.rows[i] = static_cast<uint8_t>(std::max<int64_t>(rows[i], 1));
    c.bytes[i] = 64;
  }
  _tile_loadconfig(&c);
}

Tensor packed_linear(const Tensor& x_, const Tensor& packed, const std::optional<Tensor>& bias, int64_t n) {
  const Tensor x = x_.contiguous();
  const int64_t k = x.size(-1), m = x.numel() / k, row_blocks = packed.size(1), column_blocks = packed.size(0);
  TORCH_CHECK(row_blocks * 32 == k, "specfx::packed_linear: the weight takes ", row_blocks * 32, " inputs, x has ", k);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && packed.scalar_type() == at::kBFloat16, "specfx::packed_linear: x and the weight must be bfloat16, are ",
              x.scalar_type(), " and ", packed.scalar_type());
  TORCH_CHECK(packed.is_contiguous() && n > (column_blocks - 1) * 32 && n <= column_blocks * 32, "specfx::packed_linear: the weight ", packed.sizes(),
              " is not contiguous or does not hold ", n, " columns");
  auto shape = x.sizes().vec();
  shape.back() = n;
  Tensor out = at::empty(shape, x.options());
  const uint16_t* X = static_cast<const uint16_t*>(x.const_data_ptr());
  const uint16_t* W = static_cast<const uint16_t*>(packed.const_data_ptr());
  uint16_t* Y = static_cast<uint16_t*>(out.mutable_data_ptr());
  std::optional<Tensor> wide;
  if (bias.has_value()) wide = bias->to(at::kFloat).contiguous();
  const float* B = wide ? wide->const_data_ptr<float>() : nullptr;
  at::parallel_for(0, column_blocks, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float sums[32 * 32];
    int64_t configured = 0;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t columns = std::min<int64_t>(32, n - block * 32);
      const __mmask32 store = columns == 32 ? ~__mmask32(0) : (__mmask32(1) << columns) - 1;
      alignas(64) float offset[32] = {};
      if (B) std::copy_n(B + block * 32, columns, offset);
      for (int64_t r = 0; r < m; r += 32) {
        const int64_t rows = std::min<int64_t>(32, m - r), upper = std::min<int64_t>(16, rows), lower = rows - upper;
        if (rows != configured) {
          configure(upper, lower);
          configured = rows;
        }
        const uint16_t *w = W + block * row_blocks * 1024, *a = X + r * k;
        _tile_zero(0);
        _tile_zero(1);
        if (lower) {
          _tile_zero(2);
          _tile_zero(3);
        }
        for (int64_t kb = 0; kb < row_blocks; ++kb, w += 1024, a += 32) {
          if (r == 0)
            for (int line = 0; line < 32; ++line) _mm_prefetch(reinterpret_cast<const char*>(w + 4096) + line * 64, _MM_HINT_T0);
          _tile_loadd(4, a, k * 2);
          _tile_loadd(6, w, 64);
          _tile_loadd(7, w + 512, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          if (lower) {
            _tile_loadd(5, a + 16 * k, k * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
          }
        }
        _tile_stored(0, sums, 128);
        _tile_stored(1, sums + 16, 128);
        if (lower) {
          _tile_stored(2, sums + 512, 128);
          _tile_stored(3, sums + 528, 128);
        }
        const __m512 o0 = _mm512_load_ps(offset), o1 = _mm512_load_ps(offset + 16);
        for (int64_t i = 0; i < rows; ++i) {
          const __m512 s0 = _mm512_add_ps(_mm512_load_ps(sums + i * 32), o0), s1 = _mm512_add_ps(_mm512_load_ps(sums + i * 32 + 16), o1);
          _mm512_mask_storeu_epi16(Y + (r + i) * n + block * 32, store, (__m512i)_mm512_cvtne2ps_pbh(s1, s0));
        }
      }
    }
    _tile_release();
  });
  return out;
}
#endif

}  // namespace

// 1: packed_linear runs here; 0: this build or this kernel has no AMX.
extern "C" int specfx_has_packed_linear() {
#ifdef SPECFX_AMX
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
  return 0;
#endif
}

TORCH_LIBRARY_IMPL(specfx, CPU, m) {
  m.impl("tree_attention_", &tree_attention_);
  m.impl("tree_positions", &tree_positions);
#ifdef SPECFX_AMX
  m.impl("packed_linear", &packed_linear);
#endif
}
