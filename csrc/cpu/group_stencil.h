// Narrow groups (ResNeXt) as a stencil over whole vectors: a vector holds several groups, and a product's
// left operand is one lane of each group spread over the group. No lane multiplies a zero, as it would in a
// block-diagonal product.
#pragma once

#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "ops/conv2d.h"

namespace fastcnn {
namespace {

constexpr int kGroupTaps = 3;  // of a kernel row

inline bool takes_group_stencil(const Conv2dShape& s) {
  const int64_t width = s.channels / s.groups;
  return s.groups > 1 && s.channels == s.n && (width == 4 || width == 8) && width <= kLanes &&
         s.kernel_w == kGroupTaps && s.dilation_w == 1 && s.stride_w <= 2;
}

// Weights lie as [vector of channels][kernel_h][lane of the group][kernel_w][kLanes].
inline int64_t group_weight_floats(const Conv2dShape& s) {
  return ceil_div(s.channels, kLanes) * s.taps() * (s.channels / s.groups) * kLanes;
}

constexpr int kWidestGroup = 8;

// c[q * ldc] = kOutputs neighbouring outputs of one vector of channels, in groups of `width`. The first
// column of a kernel row lies `lines[row]` floats from x, `pitch` before the next column.
// Lanes of a group are taken one after the other: a column's three products go to three outputs, and the next
// lane's wait for none of them.
template <int kStride, int kOutputs>
void group_outputs(const float* x, const int64_t* lines, int64_t pitch, int kernel_h, int width,
                   const float* weight, float* c, int64_t ldc) {
  LaneIndex lanes[kWidestGroup];
  for (int j = 0; j < width; ++j) lanes[j] = group_lane(width, j);
  V acc[kOutputs];
#pragma GCC unroll 16
  for (int q = 0; q < kOutputs; ++q) acc[q] = zero();
  for (int kh = 0; kh < kernel_h; ++kh)
    for (int j = 0; j < width; ++j, weight += kGroupTaps * kLanes) {
      const LaneIndex lane = lanes[j];
      V tap[kGroupTaps];
#pragma GCC unroll 3
      for (int kw = 0; kw < kGroupTaps; ++kw) tap[kw] = load(weight + kw * kLanes);
      const float* at = x + lines[kh];
#pragma GCC unroll 32
      for (int column = 0; column < (kOutputs - 1) * kStride + kGroupTaps; ++column, at += pitch) {
        const V a = spread(load(at), lane);
#pragma GCC unroll 3
        for (int kw = 0; kw < kGroupTaps; ++kw) {
          const int q = (column - kw) / kStride;
          if (column >= kw && (column - kw) % kStride == 0 && q < kOutputs)
            acc[q] = fmadd(a, tap[kw], acc[q]);
        }
      }
    }
#pragma GCC unroll 16
  for (int q = 0; q < kOutputs; ++q) store(c + q * ldc, acc[q]);
}

// acc of one kernel row, [kw][lane][kLanes], over a line of pixels: dW += dy x.
template <int kGroup>
void group_weight_row(const float* dy, int64_t dy_pitch, const float* x, int64_t x_step, int64_t x_pitch,
                      int64_t pixels, float* dw) {
  LaneIndex lanes[kGroup];
#pragma GCC unroll 8
  for (int j = 0; j < kGroup; ++j) lanes[j] = group_lane(kGroup, j);
  V acc[kGroupTaps * kGroup];
#pragma GCC unroll 24
  for (int i = 0; i < kGroupTaps * kGroup; ++i) acc[i] = load(dw + i * kLanes);
  for (int64_t q = 0; q < pixels; ++q, dy += dy_pitch, x += x_step) {
    const V g = load(dy);
#pragma GCC unroll 3
    for (int kw = 0; kw < kGroupTaps; ++kw) {
      const V v = load(x + kw * x_pitch);
#pragma GCC unroll 8
      for (int j = 0; j < kGroup; ++j)
        acc[kw * kGroup + j] = fmadd(spread(v, lanes[j]), g, acc[kw * kGroup + j]);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < kGroupTaps * kGroup; ++i) store(dw + i * kLanes, acc[i]);
}

}  // namespace
}  // namespace fastcnn
