// What the CPU kernels share: the batch of ragged rows, vectors of 16 floats, and what bfloat16 instructions this build has.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define SPECFX_DOT 1
#include <immintrin.h>
#endif
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(SPECFX_DOT)
#define SPECFX_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace specfx {

using at::Tensor;
constexpr int64_t kMaskBits = 64;
constexpr int64_t kLanes = 16;  // floats of a vector, and most queries (pairs of row and head) of a work item
constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();  // of scores: where all are hidden, their weights are zero, not NaN
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
  int64_t parent(int64_t row, int64_t i, int64_t rows) const {  // among the rows of the sequence, -1 for the first
    if (causal(rows)) return i - 1;
    const uint64_t above = static_cast<uint64_t>(mask[row]) & ((uint64_t{1} << i) - 1);
    return above == 0 ? -1 : 63 - __builtin_clzll(above);
  }
};

Batch view(const std::optional<Tensor>& mask, const Tensor& table, const Tensor& lengths, const Tensor& starts) {
  for (const Tensor& x : {mask.value_or(Tensor()), table, lengths, starts})
    TORCH_CHECK(!x.defined() || x.is_contiguous(), "specfx: tree_mask, page_table, lengths and row_starts must be contiguous");
  return {mask.has_value() ? mask->const_data_ptr<int64_t>() : nullptr, table.defined() ? table.const_data_ptr<int32_t>() : nullptr,
          lengths.const_data_ptr<int32_t>(), starts.const_data_ptr<int32_t>(), lengths.size(0), table.defined() ? table.size(1) : 0};
}

#ifdef SPECFX_AMX
// Ask the kernel for the tile registers, once for the process; false where it has none to give.
inline bool has_tiles() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return granted;
}

struct __attribute__((packed)) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// All eight tiles 64 bytes wide, with so many rows each.
inline void configure_tiles(const int64_t (&rows)[8]) {
  TileConfig c;
  for (int i = 0; i < 8; ++i) {
    c.rows[i] = static_cast<uint8_t>(std::max<int64_t>(rows[i], 1));
    c.bytes[i] = 64;
  }
  _tile_loadconfig(&c);
}
#endif

}  // namespace specfx
