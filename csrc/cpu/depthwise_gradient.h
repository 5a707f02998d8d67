// The pieces of depthwise backward: a row of dy made on load, a row of dx masked and summed on store, and
// between them the stencil that makes dx and dw from one load of each dy column.
#pragma once

#include "cpu/lanes.h"
#include "cpu/parallel.h"
#include "ops/depthwise.h"

namespace fastcnn {
namespace {

// Positions of the input that a block computes; rows are padded to whole blocks. 16 registers hold less
// than 32.
#if FASTCNN_ISA_LEVEL >= 2
constexpr int kPositions = 7, kParityPositions = 8, kRowsAtOnce = 3;
#else
constexpr int kPositions = 4, kParityPositions = 4, kRowsAtOnce = 1;
#endif

// What the next input row will read and write, fetched into L2 while this one is computed; null: nothing.
struct NextRows {
  const char *x, *dx, *grad, *y;
  int64_t x_step, dx_step, grad_step, y_step;  // bytes from pixel to pixel

  template <int kPixels, int kGradientPixels>
  void fetch() {
    for (int i = 0; x && i < kPixels; ++i, x += x_step) __builtin_prefetch(x, 0, 2);
    for (int i = 0; dx && i < kPixels; ++i, dx += dx_step) __builtin_prefetch(dx, 1, 2);
    for (int i = 0; grad && i < kGradientPixels; ++i, grad += grad_step) __builtin_prefetch(grad, 0, 2);
    for (int i = 0; y && i < kGradientPixels; ++i, y += y_step) __builtin_prefetch(y, 0, 2);
  }
};

// One vector of channels of kRows kernel rows against one input row. dy[r] points at the column that position
// 0 pairs with tap kTaps - 1; weight[r] and dw[r] at the first of kTaps taps.
template <int kRows>
struct Taps {
  const float* dy[kRows];
  const float* weight[kRows];
  float* dw[kRows];
  int64_t step;  // floats between taps of weight and dw
};

// kStride 2: position 0 has the parity of tap 0, so which taps a position sees is known when compiling.
template <int kRows, int kTaps, int kStride, int kBlock>
[[gnu::noinline]] void backward_row(const Taps<kRows>& taps, NextRows& next, int64_t pitch, const float* a,
                                    float* dx, int64_t positions, bool first) {
  const float* at[kRows];
  for (int r = 0; r < kRows; ++r) at[r] = taps.dy[r];
  V dw[kRows][kTaps];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < kTaps; ++s) dw[r][s] = load(taps.dw[r] + s * taps.step);
  for (int64_t i = 0; i < positions; i += kBlock, a += kBlock * pitch, dx += kBlock * pitch) {
    if (first) next.fetch<kBlock, kBlock / kStride>();
    V acc[kBlock], av[kBlock];
#pragma GCC unroll 8
    for (int b = 0; b < kBlock; ++b) {
      av[b] = load(a + b * pitch);
      acc[b] = first ? zero() : load(dx + b * pitch);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float* w = taps.weight[r];
      const float* dy = at[r];
      asm("" : "+r"(w));  // else all rows' taps are hoisted out of the loop and spilled
      V tap[kTaps];
#pragma GCC unroll 8
      for (int s = 0; s < kTaps; ++s) tap[s] = load(w + s * taps.step);
#pragma GCC unroll 16
      for (int j = 0; j <= (kBlock - 1 + kTaps - 1) / kStride; ++j) {
        const V column = load(dy);
        dy += pitch;
        asm("" : "+r"(dy));
#pragma GCC unroll 8
        for (int b = 0; b < kBlock; ++b) {
          const int s = b - kStride * j + kTaps - 1;
          if (s < 0 || s >= kTaps) continue;
          acc[b] = fmadd(column, tap[s], acc[b]);
          dw[r][s] = fmadd(column, av[b], dw[r][s]);
        }
      }
      at[r] += kBlock / kStride * pitch;
    }
#pragma GCC unroll 8
    for (int b = 0; b < kBlock; ++b) store(dx + b * pitch, acc[b]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < kTaps; ++s) store(taps.dw[r] + s * taps.step, dw[r][s]);
}

// dy of neighbouring outputs, `step` floats from one to the next at dst. Out of line, with its strides by
// value: inlined into the walk over rows GCC kept them in memory, at three times the cost.
template <class T, int kAct, bool kCoef>
[[gnu::noinline]] void fill_gradient(const GradientPrologue g, int64_t channels, int64_t pixel,
                                     int64_t columns, int64_t c0, int64_t count, float* to, int64_t step) {
  const T* grads = static_cast<const T*>(g.grad.data) + pixel * g.grad.ld + c0;
  const T* ys = static_cast<const T*>(g.y.data) + pixel * g.y.ld + c0;
  for_pixels(columns, [&](int64_t pixel, auto pixels) {
    constexpr int kPixels = decltype(pixels)::value;
    for_lanes(count, [&](int64_t c, auto lanes) {
      const V scale = kAct && g.affine.scale ? lanes.get(g.affine.scale + c0 + c) : set(1.0f);
      const V shift = kAct && g.affine.shift ? lanes.get(g.affine.shift + c0 + c) : zero();
      V coef[4];
      for (int k = 0; kCoef && k < 4; ++k) coef[k] = lanes.get(g.coef + k * channels + c0 + c);
      const T* grad = grads + pixel * g.grad.ld + c;
      const T* y = ys + pixel * g.y.ld + c;
      float* dst = to + pixel * step + c;
#pragma GCC unroll 4
      for (int i = 0; i < kPixels; ++i, grad += g.grad.ld, y += g.y.ld, dst += step) {
        V dy = lanes.get(grad);
        V value = zero();
        if (kAct || kCoef) value = lanes.get(y);
        if (kAct) dy = activate_grad(kAct, fmadd(value, scale, shift), dy);
        if (kCoef) dy = fmadd(coef[0], dy, fmadd(coef[1], sub(value, coef[2]), coef[3]));
        store(dst, dy);
      }
    });
  });
}

// One row of dx from `from` on: masked by the input's prologue, summed into sums [2][sums_pitch], stored.
template <class T, int kAct, bool kSums, bool kStreamed>
[[gnu::noinline]] void store_gradient(const BackwardInput input, const T* xs, const float* from,
                                      int64_t pitch, T* to, int64_t to_ld, int64_t columns, int64_t c0,
                                      int64_t count, float* sums, int64_t sums_pitch) {
  for_pixels(columns, [&](int64_t pixel, auto pixels) {
    constexpr int kPixels = decltype(pixels)::value;
    for_lanes<kStreamed>(count, [&](int64_t c, auto lanes) {
      const V scale = kAct && input.affine.scale ? lanes.get(input.affine.scale + c0 + c) : set(1.0f);
      const V shift = kAct && input.affine.shift ? lanes.get(input.affine.shift + c0 + c) : zero();
      const V mean = kSums && input.mean ? lanes.get(input.mean + c0 + c) : zero();
      V s0 = kSums ? load(sums + c) : zero(), s1 = kSums ? load(sums + sums_pitch + c) : zero();
      const T* x = xs + pixel * input.x.ld + c0 + c;
      const float* dx = from + pixel * pitch + c;
      T* out = to + pixel * to_ld + c;
#pragma GCC unroll 4
      for (int i = 0; i < kPixels; ++i, x += input.x.ld, dx += pitch, out += to_ld) {
        V v = load(dx), value = zero();
        if (kAct || kSums) value = lanes.get(x);
        if (kAct) v = activate_grad(kAct, fmadd(value, scale, shift), v);
        if (kSums) s0 = add(s0, v);
        if (kSums) s1 = fmadd(v, sub(value, mean), s1);
        lanes.put(out, v);
      }
      if (kSums) store(sums + c, s0);
      if (kSums) store(sums + sums_pitch + c, s1);
    });
  });
}

}  // namespace
}  // namespace fastcnn
