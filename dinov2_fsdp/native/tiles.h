// Products of bfloat16 in the tiles of AMX: registers of 16 rows by 64 bytes, a thousand multiplications each 16 cycles.
//
// What stands on the right lies in panels whose pairs of rows are interleaved (panels.h): 32 rows of half a panel are a
// tile as they lie there. What stands on the left is read by rows, 32 values of each.

#pragma once

#include "common.h"

#ifdef __AMX_BF16__

namespace {

constexpr Index kSide = 16;  // rows of a tile, and its columns of sums
constexpr Index kDeep = 32;  // values of a row of a tile

// The calling thread has tiles as long as this lives.
class TilesInUse {
 public:
  TilesInUse() {
    struct alignas(64) {
      std::uint8_t palette = 1, start = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {};
      std::uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) {
      shape.bytes[i] = 64;
      shape.rows[i] = kSide;
    }
    asm volatile("" ::: "memory");  // GCC 12 takes what it reads for eight bytes
    _tile_loadconfig(&shape);
  }
  ~TilesInUse() { _tile_release(); }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
};

// c = kDown · 16 rows of a · kAcross · 16 columns of a panel, `chunks` · 32 deep: four tiles of sums need two of each
// side, so that a tile that is loaded is multiplied twice. a's rows lie `a_row` apart, the second sixteen `a_second`
// behind the first, and the next 32 values `a_chunk`. `beside()` is called with every 32: the processor works at it at
// the same time, as tiles have a unit of their own.
template <int kDown, int kAcross, typename Beside>
inline void squares(const BFloat16* a, Index a_row, Index a_second, Index a_chunk, const BFloat16* panel, Index chunks,
                    float* c, Index c_row, const Beside& beside) {
  constexpr Index kPanelRow = 128;  // bytes of a pair of rows
  const Index row = a_row * static_cast<Index>(sizeof(BFloat16)), sums = c_row * static_cast<Index>(sizeof(float));
  asm volatile("" ::: "memory");  // the compiler does not know that tiles are loaded from memory
  _tile_zero(0);
  if constexpr (kAcross > 1) _tile_zero(1);
  if constexpr (kDown > 1) _tile_zero(2);
  if constexpr (kDown > 1 && kAcross > 1) _tile_zero(3);
  for (; chunks > 0; --chunks, a += a_chunk, panel += kDeep * 2 * kSide) {
    _tile_loadd(4, a, row);
    _tile_loadd(6, panel, kPanelRow);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kAcross > 1) {
      _tile_loadd(7, panel + 2 * kSide, kPanelRow);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kDown > 1) {
      _tile_loadd(5, a + a_second, row);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kAcross > 1) _tile_dpbf16ps(3, 5, 7);
    }
    beside();
  }
  _tile_stored(0, c, sums);
  if constexpr (kAcross > 1) _tile_stored(1, c + kSide, sums);
  if constexpr (kDown > 1) _tile_stored(2, c + kSide * c_row, sums);
  if constexpr (kDown > 1 && kAcross > 1) _tile_stored(3, c + kSide * c_row + kSide, sums);
}

}  // namespace

#endif
