// The matrix-product core: tiles of packed A rows times panels of packed B, accumulated in registers.
//
// A and B are stored as 4-byte words along the reduction: one float, or a pair of bf16 that a dot-product
// instruction takes at once. The tile loops and layouts are then the same for both.
//   A tile   [ceil(words / kBlock)][rows][kPitch]: row-major, in blocks of the reduction (RowLayout); the
//            fixed row pitch makes every broadcast of a microtile one base register plus a constant.
//   B packed [ceil(n / kLanes)][words][kLanes]: panels one vector wide.
#pragma once

#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "ops/pointwise.h"

namespace fastcnn {
namespace {

constexpr int kBlockWords = 256;
// 1088 bytes: no two rows of a microtile fall on the same L1 set, as they would with a power of two.
constexpr int kRowWords = kBlockWords + 16;

// Rows x vectors of accumulators: 14 x 2 of 32 registers, 6 x 2 of 16. A quarter-empty microtile of few rows
// would be bound by latency: up to kWideRows rows take kWideVectors panels at once.
#if FASTCNN_ISA_LEVEL >= 2
constexpr int kMicroRows = 14, kMicroVectors = 2, kWideRows = 6, kWideVectors = 4;
#else
constexpr int kMicroRows = 6, kMicroVectors = 2, kWideRows = 3, kWideVectors = 4;
#endif

struct FloatWords {
  static constexpr int kPerWord = 1;
  static V step(V acc, V a, V b) { return fmadd(a, b, acc); }
};

#if FASTCNN_ISA_LEVEL >= 3
struct PairWords {
  static constexpr int kPerWord = 2;
  static V step(V acc, V a, V b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
};
#endif

#if FASTCNN_ISA_LEVEL >= 3
// Words of two rows' values: `low` in the lower half of each, `high` in the upper.
inline void store_pairs(float* p, V low, V high) {
  // Both rows rounded into one vector of halves, then dealt out alternately.
  alignas(64) static constexpr uint16_t kDeal[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                     21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kDeal), halves));
}
#endif

// How rows of words lie in a tile of operands.
template <class Words>
struct RowLayout {
  static constexpr int kBlock = kBlockWords, kPitch = kRowWords;
  // Between a block and the next, in rows.
  static int64_t distance(int64_t rows) { return rows; }
};

#if FASTCNN_ISA_LEVEL >= 4
// As AMX loads them: 16 rows of 16 words side by side, which the prefetchers follow; 1088 bytes apart a
// product takes 7 % longer. An odd number of rows keeps a row's blocks off the same L1 set.
template <>
struct RowLayout<PairWords> {
  static constexpr int kBlock = 16, kPitch = 16;
  static int64_t distance(int64_t rows) { return (rows + 31) / 32 * 32 + 1; }
};
#endif

template <class T>
struct WordsOf {
  using type = FloatWords;
};
#if FASTCNN_ISA_LEVEL >= 3
template <>
struct WordsOf<bf16> {
  using type = PairWords;
};
#endif

// Whether products of these words run on AMX tiles.
template <class Words>
constexpr bool kHasTiles = FASTCNN_ISA_LEVEL >= 4 && Words::kPerWord == 2;

// Words of a reduction over k elements; AMX tiles take 16 at a time.
template <class Words>
int64_t reduction_words(int64_t k) {
  int64_t words = ceil_div(k, Words::kPerWord);
#if FASTCNN_ISA_LEVEL >= 4
  if (Words::kPerWord == 2) words = round_up(words, 16);
#endif
  return words;
}

// acc[row][panel] += sum_k a[row * kARow + k * kAStep] * b[k * b_step + panel * b_panel + lane]
template <class Words, int kRows, int kVectors, int kARow, int kAStep>
inline void accumulate_products(V (&acc)[kRows][kVectors], const float* a, const float* b, int64_t b_step,
                                int64_t b_panel, int64_t words) {
  for (int64_t k = 0; k < words; ++k) {
    V bv[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) bv[v] = load(b + v * b_panel);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V av = set(a[r * kARow]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Words::step(acc[r][v], av, bv[v]);
    }
    a += kAStep;
    b += b_step;
  }
}

// c[row * ldc + column] (+)= the same.
template <class Words, int kRows, int kVectors, int kARow, int kAStep>
inline void microtile(const float* a, const float* b, int64_t b_step, int64_t b_panel, int64_t words,
                      float* c, int64_t ldc, bool accumulate) {
  V acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = accumulate ? load(c + r * ldc + v * kLanes) : zero();
  accumulate_products<Words, kRows, kVectors, kARow, kAStep>(acc, a, b, b_step, b_panel, words);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
}

// A sink that can also take a whole microtile from its accumulators, without a detour through memory. A
// product of few words stores as often as it multiplies, so the detour would cost it a third of its time.
struct RegisterSink {};

template <class Words, int kRows, int kVectors, int kARow, int kAStep>
void microtile_of_rows(int rows, const float* a, const float* b, int64_t b_step, int64_t b_panel,
                       int64_t words, float* c, int64_t ldc, bool accumulate) {
  if (rows == kRows)
    return microtile<Words, kRows, kVectors, kARow, kAStep>(a, b, b_step, b_panel, words, c, ldc, accumulate);
  if constexpr (kRows > 1)
    microtile_of_rows<Words, kRows - 1, kVectors, kARow, kAStep>(rows, a, b, b_step, b_panel, words, c, ldc,
                                                                 accumulate);
}

// Calls f(first, count) for near-equal pieces of [0, total), none larger than `most`: 49 rows as 13+12+12+12.
template <class F>
void for_each_piece(int64_t total, int64_t most, const F& f) {
  const int64_t pieces = ceil_div(total, most);
  int64_t first = 0;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t count = (total - first) / (pieces - i) + ((total - first) % (pieces - i) != 0);
    f(first, count);
    first += count;
  }
}

// A packed B as its kernels see it.
template <class Words>
struct PackedView {
  const float* data;
  int64_t words;

  PackedView(const void* packed, int64_t k)
      : data(static_cast<const float*>(packed)), words(reduction_words<Words>(k)) {}
  int64_t panel_stride() const { return words * kLanes; }
  const float* panel(int64_t index) const { return data + index * panel_stride(); }
};

// A vector of channels, or two side by side, as words of the reduction.
template <class Words>
void store_channels(float* words, V v) {
  if constexpr (Words::kPerWord == 1)
    store(words, v);
  else
    store(reinterpret_cast<bf16*>(words), v);
}
template <class Words>
void store_channels(float* words, V low, V high) {
  if constexpr (Words::kPerWord == 1)
    store_two(words, low, high);
  else
    store_two(reinterpret_cast<bf16*>(words), low, high);
}

// An A tile being written, one vector of consecutive channels of one row at a time.
template <class Words>
struct TileWriter {
  using Layout = RowLayout<Words>;
  float* tile;
  int64_t rows;  // of the whole tile

  static TileWriter in_scratch(int64_t rows, int64_t words);
  static constexpr int64_t row_words() { return Layout::kPitch; }
  float* at(int64_t row, int64_t word) const {
    return tile + (word / Layout::kBlock * Layout::distance(rows) + row) * Layout::kPitch +
           word % Layout::kBlock;
  }
  // Channels [k, k + kLanes) of a row; lanes past the last channel must be zero.
  void put(int64_t row, int64_t k, V v) const { store_channels<Words>(at(row, k / Words::kPerWord), v); }
  // Channels [k, k + 2 * kLanes).
  void put(int64_t row, int64_t k, V low, V high) const {
    store_channels<Words>(at(row, k / Words::kPerWord), low, high);
  }
  // Zeroes what the reduction reads beyond the last vector of channels.
  void pad(int64_t row, int64_t k) const {
    for (int64_t next = round_up(k, kLanes); next < reduction_words<Words>(k) * Words::kPerWord;
         next += kLanes)
      put(row, next, zero());
  }
};

template <class Words>
int64_t tile_floats(int64_t rows, int64_t words) {
  using Layout = RowLayout<Words>;
  return ceil_div(words, Layout::kBlock) * Layout::distance(round_up(rows, 32)) * Layout::kPitch;
}

template <class Words>
TileWriter<Words> TileWriter<Words>::in_scratch(int64_t rows, int64_t words) {
  return {thread_scratch(size_t(tile_floats<Words>(rows, words))), rows};
}

// Words between neighbouring rows that are whole: an odd number of cache lines, so that no two rows of a
// microtile fall on the same L1 set.
inline int64_t odd_lines(int64_t words) {
  const int64_t lines = ceil_div(words, 16);
  return (lines + (lines % 2 == 0)) * 16;
}

#if FASTCNN_ISA_LEVEL >= 4
// Whole rows one after the other, which AMX loads as well as a tile's: for what is written row by row.
struct WholeRows {
  float* rows;
  int64_t pitch;

  static WholeRows in_scratch(int64_t rows, int64_t words) {
    const int64_t pitch = odd_lines(words);
    return {thread_scratch(size_t((round_up(rows, 32) + 1) * pitch)), pitch};
  }
  float* at(int64_t row, int64_t word) const { return rows + row * pitch + word; }
  int64_t row_words() const { return pitch; }
};
#endif

}  // namespace
}  // namespace fastcnn

#if FASTCNN_ISA_LEVEL >= 4
#include "cpu/amx.h"
#endif

namespace fastcnn {
namespace {

// Results of one block of a product on their way to the epilogue: c [rows][ldc], at most kMaxBlock floats.
constexpr int64_t kMaxBlock = 32 * 64;

template <class Words, class Sink>
void microtile_to(const float* a, const PackedView<Words>& b, int64_t panel, const Sink& sink, int64_t row) {
  V acc[kMicroRows][kMicroVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kMicroRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kMicroVectors; ++v) acc[r][v] = zero();
  accumulate_products<Words, kMicroRows, kMicroVectors, kRowWords, 1>(acc, a, b.panel(panel), kLanes,
                                                                      b.panel_stride(), b.words);
  sink.tile(acc, row, panel * kLanes);
}

// Multiplies rows [0, rows) of an A tile by panels [first, last) of B; sink(c, ldc, row, rows, column,
// columns).
template <class Rows, class Words, class Sink>
void multiply_tile(const Rows& a, int64_t rows, const PackedView<Words>& b, int64_t first, int64_t last,
                   const Sink& sink) {
#if FASTCNN_ISA_LEVEL >= 4
  if constexpr (Words::kPerWord == 2) return amx_multiply_tile(a, rows, b, first, last, sink);
#endif
  alignas(64) float c[kMaxBlock];
  const bool wide = rows <= kWideRows;
  const int64_t vectors = wide ? kWideVectors : kMicroVectors, ldc = vectors * kLanes;
  for (int64_t panel = first; panel < last;) {
    const int64_t count = last - panel < vectors ? 1 : vectors;
    int64_t done = 0;
    if constexpr (std::is_base_of_v<RegisterSink, Sink>) {
      if (count == kMicroVectors && b.words <= kBlockWords && sink.takes(panel * kLanes, count * kLanes))
        for (; done + kMicroRows <= rows; done += kMicroRows)
          microtile_to(a.at(done, 0), b, panel, sink, done);
    }
    const auto piece = [&](int64_t row, int64_t n) {
      for (int64_t word = 0; word < b.words; word += kBlockWords) {
        const int64_t words = b.words - word < kBlockWords ? b.words - word : kBlockWords;
        const float* pa = a.at(row, word);
        const float* pb = b.panel(panel) + word * kLanes;
        const auto run = [&](auto tile) {
          tile(int(n), pa, pb, kLanes, b.panel_stride(), words, c, ldc, word > 0);
        };
        if (count == 1)
          run(microtile_of_rows<Words, kMicroRows, 1, kRowWords, 1>);
        else if (wide)
          run(microtile_of_rows<Words, kWideRows, kWideVectors, kRowWords, 1>);
        else
          run(microtile_of_rows<Words, kMicroRows, kMicroVectors, kRowWords, 1>);
      }
      sink(c, ldc, row, n, panel * kLanes, count * kLanes);
    };
    for_each_piece(rows - done, kMicroRows, [&](int64_t row, int64_t n) { piece(done + row, n); });
    panel += count;
  }
}

}  // namespace
}  // namespace fastcnn
