// Staging: a window of pixels by `cb` channels from global to shared memory, through a prologue, zeros
// outside the image.
#pragma once

#include "plan.h"
#include "prologue_epilogue.cuh"

namespace fastcnn::cuda {

// Pixels [h0, h0 + rows) x [w0, w0 + cols) of image n of a tensor [*,
// height, width, *]; h0 and w0 may be negative.
struct Window {
  int n;
  int height, width;
  int h0, w0, rows, cols;
};

FASTCNN_DEVICE int64_t pixel_index(int n, int height, int width, int h, int w) {
  return (int64_t(n) * height + h) * width + w;
}

// Whether groups of `elements` channels can be accessed at once; an absent operand never objects.
template <class T>
bool is_aligned(const View& v, int elements) {
  return v.data == nullptr ||
         (reinterpret_cast<uintptr_t>(v.data) % (elements * sizeof(T)) == 0 && v.ld % elements == 0);
}

// How a launch may touch memory: 16-byte vectors when staging, pairs
// elsewhere, and whether there is a prologue.
struct Access {
  bool vectors, pairs, identity;
};

// Reads x through its prologue. Channel c of the tile is channel (c0 + c) / multiplier of x. The prologue's
// scale and shift are in shared memory, [2][cb]: in registers they would be 16 per thread.
template <class T>
struct InputLoader {
  using Raw = Vector<T>;
  static constexpr int kBatch = 4;
  View x;
  ChannelAffine in;
  int c0, channels, multiplier;  // channels: of the tile's tensor, x's times the multiplier
  int cb;
  bool aligned, identity;
  float* table;

  int count;
  const T* base;
  const float* constants;

  // Fills the table; all threads call, and a barrier follows.
  FASTCNN_DEVICE void stage_constants() const {
    for (int i = threadIdx.x; i < 2 * cb && !identity; i += blockDim.x) {
      const int c = c0 + i % cb;
      const bool is_scale = i < cb;
      table[i] =
          channel_value(is_scale ? in.scale : in.shift, c / multiplier, c < channels, is_scale ? 1.f : 0.f);
    }
  }
  // Fixes the thread's vector of channels.
  FASTCNN_DEVICE void select(int vector) {
    const int c = c0 + vector * kVec<T>;
    count = channels - c;
    base = static_cast<const T*>(x.data) + (multiplier == 1 ? c : 0);
    constants = table + vector * kVec<T>;
  }
  FASTCNN_DEVICE Raw fetch(int64_t pixel, int vector) const {
    const T* at = base + pixel * x.ld;
    if (multiplier == 1) return load_vector(at, count, aligned);
    Raw raw;
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) {
      raw.at[i] = i < count ? at[(c0 + vector * kVec<T> + i) / multiplier] : from_float<T>(0.f);
    }
    return raw;
  }
  FASTCNN_DEVICE Vector<T> finish(const Raw& raw) const {
    if (identity) return raw;
    Vector<T> v;
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) {
      v.at[i] = from_float<T>(activate(fmaf(constants[i], to_float(raw.at[i]), constants[cb + i]), in.act));
    }
    return v;
  }
};

// Of the forward ops' parameters.
template <class T, class Op>
FASTCNN_DEVICE InputLoader<T> input_loader(const Op& op, int c0, int cb, bool aligned, bool identity,
                                           float* table) {
  InputLoader<T> loader;
  loader.x = op.x;
  loader.in = op.in;
  loader.c0 = c0;
  loader.channels = op.g.c;
  loader.multiplier = op.g.c / op.g.k;
  loader.cb = cb;
  loader.aligned = aligned;
  loader.identity = identity;
  loader.table = table;
  return loader;
}

// Reads dy = coef[0] dz + coef[1] (y - coef[2]) + coef[3], dz = grad * act'(scale y + shift). Channel c of
// the tile is channel (c0 + c) * multiplier + member of grad.
template <class T>
struct GradientLoader {
  struct Raw {
    Vector<T> grad, y;
  };
  static constexpr int kBatch = 2;
  View grad, y;
  ChannelAffine out;
  const float* coef;
  int c0, channels, multiplier, member;  // channels: of x
  int cb;
  bool aligned;
  float* table;  // [kGradientConstants][cb]

  int count, first;
  const float* constants;

  // Fills the table; all threads call, and a barrier follows.
  FASTCNN_DEVICE void stage_constants() const {
    if (y.data == nullptr) return;
    for (int i = threadIdx.x; i < kGradientConstants * cb; i += blockDim.x) {
      const int c = c0 + i % cb, j = i / cb, source = c * multiplier + member;
      const float* values = j == 0 ? out.scale : (j == 1 ? out.shift : coef);
      const int row = j < 2 || coef == nullptr ? 0 : j - 2;
      table[i] = channel_value(values, row * channels * multiplier + source, c < channels,
                               j == 0 || j == 2 ? 1.f : 0.f);
    }
  }
  FASTCNN_DEVICE void select(int vector) {
    const int c = c0 + vector * kVec<T>;
    count = channels - c;
    first = c * multiplier + member;
    constants = table + vector * kVec<T>;
  }
  FASTCNN_DEVICE Vector<T> fetch(const View& v, int64_t pixel) const {
    const T* at = static_cast<const T*>(v.data) + pixel * v.ld + first;
    if (multiplier == 1) return load_vector(at, count, aligned);
    Vector<T> raw;
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) raw.at[i] = i < count ? at[i * multiplier] : from_float<T>(0.f);
    return raw;
  }
  FASTCNN_DEVICE Raw fetch(int64_t pixel, int) const {
    Raw raw;
    raw.grad = fetch(grad, pixel);
    if (y.data != nullptr) raw.y = fetch(y, pixel);
    return raw;
  }
  FASTCNN_DEVICE Vector<T> finish(const Raw& raw) const {
    if (y.data == nullptr) return raw.grad;
    Vector<T> v;
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) {
      const float yi = to_float(raw.y.at[i]), z = fmaf(constants[i], yi, constants[cb + i]);
      float dy = to_float(raw.grad.at[i]) * activation_derivative(z, out.act);
      // y - mean first: the difference keeps the digits that a folded coef[3] - coef[1] coef[2] would lose.
      const float centred = yi - constants[4 * cb + i];
      dy = fmaf(constants[2 * cb + i], dy, fmaf(constants[3 * cb + i], centred, constants[5 * cb + i]));
      v.at[i] = from_float<T>(dy);
    }
    return v;
  }
};

// tile [rows][cols][cb]. A thread keeps its vector of channels and walks
// over pixels, kBatch loads in flight at once.
template <class T, class Loader>
FASTCNN_DEVICE void stage(T* tile, const Window& win, int cb, Loader& loader) {
  constexpr int kBatch = Loader::kBatch;
  const int vectors = cb / kVec<T>, vector = threadIdx.x % vectors, step = blockDim.x / vectors;
  const int pixels = win.rows * win.cols, first = threadIdx.x / vectors;
  if (first >= step) return;
  loader.select(vector);
  const int step_row = step / win.cols, step_col = step % win.cols;
  int row = first / win.cols, col = first % win.cols;
  for (int pixel = first; pixel < pixels; pixel += kBatch * step) {
    typename Loader::Raw raw[kBatch];
    bool inside[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int h = win.h0 + row, w = win.w0 + col;
      inside[i] = pixel + i * step < pixels && h >= 0 && h < win.height && w >= 0 && w < win.width;
      if (inside[i]) raw[i] = loader.fetch(pixel_index(win.n, win.height, win.width, h, w), vector);
      row += step_row;
      col += step_col;
      if (col >= win.cols) {
        col -= win.cols;
        ++row;
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (pixel + i * step >= pixels) break;
      Vector<T> v;
      v.words = make_uint4(0, 0, 0, 0);
      if (inside[i]) v = loader.finish(raw[i]);
      *reinterpret_cast<uint4*>(tile + (int64_t(pixel + i * step) * cb + vector * kVec<T>)) = v.words;
    }
  }
}

// The filter of channels [c0, c0 + cb) as float [tap][cb], zeros past the last channel. Reads are contiguous.
// Tile channel c is filter row (c0 + c) * multiplier + member.
template <class T>
FASTCNN_DEVICE void stage_filter(float* shared, const Filter& filter, int taps, int cb, int c0, int channels,
                                 int multiplier = 1, int member = 0) {
  for (int i = threadIdx.x; i < taps * cb; i += blockDim.x) {
    const int c = i / taps, tap = i % taps;
    float v = 0.f;
    if (c0 + c < channels) {
      const int64_t at = (int64_t(c0 + c) * multiplier + member) * taps + tap;
      v = filter.is_float32 ? static_cast<const float*>(filter.data)[at]
                            : to_float(static_cast<const T*>(filter.data)[at]);
    }
    shared[tap * cb + c] = v;
  }
}

}  // namespace fastcnn::cuda
