// Prologue on load and epilogue on store, a vector of channels at a time.
#pragma once

#include "cpu/gemm.h"
#include "cpu/statistics.h"
#include "ops/tensor.h"

namespace fastcnn {
namespace {

template <class T>
V load_upto(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load(p, int(n));
}
template <class T>
void store_upto(T* p, V v, int64_t n) {
  if (n >= kLanes)
    store(p, v);
  else
    store(p, v, int(n));
}

// scale * v + shift at channels [c, c + n), n lanes of them real. Lanes past n stay zero: act(0) = 0.
inline V scale_shift(const ScaleShiftAct& a, V v, int64_t c, int64_t n) {
  if (a.scale && a.shift) return fmadd(v, load_upto(a.scale + c, n), load_upto(a.shift + c, n));
  if (a.scale) return mul(v, load_upto(a.scale + c, n));
  if (a.shift) return add(v, load_upto(a.shift + c, n));
  return v;
}

inline V apply(const ScaleShiftAct& a, V v, int64_t c, int64_t n) {
  return activate(a.act, scale_shift(a, v, c, n));
}

// none, relu and relu6 as bounds: one activation without a branch. The others are not `simple`.
struct Bounds {
  V low, high;
  bool simple;

  explicit Bounds(int act)
      : low(set(act == kNone ? -INFINITY : 0.0f)),
        high(set(act == kRelu6 ? 6.0f : INFINITY)),
        simple(act == kNone || act == kRelu || act == kRelu6) {}
  V clamp(V z) const { return min(max(z, low), high); }
  // g where the activation passes its gradient. (A z of minus infinity would need none to say so; it is NaN's
  // kin.)
  V mask(V z, V g) const { return where_gt(z, low, where_gt(high, z, g, zero()), zero()); }
};

// The activations that are not bounds: out of line, since inlined into every stencil they are most of what
// the compiler works on.
[[gnu::noinline]] inline void activate_unbounded(int act, V* values, int count) {
  for (int i = 0; i < count; ++i) values[i] = activate(act, values[i]);
}

template <int kCount>
inline void activate_all(int act, V (&values)[kCount]) {
  if (!act) return;
  const Bounds bounds(act);
  if (!bounds.simple) return activate_unbounded(act, values, kCount);
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) values[i] = bounds.clamp(values[i]);
}

// A prologue with its kind as a constant, so that the loops that load operands have no branch on it.
enum PrologueKind { kIdentity, kBounded, kGeneral };

template <int kKind>
struct PrologueOf {
  const ScaleShiftAct& affine;
  const Bounds bounds{affine.act};

  // The prologue of channels [c, c + n), its parameters in registers.
  struct Channels {
    V scale, shift;
    Bounds bounds;
    int act;

    [[gnu::always_inline]] V operator()(V v) const {
      if constexpr (kKind == kIdentity) return v;
      const V z = fmadd(v, scale, shift);
      return kKind == kBounded ? bounds.clamp(z) : activate(act, z);
    }
  };
  [[gnu::always_inline]] Channels at(int64_t c, int64_t n) const {
    return {affine.scale ? load_upto(affine.scale + c, n) : set(1.0f),
            affine.shift ? load_upto(affine.shift + c, n) : zero(), bounds, affine.act};
  }
};

template <class F>
void with_prologue(const ScaleShiftAct& affine, const F& f) {
  if (affine.is_identity()) return f(PrologueOf<kIdentity>{affine});
  if (Bounds(affine.act).simple) return f(PrologueOf<kBounded>{affine});
  f(PrologueOf<kGeneral>{affine});
}

// x with its prologue, from channel c of `channels` on: a column's value at a pixel is a vector. Its lanes
// past the last channel are zero; `whole`, a constant, says that there are none.
template <class T, class Prologue>
struct InputColumn {
  const T* data;
  int64_t ld, n;
  typename Prologue::Channels apply;

  template <bool kWhole = false>
  [[gnu::always_inline]] V operator()(int64_t pixel, std::bool_constant<kWhole> = {}) const {
    const T* p = data + pixel * ld;
    return apply(kWhole ? load(p) : load_upto(p, n));
  }
};

template <class T, class Prologue>
[[gnu::always_inline]] inline InputColumn<T, Prologue> input_column(const Activations& x,
                                                                    const Prologue& prologue, int64_t c,
                                                                    int64_t channels) {
  const int64_t n = channels - c;
  return {static_cast<const T*>(x.data) + c, x.ld, n, prologue.at(c, n)};
}

// A column of vectors that lie in scratch memory, whole and without a prologue.
template <class F>
struct StoredColumn {
  F value;

  template <bool kWhole = false>
  [[gnu::always_inline]] V operator()(int64_t row, std::bool_constant<kWhole> = {}) const {
    return value(row);
  }
};
template <class F>
StoredColumn<F> stored_column(const F& value) {
  return {value};
}

// f(c, whole) for the vectors of k channels; only the last may have lanes past them.
template <class F>
[[gnu::always_inline]] inline void for_vectors(int64_t k, const F& f, int64_t c = 0) {
  for (; c + kLanes <= k; c += kLanes) f(c, std::true_type());
  if (c < k) f(c, std::false_type());
}

// The same, two whole vectors at a time first: pair(c). Stored together, bf16 are rounded in three
// instructions instead of four.
template <class Pair, class F>
[[gnu::always_inline]] inline void for_vector_pairs(int64_t k, const Pair& pair, const F& f) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= k; c += 2 * kLanes) pair(c);
  for_vectors(k, f, c);
}

// dy of a gradient prologue (see GradientPrologue); its parts as constants, as in PrologueOf.
template <class T, bool kHasY, bool kHasCoef, bool kSimple>
struct GradientOf {
  const GradientPrologue& g;
  int64_t channels;
  const Bounds bounds{g.affine.act};

  // dy of channels [c, c + n) at a pixel, their parameters in registers.
  struct Channels {
    const T *grad, *y = nullptr;
    int64_t grad_ld, y_ld = 0, n;
    int act = 0;
    V scale, shift, coef[4];
    Bounds bounds;

    // Member by member: GCC clears an aggregate of so many vectors in memory first.
    [[gnu::always_inline]] Channels(const GradientOf& of, int64_t c)
        : grad(static_cast<const T*>(of.g.grad.data) + c),
          grad_ld(of.g.grad.ld),
          n(of.channels - c),
          bounds(of.bounds) {
      const GradientPrologue& g = of.g;
      if constexpr (kHasY) {
        y = static_cast<const T*>(g.y.data) + c;
        y_ld = g.y.ld;
        act = g.affine.act;
        scale = g.affine.scale ? load_upto(g.affine.scale + c, n) : set(1.0f);
        shift = g.affine.shift ? load_upto(g.affine.shift + c, n) : zero();
      }
      if constexpr (kHasCoef) {
        const int64_t ld = g.coef_ld ? g.coef_ld : of.channels;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) coef[i] = load_upto(g.coef + i * ld + c, n);
      }
    }

    template <bool kWhole = false>
    [[gnu::always_inline]] V operator()(int64_t pixel, std::bool_constant<kWhole> = {}) const {
      const T* from = grad + pixel * grad_ld;
      V dy = kWhole ? load(from) : load_upto(from, n);
      if constexpr (!kHasY) return dy;
      const T* of = y + pixel * y_ld;
      const V value = kWhole ? load(of) : load_upto(of, n);
      if (act) {
        const V z = fmadd(value, scale, shift);
        dy = kSimple ? bounds.mask(z, dy) : activate_grad(act, z, dy);
      }
      if constexpr (!kHasCoef) return dy;
      return fmadd(coef[0], dy, fmadd(coef[1], sub(value, coef[2]), coef[3]));
    }
  };
  [[gnu::always_inline]] Channels at(int64_t c) const { return Channels(*this, c); }
};

// Calls f(first, integral_constant<int, count>) for rows in groups of four, then single ones: what a column's
// functions hold in registers serves four rows.
template <class F>
inline void for_rows(int64_t rows, const F& f) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) f(i, std::integral_constant<int, 4>());
  for (; i < rows; ++i) f(i, std::integral_constant<int, 1>());
}

// Rows of an A tile: column(c) makes a function of index(row), whose value is the row's vector from channel c
// on.
template <class Words, class Index, class Column>
void fill_tile(const TileWriter<Words>& a, int64_t rows, int64_t k, const Index& index,
               const Column& column) {
  for_rows(rows, [&](int64_t row, auto group) {
    int64_t at[group];
    for (int i = 0; i < group; ++i) at[i] = index(row + i);
    for_vector_pairs(
        k,
        [&](int64_t c) {
          const auto low = column(c), high = column(c + kLanes);
          for (int i = 0; i < group; ++i)
            a.put_two(row + i, c, low(at[i], std::true_type()), high(at[i], std::true_type()));
        },
        [&](int64_t c, auto whole) {
          const auto value = column(c);
          for (int i = 0; i < group; ++i) a.put(row + i, c, value(at[i], whole));
        });
    for (int i = 0; i < group; ++i) a.pad(row + i, k);
  });
}

template <class T, class F>
void with_gradient(const GradientPrologue& g, int64_t channels, const F& f) {
  if (!g.y.data) return f(GradientOf<T, false, false, true>{g, channels});
  if (!Bounds(g.affine.act).simple) {
    if (g.coef) return f(GradientOf<T, true, true, false>{g, channels});
    return f(GradientOf<T, true, false, false>{g, channels});
  }
  if (g.coef) return f(GradientOf<T, true, true, true>{g, channels});
  f(GradientOf<T, true, false, true>{g, channels});
}

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

  bool takes(int64_t column, int64_t columns) const { return bounds.simple && column + columns <= channels; }

  void operator()(float* c, int64_t ldc, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    if (columns == 2 * kLanes && takes(column, columns) && !e.residual.data)
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
