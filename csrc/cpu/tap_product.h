// The matrix-product core over taps: rows of A lie a pitch apart in a stripe, each tap's words at an offset
// of its own.
#pragma once

#include "cpu/gemm.h"

namespace fastcnn {
namespace {

struct Taps {
  const int64_t* offsets;  // in words, from a row's first
  int64_t count, words;    // words of the reduction per tap
};

// Lines of one image in a stripe, `step` floats apart: `pixels` results each, the sink's rows from `row` on.
struct ImageLines {
  const float* first;
  int64_t step, count, pixels, row;
};

// acc[row][panel] += sum over taps and words of a[row * a_row + offset + word] * b[...]
template <class Words, int kRows, int kVectors>
inline void accumulate_taps(V (&acc)[kRows][kVectors], const float* a, int64_t a_row, const Taps& taps,
                            const float* b, int64_t b_panel) {
  // Three rows share a register: base, base + a_row and base + 2 * a_row are one addressing mode.
  constexpr int kBases = (kRows + 2) / 3;
  for (int64_t t = 0; t < taps.count; ++t) {
    const float* base[kBases];
#pragma GCC unroll 5
    for (int i = 0; i < kBases; ++i) base[i] = a + taps.offsets[t] + 3 * i * a_row;
    for (int64_t k = 0; k < taps.words; ++k) {
      V bv[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) bv[v] = load(b + v * b_panel);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const V av = set(base[r / 3][r % 3 * a_row]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[r][v] = Words::step(acc[r][v], av, bv[v]);
      }
#pragma GCC unroll 5
      for (int i = 0; i < kBases; ++i) ++base[i];
      b += kLanes;
    }
  }
}

// c = the same, or c += it.
template <class Words, int kRows, int kVectors>
inline void tap_microtile(int rows, const float* a, int64_t a_row, const Taps& taps, const float* b,
                          int64_t b_panel, float* c, int64_t ldc, bool accumulate = false) {
  if constexpr (kRows > 1)
    if (rows < kRows)
      return tap_microtile<Words, kRows - 1, kVectors>(rows, a, a_row, taps, b, b_panel, c, ldc, accumulate);
  V acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = accumulate ? load(c + r * ldc + v * kLanes) : zero();
  accumulate_taps<Words, kRows, kVectors>(acc, a, a_row, taps, b, b_panel);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
}

template <class Words, class Sink>
void tap_microtile_to(const float* a, int64_t a_row, const Taps& taps, const float* b, int64_t b_panel,
                      const Sink& sink, int64_t row, int64_t column) {
  V acc[kMicroRows][kMicroVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kMicroRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kMicroVectors; ++v) acc[r][v] = zero();
  accumulate_taps<Words, kMicroRows, kMicroVectors>(acc, a, a_row, taps, b, b_panel);
  sink.tile(acc, row, column);
}

// What rows cost AMX, in rows of full blocks of 32 by eights: 16 alone load three tiles for two dot products,
// in pairs four for four.
inline int64_t block_cost(int64_t rows) { return rows / 32 * 4 + (rows % 32 > 16 ? 4 : rows % 32 ? 3 : 0); }

// The same of an image's lines in a stripe: each by itself, or with the rows between them as one run.
inline int64_t lines_cost(int64_t lines, int64_t pixels, int64_t pitch) {
  const int64_t joined = block_cost((lines - 1) * pitch + pixels), single = lines * block_cost(pixels);
  return joined < single ? joined : single;
}

#if FASTCNN_ISA_LEVEL >= 4
// A line's rows of a few taps, from `row` on, into an A tile of taps x words.
inline void gather_line(const float* from, int64_t step, const Taps& taps, int64_t pixels,
                        const TileWriter<PairWords>& a, int64_t row) {
  for (int64_t q = 0; q < pixels; ++q, from += step)
    for (int64_t t = 0; t < taps.count; ++t)
      for (int64_t word = 0; word < taps.words; word += kLanes)
        store(a.at(row + q, t * taps.words + word), load(from + taps.offsets[t] + word));
}

// Rows are any number of bytes apart, and may overlap. Those of the last block beyond the run are computed
// from whatever the stripe holds there, and dropped.
template <class Sink>
void amx_multiply_lines(const ImageLines& lines, int64_t a_bytes, const Taps& taps,
                        const PackedView<PairWords>& b, int64_t panel, int64_t panels, const Sink& sink) {
  OverlappedSink<Sink> results(sink, taps.count * taps.words / kTileWords);
  [[maybe_unused]] const TileSession session;
  // Where lines lie a whole number of rows apart, the rows between them may be cheaper to compute than the
  // blocks that every line leaves unfilled: 14 of 16 pixels are one run of 16 a line.
  const int64_t pitch = lines.step * 4 / a_bytes, whole = (lines.count - 1) * pitch + lines.pixels;
  const bool joined =
      lines.step * 4 % a_bytes == 0 && block_cost(whole) < lines.count * block_cost(lines.pixels);
  const int64_t runs = joined ? 1 : lines.count, rows = joined ? whole : lines.pixels;
  for (int64_t i = 0; i < runs; ++i) {
    const char* a = reinterpret_cast<const char*>(lines.first + i * lines.step);
    const RowRun run{lines.row + i * lines.pixels, lines.pixels, joined ? pitch : lines.pixels};
    for (int64_t q = 0; q < rows; q += kAmxBlock) {
      const int64_t count = rows - q < kAmxBlock ? rows - q : kAmxBlock;
      with_block_shape(count, panels, [&](auto row_tiles, auto panel_tiles) {
        block_zero();
        for (int64_t t = 0; t < taps.count; ++t)
          for (int64_t word = 0; word < taps.words; word += kTileWords) {
            block_step<row_tiles, panel_tiles>(a + q * a_bytes + (taps.offsets[t] + word) * 4, a_bytes,
                                               b.panel(panel) + (t * taps.words + word) * kLanes, kLanes,
                                               b.panel_stride());
            results.advance();
          }
        results.finish();
        block_store<row_tiles, panel_tiles>(results.block(), kAmxBlock);
      });
      results.put(run, q, count, panel * kLanes, panels * kLanes);
    }
  }
  results.finish();
}
#endif

// The line's share of a block of taps, which begin at `b` in the first of `panels` panels, in c
// [pixels][ldc].
template <class Words>
void accumulate_line(const float* a, int64_t a_row, const Taps& taps, int64_t pixels, const float* b,
                     int64_t b_panel, int64_t panels, float* c, int64_t ldc, bool accumulate) {
  for_each_piece(pixels, kMicroRows, [&](int64_t q, int64_t count) {
    const auto tile = panels == kMicroVectors ? tap_microtile<Words, kMicroRows, kMicroVectors>
                                              : tap_microtile<Words, kMicroRows, 1>;
    tile(int(count), a + q * a_row, a_row, taps, b, b_panel, c + q * ldc, ldc, accumulate);
  });
}

// Multiplies one line's pixels by `panels` panels of B (at most kMicroVectors); the sink's rows begin at
// `row`.
template <class Words, class Sink>
void multiply_line(const float* a, int64_t a_row, const Taps& taps, int64_t pixels,
                   const PackedView<Words>& b, int64_t panel, int64_t panels, const Sink& sink, int64_t row) {
  alignas(64) float c[kMicroRows * kMicroVectors * kLanes];
  const int64_t ldc = kMicroVectors * kLanes, column = panel * kLanes;
  const bool registers = panels == kMicroVectors && sink.takes(column, panels * kLanes);
  for_each_piece(pixels, kMicroRows, [&](int64_t q, int64_t count) {
    const float *rows = a + q * a_row, *pb = b.panel(panel);
    if (registers && count == kMicroRows)
      return tap_microtile_to<Words>(rows, a_row, taps, pb, b.panel_stride(), sink, row + q, column);
    if (panels == kMicroVectors)
      tap_microtile<Words, kMicroRows, kMicroVectors>(int(count), rows, a_row, taps, pb, b.panel_stride(), c,
                                                      ldc);
    else
      tap_microtile<Words, kMicroRows, 1>(int(count), rows, a_row, taps, pb, b.panel_stride(), c, ldc);
    sink(c, ldc, row + q, count, column, panels * kLanes);
  });
}

// The same for several lines of an image.
template <class Words, class Sink>
void multiply_lines(const ImageLines& lines, int64_t a_row, const Taps& taps, const PackedView<Words>& b,
                    int64_t panel, int64_t panels, const Sink& sink) {
#if FASTCNN_ISA_LEVEL >= 4
  if constexpr (Words::kPerWord == 2)
    return amx_multiply_lines(lines, a_row * 4, taps, b, panel, panels, sink);
#endif
  for (int64_t i = 0; i < lines.count; ++i)
    multiply_line(lines.first + i * lines.step, a_row, taps, lines.pixels, b, panel, panels, sink,
                  lines.row + i * lines.pixels);
}

}  // namespace
}  // namespace fastcnn
