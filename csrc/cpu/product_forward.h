// The forward driver of every product: tiles of output pixels, shared columns where pixels are few,
// statistics.
#pragma once

#include "cpu/epilogue.h"
#include "cpu/gemm.h"

namespace fastcnn {
namespace {

constexpr int64_t kMostTileRows = 128;

// Rows of an A tile: a quarter of a 1 MB L2, and no more than eight microtiles.
template <class Words>
int64_t tile_rows(int64_t words, int64_t pixels) {
  const int64_t fit = 256 * 1024 / (round_up(words, kBlockWords) * 4) / kMicroRows;
  int64_t rows = (fit < 2 ? 2 : fit > 8 ? 8 : fit) * kMicroRows;
#if FASTCNN_ISA_LEVEL >= 4
  if (Words::kPerWord == 2) rows = fit > 4 ? kMostTileRows : 64;
#endif
  return rows < pixels ? rows : pixels;
}

inline int64_t most_splits(int64_t panels) { return ceil_div(panels, 2 * kMicroVectors); }
// Units that a product needs whose panels no threads can share: 3 x 3 to 32 on 7 x 7 was one, and ran on one
// thread. Two for each of two: with eight, whole images still.
inline int64_t least_units(int64_t panels) { return most_splits(panels) == 1 ? 4 : 1; }

// Into how many ranges of panels the threads split each of a product's units, where those are few. It changes
// no sum, so it may follow the number of threads.
inline int64_t column_splits(int64_t units, int64_t panels) {
  const int64_t threads = omp_get_max_threads();
  const int64_t wanted = ceil_div(4 * threads, units), most = most_splits(panels);
  return threads == 1 || units >= 4 * threads ? 1 : wanted < most ? wanted : most;
}

// f(unit, first panel, last panel, statistics or null) for units of work of a product with n outputs, each of
// count(unit) pixels; then merges the units' statistics where the epilogue takes some.
template <class Count, class F>
void for_units(int64_t units, const Count& count, int64_t n, const Epilogue& e, const F& f) {
  const int64_t panels = ceil_div(n, kLanes), pitch = panels * kLanes, splits = column_splits(units, panels);
  AlignedBuffer<float> statistics(e.mean ? size_t(units * 3 * pitch) : 1);
  parallel_for(units * splits, [&](int64_t task) {
    const int64_t unit = task / splits, split = task % splits;
    float* sums = statistics.data() + unit * 3 * pitch;
    const StatisticsUnit own{sums, sums + pitch, sums + 2 * pitch};
    f(unit, panels * split / splits, panels * (split + 1) / splits, e.mean ? &own : nullptr);
  });
  if (e.mean) merge_statistics(statistics.data(), units, count, n, pitch, e.mean, e.var);
}

// Pixels [first, first + count) of a product times panels [first_panel, last_panel); the largest unit has
// `rows` pixels.
template <class T>
struct ProductUnit {
  int64_t first, count, rows, first_panel, last_panel;
  const PackedView<typename WordsOf<T>::type>& b;
  const StoreSink<T>& sink;
};

// out = epilogue(A packed), A [pixels, k] and packed [k, n], unit by unit: multiply(unit).
template <class T, class Multiply>
void for_product_units(int64_t pixels, int64_t k, int64_t n, const void* packed, const Epilogue& e,
                       const Multiply& multiply) {
  using Words = typename WordsOf<T>::type;
  const PackedView<Words> b(packed, k);
  const int64_t rows = tile_rows<Words>(b.words, pixels), tiles = ceil_div(pixels, rows);
  const auto count_of = [&](int64_t tile) { return tile + 1 < tiles ? rows : pixels - tile * rows; };
  for_units(tiles, count_of, n, e,
            [&](int64_t tile, int64_t first_panel, int64_t last_panel, const StatisticsUnit* sums) {
              const int64_t first = tile * rows;
              const StoreSink<T> sink(e, n, first, sums, true);
              multiply(ProductUnit<T>{first, count_of(tile), rows, first_panel, last_panel, b, sink});
            });
}

// A unit whose rows fill(first, count, rows) writes into scratch.
template <class Rows, class T, class Fill>
void multiply_filled(const ProductUnit<T>& unit, const Fill& fill) {
  const Rows a = Rows::in_scratch(unit.rows, unit.b.words);
  fill(unit.first, unit.count, a);
  multiply_tile(a, unit.count, unit.b, unit.first_panel, unit.last_panel, unit.sink);
}

// out = epilogue(A packed) with all rows of A made by fill(first, count, rows).
template <class T, class Rows = TileWriter<typename WordsOf<T>::type>, class Fill>
void product_forward(int64_t pixels, int64_t k, int64_t n, const void* packed, const Epilogue& e,
                     const Fill& fill) {
  for_product_units<T>(pixels, k, n, packed, e, [&](const auto& unit) { multiply_filled<Rows>(unit, fill); });
}

}  // namespace
}  // namespace fastcnn
