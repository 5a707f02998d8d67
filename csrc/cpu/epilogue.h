// What is done to results as they are stored, a vector of channels at a time.
#pragma once

#include "cpu/dropout_bits.h"
#include "cpu/prologue.h"
#include "cpu/statistics.h"

namespace fastcnn {
namespace {

// Applies an epilogue to a block of results: c [rows][ldc] for pixels from `pixel` on and channels from
// `channel` on. c is left holding scale * c + shift, which is what the statistics are taken of.
template <class T>
void store_block(const Epilogue& e, int64_t channels, float* c, int64_t ldc, int64_t pixel, int64_t rows,
                 int64_t channel, int64_t columns) {
  for (int64_t v = 0; v < columns && channel + v < channels; v += kLanes) {
    const int64_t at = channel + v, n = channels - at;
    const V scale = e.affine.scale ? load_upto(e.affine.scale + at, n) : set(1.0f);
    const V shift = e.affine.shift ? load_upto(e.affine.shift + at, n) : zero();
    T* out = static_cast<T*>(e.out) + pixel * e.out_ld + at;
    const T* residual = static_cast<const T*>(e.residual.data);
    if (residual) residual += pixel * e.residual.ld + at;
    for (int64_t r = 0; r < rows; ++r) {
      V z = fmadd(load(c + r * ldc + v), scale, shift);
      if (e.mean) store(c + r * ldc + v, z);
      if (!e.act_last) z = activate(e.affine.act, z);
      if (residual) z = add(z, load_upto(residual + r * e.residual.ld, n));
      if (e.act_last) z = activate(e.affine.act, z);
      store_upto(out + r * e.out_ld, z, n);
    }
  }
}

// A product's results on their way to memory: tile pixel `row` is pixel first + row. sums, if any, are the
// unit's statistics; its first row is the tile's row 0 where `opens` says so.
template <class T>
struct StoreSink : RegisterSink {
  const Epilogue& e;
  int64_t channels, first;
  const StatisticsUnit* sums;
  bool opens;
  Bounds bounds;

  StoreSink(const Epilogue& epilogue, int64_t channels, int64_t first, const StatisticsUnit* sums, bool opens)
      : e(epilogue),
        channels(channels),
        first(first),
        sums(sums),
        opens(opens),
        bounds(epilogue.affine.act) {}

  bool takes(int64_t column, int64_t columns) const { return !e.mask && is_whole(column, columns); }

  void operator()(float* c, int64_t ldc, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    if (e.mask) drop(*e.mask, c, ldc, first + row, rows, column, columns);
    if (columns == 2 * kLanes && is_whole(column, columns) && !e.residual.data)
      return e.affine.is_identity() ? two_vectors<false>(c, ldc, row, rows, column)
                                    : two_vectors<true>(c, ldc, row, rows, column);
    store_block<T>(e, channels, c, ldc, first + row, rows, column, columns);
    if (!sums) return;
    for (int64_t v = 0; v < columns; v += kLanes)
      sums->add_rows(c + v, ldc, rows, column + v, opens && row == 0);
  }

  // Whole vectors of a block of two, with their statistics in the same pass.
  template <bool kAffine>
  void two_vectors(const float* c, int64_t ldc, int64_t row, int64_t rows, int64_t column) const {
    const bool open = opens && row == 0;
    T* out = static_cast<T*>(e.out) + (first + row) * e.out_ld + column;
    V scale[2], shift[2], base[2], s[2] = {zero(), zero()}, q[2] = {zero(), zero()};
    for (int v = 0; v < 2; ++v) {
      const int64_t at = column + v * kLanes;
      if constexpr (kAffine) {
        scale[v] = e.affine.scale ? load(e.affine.scale + at) : set(1.0f);
        shift[v] = e.affine.shift ? load(e.affine.shift + at) : zero();
      }
      if (!sums) continue;
      base[v] = load(c + v * kLanes);
      if constexpr (kAffine) base[v] = fmadd(base[v], scale[v], shift[v]);
      if (!open) base[v] = load(sums->shift + at);
    }
    for (int64_t r = 0; r < rows; ++r, c += ldc, out += e.out_ld) {
      V z[2] = {load(c), load(c + kLanes)};
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        if constexpr (kAffine) z[v] = fmadd(z[v], scale[v], shift[v]);
        if (sums) {
          const V d = sub(z[v], base[v]);
          s[v] = add(s[v], d);
          q[v] = fmadd(d, d, q[v]);
        }
        if constexpr (kAffine) z[v] = bounds.clamp(z[v]);
      }
      store_two(out, z[0], z[1]);
    }
    if (sums)
      for (int v = 0; v < 2; ++v) sums->put(column + v * kLanes, base[v], s[v], q[v], open);
  }

  template <int kRows, int kVectors>
  void tile(V (&acc)[kRows][kVectors], int64_t row, int64_t column) const {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = column + v * kLanes;
      if (e.affine.scale || e.affine.shift) {
        const V scale = e.affine.scale ? load(e.affine.scale + at) : set(1.0f);
        const V shift = e.affine.shift ? load(e.affine.shift + at) : zero();
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) acc[r][v] = fmadd(acc[r][v], scale, shift);
      }
      if (sums) add_statistics(acc, v, at, opens && row == 0);
      T* out = static_cast<T*>(e.out) + (first + row) * e.out_ld + at;
      if (const T* residual = static_cast<const T*>(e.residual.data)) {
        residual += (first + row) * e.residual.ld + at;
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const V other = load(residual + r * e.residual.ld);
          const V z = e.act_last ? bounds.clamp(add(acc[r][v], other)) : add(bounds.clamp(acc[r][v]), other);
          store(out + r * e.out_ld, z);
        }
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) store(out + r * e.out_ld, bounds.clamp(acc[r][v]));
      }
    }
  }

 private:
  bool is_whole(int64_t column, int64_t columns) const {
    return bounds.simple && column + columns <= channels;
  }

  template <int kRows, int kVectors>
  void add_statistics(V (&acc)[kRows][kVectors], int v, int64_t at, bool open) const {
    const V base = open ? acc[0][v] : load(sums->shift + at);
    V s = zero(), q = zero();
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V d = sub(acc[r][v], base);
      s = add(s, d);
      q = fmadd(d, d, q);
    }
    sums->put(at, base, s, q, open);
  }
};

}  // namespace
}  // namespace fastcnn
