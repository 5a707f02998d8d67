// What is done to operands as they are loaded: an input's prologue and the gradient's, and how they fill a
// tile.
#pragma once

#include "cpu/gemm.h"
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

// Whether a column's values are pairs of words as they lie in memory: halves that nothing is done to.
template <class Words, class Column>
constexpr bool kPlain = false;
#if FASTCNN_ISA_LEVEL >= 3
template <>
inline constexpr bool kPlain<PairWords, InputColumn<bf16, PrologueOf<kIdentity>>> = true;
#endif

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
            a.put(row + i, c, low(at[i], std::true_type()), high(at[i], std::true_type()));
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

}  // namespace
}  // namespace fastcnn
