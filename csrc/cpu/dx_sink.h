// Input gradients on their way to memory.
#pragma once

#include "cpu/epilogue.h"
#include "cpu/gemm.h"
#include "cpu/pixel_rows.h"

namespace fastcnn {
namespace {

// Row `r` of a product is the gradient of the input pixel that grid maps r to; k channels.
struct DxTarget {
  PixelGrid grid;
  int64_t k;
  BackwardInput input;
  BackwardOutput output;
};

// Masks gradients by the input's prologue, with their two sums in `sums` [2][pitch], and adds the residual.
template <class T>
struct DxSink : RegisterSink {
  const DxTarget& p;
  int64_t first, pitch;
  float* sums;
  bool opens;
  Bounds bounds;

  DxSink(const DxTarget& p, int64_t first, int64_t pitch, float* sums, bool opens)
      : p(p),
        first(first),
        pitch(pitch),
        sums(p.output.sums ? sums : nullptr),
        opens(opens),
        bounds(p.input.affine.act) {}

  bool takes(int64_t column, int64_t columns) const { return bounds.simple && column + columns <= p.k; }

  const T* x(int64_t row, int64_t column) const {
    return static_cast<const T*>(p.input.x.data) + input_pixel(p.grid, first + row) * p.input.x.ld + column;
  }
  T* dx(int64_t row, int64_t column) const {
    return static_cast<T*>(p.output.dx) + input_pixel(p.grid, first + row) * p.output.dx_ld + column;
  }

  // What is stored: the gradient, with its scale if it is asked for, plus the residual.
  V stored(V g, V scale, int64_t row, int64_t column, int64_t n) const {
    if (p.output.scales) g = mul(g, scale);
    return p.output.residual.data ? add(g, load_upto(residual(row, column), n)) : g;
  }
  V scale_at(int64_t column, int64_t n) const {
    return p.input.affine.scale ? load_upto(p.input.affine.scale + column, n) : set(1.0f);
  }
  const T* residual(int64_t row, int64_t column) const {
    return static_cast<const T*>(p.output.residual.data) +
           input_pixel(p.grid, first + row) * p.output.residual.ld + column;
  }

  // Fetches a row of x and dx into L2.
  void prefetch(int64_t row) const {
    const char *from = reinterpret_cast<const char*>(x(row, 0)),
               *to = reinterpret_cast<const char*>(dx(row, 0)),
               *other = reinterpret_cast<const char*>(residual(row, 0));
    const int64_t bytes = p.k * int64_t(sizeof(T));
    for (int64_t at = 0; at < bytes; at += 64) {
      if (p.input.affine.act || p.output.sums) __builtin_prefetch(from + at, 0, 2);
      __builtin_prefetch(to + at, 1, 2);
      if (p.output.residual.data) __builtin_prefetch(other + at, 0, 2);
    }
  }

  void operator()(const float* c, int64_t ldc, int64_t row, int64_t rows, int64_t column,
                  int64_t columns) const {
    if (takes(column, columns)) return whole(c, ldc, row, rows, column, columns);
    const ScaleShiftAct& pre = p.input.affine;
    for (int64_t v = 0; v < columns && column + v < p.k; v += kLanes) {
      const int64_t at = column + v, n = p.k - at;
      const V mean = sums && p.input.mean ? load_upto(p.input.mean + at, n) : zero(), scale = scale_at(at, n);
      Totals totals;
      for (int64_t r = 0; r < rows; ++r) {
        V g = load(c + r * ldc + v);
        if (pre.act || sums) {
          const V value = load_upto(x(row + r, at), n);
          if (pre.act) g = activate_grad(pre.act, scale_shift(pre, value, at, n), g);
          totals.add(g, sub(value, mean));
        }
        store_upto(dx(row + r, at), stored(g, scale, row + r, at, n), n);
      }
      totals.save(*this, at, row);
    }
  }

  // The same where no vector is cut and the activation's derivative is 0 or 1.
  void whole(const float* c, int64_t ldc, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    const ScaleShiftAct& pre = p.input.affine;
    const bool reads = pre.act || sums, adds = p.output.residual.data, scales = p.output.scales;
    for (int64_t at = column; at < column + columns; at += kLanes, c += kLanes) {
      const V mean = sums && p.input.mean ? load(p.input.mean + at) : zero(), scale = scale_at(at, kLanes),
              shift = pre.shift ? load(pre.shift + at) : zero();
      Totals totals;
      for (int64_t r = 0; r < rows; ++r) {
        V g = load(c + r * ldc);
        if (reads) {
          const V value = load(x(row + r, at));
          if (pre.act) g = bounds.mask(fmadd(value, scale, shift), g);
          totals.add(g, sub(value, mean));
        }
        if (scales) g = mul(g, scale);
        store(dx(row + r, at), adds ? fastcnn::add(g, load(residual(row + r, at))) : g);
      }
      totals.save(*this, at, row);
    }
  }

  template <int kRows, int kVectors>
  void tile(V (&acc)[kRows][kVectors], int64_t row, int64_t column) const {
    const ScaleShiftAct& pre = p.input.affine;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = column + v * kLanes;
      if (!pre.act && !sums && !p.output.scales) {
        if (p.output.residual.data) {
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) acc[r][v] = add(acc[r][v], load(residual(row + r, at)));
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) store(dx(row + r, at), acc[r][v]);
        continue;
      }
      const V mean = sums && p.input.mean ? load(p.input.mean + at) : zero();
      const V scale = scale_at(at, kLanes), shift = pre.shift ? load(pre.shift + at) : zero();
      Totals totals;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const V value = load(x(row + r, at));
        if (pre.act) acc[r][v] = bounds.mask(fmadd(value, scale, shift), acc[r][v]);
        totals.add(acc[r][v], sub(value, mean));
        store(dx(row + r, at), stored(acc[r][v], scale, row + r, at, kLanes));
      }
      totals.save(*this, at, row);
    }
  }

 private:
  // The two sums of a few rows, which join the unit's afterwards: one rounding of the total, not one for each
  // row.
  struct Totals {
    V gradient = zero(), product = zero();

    void add(V g, V centred) {
      gradient = fastcnn::add(gradient, g);
      product = fmadd(g, centred, product);
    }
    void save(const DxSink& sink, int64_t at, int64_t row) const {
      if (!sink.sums) return;
      const bool opens = sink.opens && row == 0;
      float *first = sink.sums + at, *second = first + sink.pitch;
      store(first, opens ? gradient : fastcnn::add(load(first), gradient));
      store(second, opens ? product : fastcnn::add(load(second), product));
    }
  };
};

}  // namespace
}  // namespace fastcnn
