// Scale-shift-activation-residual in one pass, and a tensor's own statistics. Bound by memory.
#include "cpu/by_dtype.h"
#include "cpu/epilogue.h"
#include "cpu/kernels.h"
#include "cpu/lanes.h"

namespace fastcnn {
namespace {

template <class T, int kPixels, int kAct, bool kLast, class Lanes>
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
    V v = fmadd(lanes.get(y + i * p.y.ld), scale, shift);
    if (!kLast) v = activate(kAct, v);
    if (residual) v = add(v, lanes.get(residual + i * e.residual.ld));
    if (kLast) v = activate(kAct, v);
    lanes.put(out + i * e.out_ld, v);
  }
}

template <class T, bool kLast>
void forward(const AffineActForward& p) {
  parallel_for(ceil_div(p.pixels, kUnitPixels), [&](int64_t unit) {
    const int64_t first = unit * kUnitPixels;
    const int64_t count = p.pixels - first < kUnitPixels ? p.pixels - first : kUnitPixels;
    with_activation(p.epilogue.affine.act, [&](auto act) {
      for_pixels(count, [&](int64_t i, auto pixels) {
        for_lanes(p.channels, [&](int64_t c, auto lanes) {
          forward_vector<T, pixels(), act(), kLast>(p, first + i, c, lanes);
        });
      });
    });
  });
}

// Shifted sums [3][pitch] of one unit (StatisticsUnit), from channel c on.
template <class T, int kPixels, class Lanes>
inline void statistics_vector(const ChannelStatistics& p, int64_t pixel, int64_t c,
                              const StatisticsUnit& unit, const Lanes& lanes) {
  const T* x = static_cast<const T*>(p.x.data) + pixel * p.x.ld + c;
  const V base = load(unit.shift + c);
  V s = zero(), q = zero();
#pragma GCC unroll 4
  for (int i = 0; i < kPixels; ++i) {
    const V d = sub(lanes.get(x + i * p.x.ld), base);
    s = add(s, d);
    q = fmadd(d, d, q);
  }
  unit.put(c, base, s, q, false);
}

constexpr int64_t kShiftPixels = 16;

// Shifts a unit's sums by the mean of its first pixels. A single pixel is a deviation away from the mean: the
// sum would grow by that with every pixel, and round accordingly.
template <class T>
void shift_to_first_pixels(const ChannelStatistics& p, int64_t first, int64_t count,
                           const StatisticsUnit& unit) {
  const int64_t pixels = count < kShiftPixels ? count : kShiftPixels;
  for_lanes(p.channels, [&](int64_t c, auto lanes) {
    const T* x = static_cast<const T*>(p.x.data) + first * p.x.ld + c;
    const V base = lanes.get(x);
    V sum = zero();
    for (int64_t i = 1; i < pixels; ++i) sum = add(sum, sub(lanes.get(x + i * p.x.ld), base));
    store(unit.shift + c, fmadd(sum, set(1.0f / float(pixels)), base));
  });
}

template <class T>
void statistics(const ChannelStatistics& p) {
  const int64_t units = ceil_div(p.pixels, kUnitPixels), pitch = round_up(p.channels, 16);
  const auto pixels_of = [&](int64_t unit) {
    const int64_t rest = p.pixels - unit * kUnitPixels;
    return rest < kUnitPixels ? rest : kUnitPixels;
  };
  AlignedBuffer<float> parts(size_t(units * 3 * pitch) + 1);
  parallel_for(units, [&](int64_t index) {
    float* part = parts.data() + index * 3 * pitch;
    const StatisticsUnit unit{part, part + pitch, part + 2 * pitch};
    const int64_t first = index * kUnitPixels;
    std::memset(part, 0, size_t(3 * pitch) * sizeof(float));
    shift_to_first_pixels<T>(p, first, pixels_of(index), unit);
    for_pixels(pixels_of(index), [&](int64_t i, auto pixels) {
      for_lanes(p.channels,
                [&](int64_t c, auto lanes) { statistics_vector<T, pixels()>(p, first + i, c, unit, lanes); });
    });
  });
  merge_statistics(parts.data(), units, pixels_of, p.channels, pitch, p.mean, p.var);
}

template <class T>
void forward(const AffineActForward& p) {
  p.epilogue.act_last ? forward<T, true>(p) : forward<T, false>(p);
}

void affine_act_forward(const AffineActForward& p) {
  by_dtype(p.dtype, &Kernels::affine_act_forward, p, [&](auto t) { forward<decltype(t)>(p); });
}

void channel_statistics(const ChannelStatistics& p) {
  by_dtype(p.dtype, &Kernels::channel_statistics, p, [&](auto t) { statistics<decltype(t)>(p); });
}

}  // namespace

namespace FASTCNN_ISA {
void register_affine_act(Kernels& k) {
  k.affine_act_forward = affine_act_forward;
  k.channel_statistics = channel_statistics;
}
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
