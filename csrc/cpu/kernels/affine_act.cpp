// Scale-shift-activation-residual in one pass, and the two sums of its gradient. Bound by memory.
#include "cpu/epilogue.h"
#include "cpu/kernels.h"
#include "cpu/lanes.h"

namespace fastcnn {
namespace {

constexpr int64_t kUnitPixels = 1024;  // bounds the error of a unit's float sums

template <class T, int kPixels, int kAct, class Lanes>
inline void forward_vector(const AffineActForward& p, int64_t pixel, int64_t c, const Lanes& lanes) {
  const Epilogue& e = p.epilogue;
  const V scale = e.affine.scale ? lanes.get(e.affine.scale + c) : set(1.0f);
  const V shift = e.affine.shift ? lanes.get(e.affine.shift + c) : zero();
  const T* y = static_cast<const T*>(p.y.data) + pixel * p.y.ld + c;
  const T* residual = static_cast<const T*>(e.residual.data);
  if (residual) residual += pixel * e.residual.ld + c;
  T* out = static_cast<T*>(e.out) + pixel * e.out_ld + c;
#pragma GCC unroll 4
  for (int i = 0; i < kPixels; ++i) {
    V v = activate(kAct, fmadd(lanes.get(y + i * p.y.ld), scale, shift));
    if (residual) v = add(v, lanes.get(residual + i * e.residual.ld));
    lanes.put(out + i * e.out_ld, v);
  }
}

template <class T>
void forward(const AffineActForward& p) {
  parallel_for(ceil_div(p.pixels, kUnitPixels), [&](int64_t unit) {
    const int64_t first = unit * kUnitPixels;
    const int64_t count = p.pixels - first < kUnitPixels ? p.pixels - first : kUnitPixels;
    with_activation(p.epilogue.affine.act, [&](auto act) {
      for_pixels(count, [&](int64_t i, auto pixels) {
        for_lanes(p.channels,
                  [&](int64_t c, auto lanes) { forward_vector<T, pixels(), act()>(p, first + i, c, lanes); });
      });
    });
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
  V s0 = load(sums + c), s1 = load(sums + pitch + c);
#pragma GCC unroll 4
  for (int i = 0; i < kPixels; ++i) {
    const V value = lanes.get(y + i * p.y.ld);
    V dz = lanes.get(grad + i * p.grad.ld);
    if (kAct) dz = activate_grad(kAct, fmadd(value, scale, shift), dz);
    s0 = add(s0, dz);
    s1 = fmadd(dz, sub(value, mean), s1);
  }
  store(sums + c, s0);
  store(sums + pitch + c, s1);
}

template <class T>
void sums(const AffineActSums& p) {
  const int64_t units = ceil_div(p.pixels, kUnitPixels), pitch = round_up(p.channels, 16);
  AlignedBuffer<float> parts(size_t(units * 2 * pitch) + 1);
  parallel_for(units, [&](int64_t unit) {
    const int64_t first = unit * kUnitPixels;
    const int64_t count = p.pixels - first < kUnitPixels ? p.pixels - first : kUnitPixels;
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

void affine_act_forward(const AffineActForward& p) {
  if (p.dtype == kFloat32)
    forward<float>(p);
  else
    forward<bf16>(p);
}

void affine_act_sums(const AffineActSums& p) {
  if (p.dtype == kFloat32)
    sums<float>(p);
  else
    sums<bf16>(p);
}

}  // namespace

namespace FASTCNN_ISA {
void register_affine_act(Kernels& k) {
  k.affine_act_forward = affine_act_forward;
  k.affine_act_sums = affine_act_sums;
}
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
