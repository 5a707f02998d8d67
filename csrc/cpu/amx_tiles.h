// AMX tiles as functions of a constant tile number. FASTCNN_EMULATE_AMX computes the same in plain C++, so
// that the kernels over them are tested on machines without AMX.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/vec.h"

namespace fastcnn {
namespace {

constexpr int kTileRows = 16, kTileWords = 16;  // 16 rows of 64 bytes: 16 floats, or 16 pairs of bf16

#ifdef FASTCNN_EMULATE_AMX

inline float (*emulated_tile(int tile)) [kTileWords] {
  thread_local float tiles[8][kTileRows][kTileWords];
  return tiles[tile];
}

class TileSession {};

template <int kTile>
void tile_zero() {
  std::memset(emulated_tile(kTile), 0, sizeof(float) * kTileRows * kTileWords);
}
template <int kTile>
void tile_load(const void* p, int64_t row_bytes) {
  for (int r = 0; r < kTileRows; ++r)
    std::memcpy(emulated_tile(kTile)[r], static_cast<const char*>(p) + r * row_bytes, 4 * kTileWords);
}
template <int kTile>
void tile_store(float* p, int64_t row_words) {
  for (int r = 0; r < kTileRows; ++r) std::memcpy(p + r * row_words, emulated_tile(kTile)[r], 4 * kTileWords);
}
template <int kC, int kA, int kB>
void tile_dot() {
  for (int r = 0; r < kTileRows; ++r)
    for (int word = 0; word < kTileWords; ++word) {
      bf16 a[2];
      std::memcpy(a, &emulated_tile(kA)[r][word], 4);
      for (int column = 0; column < kTileWords; ++column) {
        bf16 b[2];
        std::memcpy(b, &emulated_tile(kB)[word][column], 4);
        emulated_tile(kC)[r][column] += to_float(a[0]) * to_float(b[0]) + to_float(a[1]) * to_float(b[1]);
      }
    }
}

#else

// Configures this thread's tiles for as long as it lives. Other libraries configure them too, so nothing is
// kept between two sessions; released tiles cost a context switch nothing.
class TileSession {
 public:
  TileSession() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    // Not _tile_loadconfig: GCC 12 drops the stores to the struct, for want of the memory operand given here.
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~TileSession() { asm volatile("tilerelease" ::: "memory"); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
inline void tile_load(const void* p, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(float* p, int64_t row_words) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_words * 4), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

#endif

// One step of a 2 x 2 block of accumulators (tiles 0 to 3) over 16 words of the reduction; tiles 4, 5 take
// A's rows, any number of bytes apart, 6, 7 take B's panels. With kRowTiles or kPanels 1 the other half is
// left out. A tile is cleared after its last use: where another thread works on the core's other half, a load
// into a tile that was read waits, and a step takes 88 ns, with cleared ones 64 (dot products alone 56); else
// 23 both ways.
template <int kRowTiles, int kPanels>
inline void block_step(const void* a, int64_t a_bytes, const float* b, int64_t b_row, int64_t b_panel) {
  tile_load<4>(a, a_bytes);
  if constexpr (kRowTiles == 2) tile_load<5>(static_cast<const char*>(a) + kTileRows * a_bytes, a_bytes);
  tile_load<6>(b, b_row * 4);
  if constexpr (kPanels == 2) tile_load<7>(b + b_panel, b_row * 4);
  tile_dot<0, 4, 6>();
  if constexpr (kPanels == 2) tile_dot<1, 4, 7>();
  tile_zero<4>();
  if constexpr (kRowTiles == 2) tile_dot<2, 5, 6>();
  tile_zero<6>();
  if constexpr (kRowTiles == 2 && kPanels == 2) tile_dot<3, 5, 7>();
  if constexpr (kRowTiles == 2) tile_zero<5>();
  if constexpr (kPanels == 2) tile_zero<7>();
}

inline void block_zero() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}

// Reads the block from c [32][ldc].
template <int kRowTiles, int kPanels>
inline void block_load(const float* c, int64_t ldc) {
  tile_load<0>(c, ldc * 4);
  if constexpr (kPanels == 2) tile_load<1>(c + kTileWords, ldc * 4);
  if constexpr (kRowTiles == 2) {
    tile_load<2>(c + kTileRows * ldc, ldc * 4);
    if constexpr (kPanels == 2) tile_load<3>(c + kTileRows * ldc + kTileWords, ldc * 4);
  }
}

// Writes the block to c [32][ldc].
template <int kRowTiles, int kPanels>
inline void block_store(float* c, int64_t ldc) {
  tile_store<0>(c, ldc);
  if constexpr (kPanels == 2) tile_store<1>(c + kTileWords, ldc);
  if constexpr (kRowTiles == 2) {
    tile_store<2>(c + kTileRows * ldc, ldc);
    if constexpr (kPanels == 2) tile_store<3>(c + kTileRows * ldc + kTileWords, ldc);
  }
}

// Calls f with the block's shape as constants.
template <class F>
void with_block_shape(int64_t rows, int64_t panels, const F& f) {
  if (rows > kTileRows && panels == 2)
    return f(std::integral_constant<int, 2>{}, std::integral_constant<int, 2>{});
  if (rows > kTileRows) return f(std::integral_constant<int, 2>{}, std::integral_constant<int, 1>{});
  if (panels == 2) return f(std::integral_constant<int, 1>{}, std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 1>{}, std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace fastcnn
