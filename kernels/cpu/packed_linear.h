// A linear layer over a weight packed for AMX bf16 tiles: one pass over the weight serves up to 32 rows.
// Tiles 0, 1: sums of rows 0..15; 2, 3: of rows 16..31; 4, 5: inputs; 6, 7: weights.
#pragma once

#include "common.h"

#ifdef SPECFX_AMX
namespace specfx {

inline Tensor packed_linear(const Tensor& x_, const Tensor& packed, const std::optional<Tensor>& bias, int64_t n) {
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
          configure_tiles({upper, upper, lower, lower, upper, lower, 16, 16});
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

}  // namespace specfx
#endif
