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

inline V apply(const ScaleShiftAct& a, V v, int64_t c, int64_t n) { return activate(a.act, scale_shift(a, v, c, n)); }

// dy of a gradient prologue at one pixel: see GradientPrologue.
template <class T>
V gradient_at(const GradientPrologue& g, int64_t channels, int64_t pixel, int64_t c) {
  const int64_t n = channels - c;
  V dy = load_upto(static_cast<const T*>(g.grad.data) + pixel * g.grad.ld + c, n);
  if (!g.y.data) return dy;
  const V y = load_upto(static_cast<const T*>(g.y.data) + pixel * g.y.ld + c, n);
  if (g.affine.act) dy = activate_grad(g.affine.act, scale_shift(g.affine, y, c, n), dy);
  if (!g.coef) return dy;
  const float* coef = g.coef + c;
  const V centred = sub(y, load_upto(coef + 2 * channels, n));
  const V rest = fmadd(load_upto(coef + channels, n), centred, load_upto(coef + 3 * channels, n));
  return fmadd(load_upto(coef, n), dy, rest);
}

// Applies an epilogue to a block of results: c [rows][ldc] for pixels from `pixel` on and channels from `channel` on.
// c is left holding scale * c + shift, which is what the statistics are taken of.
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
      z = activate(e.affine.act, z);
      if (residual) z = add(z, load_upto(residual + r * e.residual.ld, n));
      store_upto(out + r * e.out_ld, z, n);
    }
  }
}

}  // namespace
}  // namespace fastcnn
