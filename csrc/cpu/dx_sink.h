// Input gradients on their way to memory.
#pragma once

#include "cpu/gemm.h"
#include "cpu/pixel_rows.h"
#include "cpu/prologue.h"

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
  int64_t ahead = 0, ahead_column = 0;  // see fetching

  DxSink(const DxTarget& p, int64_t first, int64_t pitch, float* sums, bool opens)
      : p(p),
        first(first),
        pitch(pitch),
        sums(p.output.sums ? sums : nullptr),
        opens(opens),
        bounds(p.input.affine.act) {}

  // A sink that also fetches into L2 what rows meet in memory, while it takes those that are `rows` before
  // them; once, with the results of `column`.
  DxSink fetching(int64_t rows, int64_t column) const {
    DxSink other = *this;
    other.ahead = rows;
    other.ahead_column = column;
    return other;
  }

  bool takes(int64_t column, int64_t columns) const { return bounds.simple && column + columns <= p.k; }

  // Fetches a row of what the results meet in memory into L2. Inlined at once, or GCC takes a function that
  // only prefetches for one without effect, and removes the call.
  [[gnu::always_inline]] void prefetch(int64_t row) const {
    const Row at(*this, row);
    const int64_t bytes = p.k * int64_t(sizeof(T));
    for (int64_t b = 0; b < bytes; b += 64) {
      if (p.input.affine.act || p.output.sums)
        __builtin_prefetch(reinterpret_cast<const char*>(at.x) + b, 0, 2);
      __builtin_prefetch(reinterpret_cast<const char*>(at.dx) + b, 1, 2);
      if (at.residual) __builtin_prefetch(reinterpret_cast<const char*>(at.residual) + b, 0, 2);
    }
  }

  void operator()(const float* c, int64_t ldc, int64_t row, int64_t rows, int64_t column,
                  int64_t columns) const {
    fetch(row, rows, column);
    if (!takes(column, columns)) return cut(c, ldc, row, rows, column, columns);
    const bool capped = p.input.affine.act == kRelu6;
    for (int64_t v = 0; v < columns;) {
      const bool two = columns - v >= 2 * kLanes;
      if (two)
        capped ? vectors<2, true>(c + v, ldc, row, rows, column + v)
               : vectors<2, false>(c + v, ldc, row, rows, column + v);
      else
        vectors<1, true>(c + v, ldc, row, rows, column + v);
      v += two ? 2 * kLanes : kLanes;
    }
  }

  template <int kRows, int kVectors>
  void tile(V (&acc)[kRows][kVectors], int64_t row, int64_t column) const {
    fetch(row, kRows, column);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = column + v * kLanes;
      Channels<true> channels(*this, at, kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Row to(*this, row + r);
        store(to.dx + at, channels.finish(acc[r][v], to));
      }
      channels.save(row);
    }
  }

 private:
  [[gnu::always_inline]] void fetch(int64_t row, int64_t rows, int64_t column) const {
    if (!ahead || column != ahead_column) return;
    for (int64_t i = 0; i < rows; ++i) prefetch(row + ahead + i);
  }

  // A pixel's values of x, dx and the residual, if there is one.
  struct Row {
    const T* x;
    T* dx;
    const T* residual = nullptr;

    [[gnu::always_inline]] Row(const DxSink& sink, int64_t row) {
      const int64_t pixel = input_pixel(sink.p.grid, sink.first + row);
      x = static_cast<const T*>(sink.p.input.x.data) + pixel * sink.p.input.x.ld;
      dx = static_cast<T*>(sink.p.output.dx) + pixel * sink.p.output.dx_ld;
      const Activations& other = sink.p.output.residual;
      if (other.data) residual = static_cast<const T*>(other.data) + pixel * other.ld;
    }
  };

  // A vector of channels of a few rows: what is stored of a gradient (masked, with its scale if that is asked
  // for, plus the residual), and the two sums, which join the unit's afterwards: one rounding of the total,
  // not one for each row. Without kCapped no activation is bounded above.
  template <bool kCapped, bool kSimple = true>
  struct Channels {
    const DxSink& sink;
    const int64_t at, n;
    const int act;
    const bool reads, scales;
    const V scale, shift, mean;
    V gradient = zero(), product = zero();

    [[gnu::always_inline]] Channels(const DxSink& sink, int64_t at, int64_t n)
        : sink(sink),
          at(at),
          n(n),
          act(sink.p.input.affine.act),
          reads(act || sink.sums),
          scales(sink.p.output.scales),
          scale(vector(sink.p.input.affine.scale, set(1.0f))),
          shift(vector(sink.p.input.affine.shift, zero())),
          mean(vector(sink.p.input.mean, zero())) {}

    [[gnu::always_inline]] V vector(const float* p, V missing) const {
      return p ? load_upto(p + at, n) : missing;
    }

    [[gnu::always_inline]] V masked(V z, V g) const {
      if constexpr (!kSimple) return activate_grad(act, z, g);
      return kCapped ? sink.bounds.mask(z, g) : where_gt(z, sink.bounds.low, g, zero());
    }

    [[gnu::always_inline]] V finish(V g, const Row& row) {
      if (reads) {
        const V value = load_upto(row.x + at, n);
        if (act) g = masked(fmadd(value, scale, shift), g);
        gradient = add(gradient, g);
        product = fmadd(g, sub(value, mean), product);
      }
      if (scales) g = mul(g, scale);
      return row.residual ? add(g, load_upto(row.residual + at, n)) : g;
    }

    void save(int64_t row) const {
      if (!sink.sums) return;
      const bool opens = sink.opens && row == 0;
      float *first = sink.sums + at, *second = first + sink.pitch;
      store(first, opens ? gradient : add(load(first), gradient));
      store(second, opens ? product : add(load(second), product));
    }
  };

  template <int kVectors, bool kCapped>
  void vectors(const float* c, int64_t ldc, int64_t row, int64_t rows, int64_t column) const {
    Channels<kCapped> low(*this, column, kLanes), high(*this, column + (kVectors - 1) * kLanes, kLanes);
    for (int64_t r = 0; r < rows; ++r, c += ldc) {
      const Row to(*this, row + r);
      const V first = low.finish(load(c), to);
      if constexpr (kVectors == 2)
        store_two(to.dx + column, first, high.finish(load(c + kLanes), to));
      else
        store(to.dx + column, first);
    }
    low.save(row);
    if constexpr (kVectors == 2) high.save(row);
  }

  // The last vector may be cut, and the activation have any derivative.
  void cut(const float* c, int64_t ldc, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    for (int64_t at = column; at < column + columns && at < p.k; at += kLanes, c += kLanes) {
      Channels<true, false> channels(*this, at, p.k - at);
      for (int64_t r = 0; r < rows; ++r) {
        const Row to(*this, row + r);
        store_upto(to.dx + at, channels.finish(load(c + r * ldc), to), p.k - at);
      }
      channels.save(row);
    }
  }
};

}  // namespace
}  // namespace fastcnn
