// Backward passes over memory at the ends of a chain: a gradient's two sums, a gradient prologue written out,
// and an activation after a residual. Bound by memory.
#include "cpu/by_dtype.h"
#include "cpu/epilogue.h"
#include "cpu/kernels.h"
#include "cpu/lanes.h"

namespace fastcnn {
namespace {

// f(first, count, unit) for units of pixels.
template <class F>
void for_units(int64_t pixels, const F& f) {
  parallel_for(ceil_div(pixels, kUnitPixels), [&](int64_t unit) {
    const int64_t first = unit * kUnitPixels;
    f(first, pixels - first < kUnitPixels ? pixels - first : kUnitPixels, unit);
  });
}

// sums [2][pitch] of one unit, from channel c on.
template <class T, int kPixels, int kAct, class Lanes>
inline void sums_vector(const AffineActSums& p, int64_t pixel, int64_t c, float* sums, int64_t pitch,
                        const Lanes& lanes) {
  const V scale = kAct && p.affine.scale ? lanes.get(p.affine.scale + c) : set(1.0f);
  const V shift = kAct && p.affine.shift ? lanes.get(p.affine.shift + c) : zero();
  const V mean = p.mean ? lanes.get(p.mean + c) : zero();
  const T* grad = static_cast<const T*>(p.grad.data) + pixel * p.grad.ld + c;
  const T* y = static_cast<const T*>(p.y.data) + pixel * p.y.ld + c;
  V s0 = zero(), s1 = zero();
#pragma GCC unroll 4
  for (int i = 0; i < kPixels; ++i) {
    const V value = lanes.get(y + i * p.y.ld);
    V dz = lanes.get(grad + i * p.grad.ld);
    if (kAct) dz = activate_grad(kAct, fmadd(value, scale, shift), dz);
    s0 = add(s0, dz);
    s1 = fmadd(dz, sub(value, mean), s1);
  }
  store(sums + c, add(load(sums + c), s0));
  store(sums + pitch + c, add(load(sums + pitch + c), s1));
}

template <class T>
void sums(const AffineActSums& p) {
  const int64_t units = ceil_div(p.pixels, kUnitPixels), pitch = round_up(p.channels, 16);
  AlignedBuffer<float> parts(size_t(units * 2 * pitch) + 1);
  for_units(p.pixels, [&](int64_t first, int64_t count, int64_t unit) {
    float* part = parts.data() + unit * 2 * pitch;
    std::memset(part, 0, size_t(2 * pitch) * sizeof(float));
    with_activation(p.affine.act, [&](auto act) {
      for_pixels(count, [&](int64_t i, auto pixels) {
        for_lanes(p.channels, [&](int64_t c, auto lanes) {
          sums_vector<T, pixels(), act()>(p, first + i, c, part, pitch, lanes);
        });
      });
    });
  });
  merge_sums(parts.data(), units, p.channels, pitch, p.sums);
}

template <class T>
void data_gradient(const AffineActDataGradient& p) {
  with_gradient<T>(p.gradient, p.channels, [&](const auto& gradient) {
    for_units(p.pixels, [&](int64_t first, int64_t count, int64_t) {
      for (int64_t pixel = first; pixel < first + count; ++pixel) {
        const T* residual = static_cast<const T*>(p.residual.data);
        if (residual) residual += pixel * p.residual.ld;
        T* dx = static_cast<T*>(p.dx) + pixel * p.dx_ld;
        for_lanes(p.channels, [&](int64_t c, auto lanes) {
          const V dy = gradient.at(c)(pixel);
          lanes.put(dx + c, residual ? add(dy, lanes.get(residual + c)) : dy);
        });
      }
    });
  });
}

// dz at kPixels pixels from channel c on, and its share of sums [2][pitch] (null: none). With `bounds` the
// derivative is known from the output.
template <class T, int kPixels, class Lanes>
inline void residual_vector(const ResidualActBackward& p, const Bounds& bounds, int64_t pixel, int64_t c,
                            float* sums, int64_t pitch, const Lanes& lanes) {
  const T* grad = static_cast<const T*>(p.grad.data) + pixel * p.grad.ld + c;
  const T* out = static_cast<const T*>(p.out.data) + pixel * p.out.ld + c;
  const T* y = static_cast<const T*>(p.y.data) + pixel * p.y.ld + c;
  T* dz = static_cast<T*>(p.dz) + pixel * p.dz_ld + c;
  const V mean = p.mean ? lanes.get(p.mean + c) : zero();
  V s0 = zero(), s1 = zero();
#pragma GCC unroll 4
  for (int i = 0; i < kPixels; ++i) {
    const V g = bounds.mask(lanes.get(out + i * p.out.ld), lanes.get(grad + i * p.grad.ld));
    lanes.put(dz + i * p.dz_ld, g);
    if (!sums) continue;
    s0 = add(s0, g);
    s1 = fmadd(g, sub(lanes.get(y + i * p.y.ld), mean), s1);
  }
  if (!sums) return;
  store(sums + c, add(load(sums + c), s0));
  store(sums + pitch + c, add(load(sums + pitch + c), s1));
}

template <class T>
void residual_backward(const ResidualActBackward& p) {
  const int64_t units = ceil_div(p.pixels, kUnitPixels), pitch = round_up(p.channels, 16);
  AlignedBuffer<float> parts(p.sums ? size_t(units * 2 * pitch) + 1 : 1);
  const Bounds bounds(p.act);
  for_units(p.pixels, [&](int64_t first, int64_t count, int64_t unit) {
    float* part = p.sums ? parts.data() + unit * 2 * pitch : nullptr;
    if (part) std::memset(part, 0, size_t(2 * pitch) * sizeof(float));
    for_pixels(count, [&](int64_t i, auto pixels) {
      for_lanes(p.channels, [&](int64_t c, auto lanes) {
        residual_vector<T, pixels()>(p, bounds, first + i, c, part, pitch, lanes);
      });
    });
  });
  if (p.sums) merge_sums(parts.data(), units, p.channels, pitch, p.sums);
}

void affine_act_sums(const AffineActSums& p) {
  by_dtype(p.dtype, &Kernels::affine_act_sums, p, [&](auto t) { sums<decltype(t)>(p); });
}

void affine_act_data_gradient(const AffineActDataGradient& p) {
  by_dtype(p.dtype, &Kernels::affine_act_data_gradient, p, [&](auto t) { data_gradient<decltype(t)>(p); });
}

void residual_act_backward(const ResidualActBackward& p) {
  by_dtype(p.dtype, &Kernels::residual_act_backward, p, [&](auto t) { residual_backward<decltype(t)>(p); });
}

}  // namespace

namespace FASTCNN_ISA {
void register_affine_act_backward(Kernels& k) {
  k.affine_act_sums = affine_act_sums;
  k.affine_act_data_gradient = affine_act_data_gradient;
  k.residual_act_backward = residual_act_backward;
}
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
