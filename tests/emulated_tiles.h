// AMX tiles in plain C++, so that the kernels that run on them are checked on a CPU that has none. To be included before everything else
// (`-include`). As the instructions do, loads fill up with zeros; what they would refuse (shapes that don't fit) aborts.
#pragma once

#include <immintrin.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define syscall(...) 0L  // the system grants the tiles

namespace emulated {

struct Tile {
  int rows = 0, bytes = 0;
  alignas(64) uint8_t line[16][64] = {};
};
inline thread_local Tile tile[8];
inline std::atomic<long> products{0};

inline void require(bool fits) {
  if (!fits) std::abort();
}

// The layout of the 64 bytes: palette, start row, 14 reserved, bytes of a row of 16 tiles (2 each), rows of 16 tiles.
inline void configure(const void* config) {
  const uint8_t* c = static_cast<const uint8_t*>(config);
  require(c[0] == 1 && c[1] == 0);
  for (int i = 0; i < 8; ++i) {
    tile[i] = Tile{};
    tile[i].bytes = c[16 + 2 * i] | c[17 + 2 * i] << 8;
    tile[i].rows = c[48 + i];
    require(tile[i].rows <= 16 && tile[i].bytes <= 64);
  }
}

inline void release() {
  for (Tile& t : tile) t = Tile{};
}

inline void zero(int t) {
  require(tile[t].rows > 0);
  std::memset(tile[t].line, 0, sizeof tile[t].line);
}

inline void load(int t, const void* base, int64_t stride) {
  zero(t);
  for (int i = 0; i < tile[t].rows; ++i) std::memcpy(tile[t].line[i], static_cast<const char*>(base) + i * stride, tile[t].bytes);
}

inline void stored(int t, void* base, int64_t stride) {
  require(tile[t].rows > 0);
  for (int i = 0; i < tile[t].rows; ++i) std::memcpy(static_cast<char*>(base) + i * stride, tile[t].line[i], tile[t].bytes);
}

inline float wide(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// sums [rows, n] += a [rows, k] @ b, where b holds pairs of k: [k / 2, n, 2].
inline void product(int sums, int a, int b) {
  Tile &s = tile[sums], &x = tile[a], &y = tile[b];
  require(s.rows == x.rows && s.bytes == y.bytes && x.bytes == 4 * y.rows && s.rows > 0);
  for (int i = 0; i < s.rows; ++i)
    for (int j = 0; j < s.bytes / 4; ++j) {
      float sum;
      std::memcpy(&sum, s.line[i] + 4 * j, 4);
      for (int pair = 0; pair < y.rows; ++pair) {
        uint16_t p[2], q[2];
        std::memcpy(p, x.line[i] + 4 * pair, 4);
        std::memcpy(q, y.line[pair] + 4 * j, 4);
        sum += wide(p[0]) * wide(q[0]);
        sum += wide(p[1]) * wide(q[1]);
      }
      std::memcpy(s.line[i] + 4 * j, &sum, 4);
    }
  ++products;
}

}  // namespace emulated

extern "C" long products_on_emulated_tiles() { return emulated::products; }

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated::configure(config)
#define _tile_release() emulated::release()
#define _tile_zero(t) emulated::zero(t)
#define _tile_loadd(t, base, stride) emulated::load(t, base, stride)
#define _tile_stored(t, base, stride) emulated::stored(t, base, stride)
#define _tile_dpbf16ps(sums, a, b) emulated::product(sums, a, b)
