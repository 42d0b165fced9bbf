// A linear layer over a packed bfloat16 weight, on AMX tiles or AVX-512 vectors: one pass over the weight serves all rows of a draft tree.
#pragma once

#include "common.h"

#ifdef SPECFX_DOT
namespace specfx {

// y [m, n] = x [m, k] @ weight (packed as kernels/packed_linear.py says: blocks of 32 columns, in them blocks of 32 rows) + bias [n].
struct PackedLinear {
  const uint16_t *x, *weight;
  const float* bias;
  uint16_t* y;
  int64_t m, n, k, row_blocks;

  const uint16_t* block_of(int64_t block) const { return weight + block * row_blocks * 1024; }

  // Sums [rows, 32] of a column block on their way to y: its columns that exist, and their bias. stored: rows that are there.
  struct Leaving {
    const float* sums = nullptr;
    int64_t block = 0, row = 0, rows = 0, stored = 0;
    __mmask32 columns = 0;
    __m512 left{}, right{};
  };

  Leaving leaving(int64_t block, int64_t row, int64_t rows, const float* sums) const {
    const int64_t columns = std::min<int64_t>(32, n - block * 32);
    alignas(64) float offset[32] = {};
    if (bias) std::copy_n(bias + block * 32, columns, offset);
    return {sums, block, row, rows, 0, columns == 32 ? ~__mmask32(0) : (__mmask32(1) << columns) - 1, _mm512_load_ps(offset), _mm512_load_ps(offset + 16)};
  }

  // Add the bias, round, and store so many rows more, as far as there are any.
  void store_some(Leaving& out, int64_t count) const {
    for (const int64_t end = std::min(out.rows, out.stored + count); out.stored < end; ++out.stored) {
      const float* sums = out.sums + out.stored * 32;
      const __m512 left = _mm512_add_ps(_mm512_load_ps(sums), out.left), right = _mm512_add_ps(_mm512_load_ps(sums + 16), out.right);
      _mm512_mask_storeu_epi16(y + (out.row + out.stored) * n + out.block * 32, out.columns, (__m512i)_mm512_cvtne2ps_pbh(right, left));
    }
  }

  void finish(int64_t block, int64_t row, int64_t rows, const float* sums) const {
    Leaving out = leaving(block, row, rows, sums);
    store_some(out, rows);
  }
};

// On vectors (AVX-512 BF16): a vector holds one pair of inputs' weights for 16 columns, and serves a group of rows from the registers.
struct OnVectors : PackedLinear {
  static constexpr int64_t kRows = 14;  // of a group: 28 vectors of sums, two of weights and one of inputs

  // Column blocks `begin` to `end`. Meanwhile what comes next is fetched into the second cache, for one group of rows from a little ahead, for
  // several the next column block, a part with each: what limits few rows is reading the weights, many rows arithmetic, and so neither waits.
  void run(int64_t begin, int64_t end) const {
    const int64_t groups = (m + kRows - 1) / kRows, ahead = groups == 1 ? 4096 : row_blocks * 1024;
    for (int64_t block = begin; block < end; ++block)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t row = m * g / groups;
        of_height<kRows>(block, row, m * (g + 1) / groups - row, ahead, row_blocks * g / groups, row_blocks * (g + 1) / groups);
      }
  }

  template <int64_t height>
  void of_height(int64_t block, int64_t row, int64_t rows, int64_t ahead, int64_t from, int64_t to) const {
    if constexpr (height > 1)
      if (rows < height) return of_height<height - 1>(block, row, rows, ahead, from, to);
    group<height>(block, row, ahead, from, to);
  }

  // from, to: the row blocks with which those are fetched that lie `ahead` numbers further on.
  template <int64_t rows>
  void group(int64_t block, int64_t row, int64_t ahead, int64_t from, int64_t to) const {
    const uint16_t *w = block_of(block), *a = x + row * k;
    __m512 left[rows], right[rows];
    for (int64_t r = 0; r < rows; ++r) left[r] = right[r] = _mm512_setzero_ps();
    for (int64_t kb = 0; kb < row_blocks; ++kb, w += 1024, a += 32) {
      const bool fetches = kb >= from && kb < to;
      const char* next = reinterpret_cast<const char*>(w + ahead);
#pragma GCC unroll 4
      for (int64_t pair = 0; pair < 16; ++pair) {
        if (fetches) {  // a little at a time: many at once would keep the weights at hand waiting
          _mm_prefetch(next + pair * 128, _MM_HINT_T1);
          _mm_prefetch(next + pair * 128 + 64, _MM_HINT_T1);
        }
        const __m512bh first = (__m512bh)_mm512_loadu_si512(w + pair * 64), second = (__m512bh)_mm512_loadu_si512(w + pair * 64 + 32);
#pragma GCC unroll 14
        for (int64_t r = 0; r < rows; ++r) {
          int32_t both;
          std::memcpy(&both, a + r * k + pair * 2, sizeof both);
          const __m512bh inputs = (__m512bh)_mm512_set1_epi32(both);
          left[r] = _mm512_dpbf16_ps(left[r], first, inputs);
          right[r] = _mm512_dpbf16_ps(right[r], second, inputs);
        }
      }
    }
    alignas(64) float sums[rows * 32];
    for (int64_t r = 0; r < rows; ++r) {
      _mm512_store_ps(sums + r * 32, left[r]);
      _mm512_store_ps(sums + r * 32 + 16, right[r]);
    }
    finish(block, row, rows, sums);
  }
};

#ifdef SPECFX_AMX
// On tiles (AMX): each load of the weight serves 16 rows.
struct OnTiles : PackedLinear {
  // Column blocks `begin` to `end`, in groups of 32 rows, or one of up to 48: what one group adds up to is stored while the tiles work on the next.
  void run(int64_t begin, int64_t end) const {
    alignas(64) float sums[2][48 * 32];
    Leaving out;
    int64_t configured = 0, turn = 0;
    const int64_t groups = m <= 48 ? 1 : (m + 31) / 32;
    for (int64_t block = begin; block < end; ++block)
      for (int64_t g = 0; g < groups; ++g, turn ^= 1) {
        const int64_t row = g * 32, rows = groups == 1 ? m : std::min<int64_t>(32, m - row), upper = std::min<int64_t>(16, rows);
        if (rows > 32 && rows != configured) configure_tiles({16, 16, 16, 16, 16, 16, 16, 16});
        if (rows <= 32 && rows != configured) configure_tiles({upper, upper, rows - upper, rows - upper, upper, rows - upper, 16, 16});
        configured = rows;
        if (rows > 32)
          tall_column(block, sums[turn], out);
        else
          column(block, g, groups, rows, sums[turn], out);
        store_some(out, out.rows);
        out = leaving(block, row, rows, sums[turn]);
      }
    store_some(out, out.rows);
    _tile_release();
  }

  // Tiles 0, 1: sums of rows 0..15; 2, 3: of rows 16..31; 4, 5: inputs; 6, 7: weights. Meanwhile `out` is stored, and what comes next is
  // fetched into the second cache. One group of rows waits for memory: it fetches the quarters of a block from four places 4.5 blocks apart, which
  // are served faster than one (over the blocks, each quarter is fetched once). Several groups fetch the next column block: up to four
  // groups a share of each block's lines, more a share of the blocks.
  void column(int64_t block, int64_t g, int64_t groups, int64_t rows, float* sums, Leaving& out) const {
    const uint16_t *w = block_of(block), *a = x + g * 32 * k;
    const int64_t ahead = groups == 1 ? kApart : row_blocks * 1024, apart = groups == 1 ? kApart : 0;
    const bool each = groups <= 4;
    const int64_t shares = each ? 8 : row_blocks, from = shares * g / groups, to = shares * (g + 1) / groups;
    const int64_t leave = (31 + row_blocks) / row_blocks;
    const bool lower = rows > 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t kb = 0; kb < row_blocks; ++kb, w += 1024, a += 32) {
      const int64_t line = each ? from : 0, end = each ? to : kb >= from && kb < to ? 8 : 0;
      const uint16_t* next = w + ahead;
      fetch(next, line, end);  // a little at a time: many at once would keep the weights at hand waiting
      _tile_loadd(6, w, 128);
      fetch(next + apart + 256, line, end);
      _tile_loadd(7, w + 32, 128);
      fetch(next + apart * 2 + 512, line, end);
      _tile_loadd(4, a, k * 2);
      _tile_dpbf16ps(0, 4, 6);
      fetch(next + apart * 3 + 768, line, end);
      _tile_dpbf16ps(1, 4, 7);
      if (lower) {
        _tile_loadd(5, a + 16 * k, k * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      store_some(out, leave);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    if (lower) {
      _tile_stored(2, sums + 512, 128);
      _tile_stored(3, sums + 528, 128);
    }
  }

  // All of 33 to 48 rows in one pass over the weight, as memory is what they wait for: with each half of the columns all inputs are loaded again.
  // The last 16 rows may be among those before too. Tiles 0, 1, 2 and 3, 4, 5: sums of the left and right half; 6: weights; 7: inputs.
  void tall_column(int64_t block, float* sums, Leaving& out) const {
    const uint16_t *w = block_of(block), *a = x;
    const int64_t last = m - 16, leave = (47 + row_blocks) / row_blocks;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    for (int64_t kb = 0; kb < row_blocks; ++kb, w += 1024, a += 32) {
      fetch(w + kApart, 0, 8);
      _tile_loadd(6, w, 128);
      _tile_loadd(7, a, k * 2);
      _tile_dpbf16ps(0, 7, 6);
      fetch(w + kApart * 2 + 256, 0, 8);
      _tile_loadd(7, a + 16 * k, k * 2);
      _tile_dpbf16ps(1, 7, 6);
      _tile_loadd(7, a + last * k, k * 2);
      _tile_dpbf16ps(2, 7, 6);
      fetch(w + kApart * 3 + 512, 0, 8);
      _tile_loadd(6, w + 32, 128);
      _tile_dpbf16ps(5, 7, 6);
      _tile_loadd(7, a, k * 2);
      _tile_dpbf16ps(3, 7, 6);
      fetch(w + kApart * 4 + 768, 0, 8);
      _tile_loadd(7, a + 16 * k, k * 2);
      _tile_dpbf16ps(4, 7, 6);
      store_some(out, leave);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16 * 32, 128);
    _tile_stored(2, sums + last * 32, 128);
    _tile_stored(3, sums + 16, 128);
    _tile_stored(4, sums + 16 * 32 + 16, 128);
    _tile_stored(5, sums + last * 32 + 16, 128);
  }

  static constexpr int64_t kApart = 4608;

  // Cache lines `line` to `end` of the 8 of a quarter of a block of 32 inputs and columns.
  static void fetch(const uint16_t* quarter, int64_t line, int64_t end) {
    const char* place = reinterpret_cast<const char*>(quarter);
    if (end - line == 8)
#pragma GCC unroll 8
      for (int64_t i = 0; i < 8; ++i) _mm_prefetch(place + i * 64, _MM_HINT_T1);
    else
      for (int64_t i = line; i < end; ++i) _mm_prefetch(place + i * 64, _MM_HINT_T1);
  }
};
#endif

inline Tensor packed_linear(const Tensor& x_, const Tensor& packed, const std::optional<Tensor>& bias, int64_t n) {
  const Tensor x = x_.contiguous();
  const int64_t k = x.size(-1), m = x.numel() / k, row_blocks = packed.size(1), column_blocks = packed.size(0);
  TORCH_CHECK(row_blocks * 32 == k, "specfx::packed_linear: the weight takes ", row_blocks * 32, " inputs, x has ", k);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && packed.scalar_type() == at::kBFloat16, "specfx::packed_linear: x and the weight must be bfloat16, are ",
              x.scalar_type(), " and ", packed.scalar_type());
  TORCH_CHECK(packed.is_contiguous() && n > (column_blocks - 1) * 32 && n <= column_blocks * 32, "specfx::packed_linear: the weight ", packed.sizes(),
              " is not contiguous or does not hold ", n, " columns");
  TORCH_CHECK(!bias.has_value() || bias->numel() == n, "specfx::packed_linear: the bias has ", bias->numel(), " columns of ", n);
  auto shape = x.sizes().vec();
  shape.back() = n;
  Tensor out = at::empty(shape, x.options());
  std::optional<Tensor> wide;
  if (bias.has_value()) wide = bias->to(at::kFloat).contiguous();
  const PackedLinear linear{static_cast<const uint16_t*>(x.const_data_ptr()), static_cast<const uint16_t*>(packed.const_data_ptr()),
                            wide ? wide->const_data_ptr<float>() : nullptr, static_cast<uint16_t*>(out.mutable_data_ptr()), m, n, k, row_blocks};
  if (m == 0) return out;
  at::parallel_for(0, column_blocks, 1, [&](int64_t begin, int64_t end) {
#ifdef SPECFX_AMX
    if (has_tiles()) return OnTiles{linear}.run(begin, end);
#endif
    OnVectors{linear}.run(begin, end);
  });
  return out;
}

}  // namespace specfx
#endif
