// What the unrolled and the generic backward kernels share: x's side of
// the gradients, and the sums of its dz.
#pragma once

#include "plan.h"
#include "tile.cuh"

namespace fastcnn::cuda {

// For any filter, stride, dilation and multiplier (depthwise_bwd_generic.cu).
void launch_depthwise_bwd_generic(const DepthwiseBwd& op, const DepthwisePlan& plan, const Access& access);

template <class T>
FASTCNN_DEVICE GradientLoader<T> gradient_loader(const DepthwiseBwd& op, int c0, int cb, int member,
                                                 const Access& access, float* table) {
  GradientLoader<T> loader;
  loader.grad = op.grad;
  loader.y = op.y;
  loader.out = op.out;
  loader.coef = op.coef;
  loader.c0 = c0;
  loader.channels = op.g.k;
  loader.multiplier = op.g.c / op.g.k;
  loader.member = member;
  loader.cb = cb;
  loader.aligned = access.vectors;
  loader.table = table;
  return loader;
}

// A pair of channels of x: activated on the way in; on the way out dx is masked by the activation's
// derivative, stored, and summed.
template <class T>
struct InputGradient {
  View x, dx;
  int height, width, c, count;
  bool aligned, identity, with_sums;
  LocalAffine<2> affine;
  float mean[2];
  float2 sums[2];

  FASTCNN_DEVICE void read(const DepthwiseBwd& op, int channel, const Access& access) {
    x = op.x;
    dx = op.dx;
    height = op.g.h;
    width = op.g.w;
    c = channel;
    count = op.g.k - channel;
    aligned = access.pairs;
    identity = access.identity;
    with_sums = op.sums != nullptr;
    affine.read(op.in, c, op.g.k);
#pragma unroll
    for (int i = 0; i < 2; ++i) mean[i] = channel_value(op.x_mean, c + i, i < count, 0.f);
    sums[0] = sums[1] = make_float2(0.f, 0.f);
  }
  FASTCNN_DEVICE bool exists(int h, int w) const {
    return h >= 0 && h < height && w >= 0 && w < width && count > 0;
  }
  FASTCNN_DEVICE int64_t pixel(int n, int h, int w) const { return pixel_index(n, height, width, h, w); }
  FASTCNN_DEVICE float2 raw(int64_t at) const {
    return load_pair(static_cast<const T*>(x.data) + at * x.ld + c, count, aligned);
  }
  FASTCNN_DEVICE float2 activated(int64_t at) const {
    const float2 v = raw(at);
    return identity ? v : affine(v);
  }
  // x is read again rather than held: a cache hit against registers that the tap loop needs.
  FASTCNN_DEVICE void store(float2 v, int64_t at) {
    float2 xv = make_float2(0.f, 0.f);
    if (affine.act != kNone || with_sums) xv = raw(at);
    if (affine.act != kNone) {
      v.x *= activation_derivative(affine.affine(xv.x, 0), affine.act);
      v.y *= activation_derivative(affine.affine(xv.y, 1), affine.act);
    }
    store_pair(static_cast<T*>(dx.data) + at * dx.ld + c, v, count, aligned);
    if (!with_sums) return;
    v = make_float2(rounded<T>(v.x), rounded<T>(v.y));
    sums[0].x += v.x;
    sums[0].y += v.y;
    sums[1].x = fmaf(v.x, xv.x - mean[0], sums[1].x);
    sums[1].y = fmaf(v.y, xv.y - mean[1], sums[1].y);
  }
};

// Workspace: weight gradients [slices][taps][c], then sums [slices][2][k].
FASTCNN_HOST_DEVICE float* sums_partials(const DepthwiseBwd& op, const DepthwisePlan& plan, int64_t slice) {
  const Geometry& g = op.g;
  return op.workspace + int64_t(plan.slices) * g.r * g.s * g.c + slice * 2 * g.k;
}

// Sums over the block's stripes into partials [2][channels]. `shared` has room for 4 * blockDim.x floats.
FASTCNN_DEVICE void store_block_sums(float* shared, const float2 (&sums)[2], int pair, int stripe,
                                     int stripes, int cb, float* partials, int channels, int c0) {
  __syncthreads();
  if (stripe < stripes) {
#pragma unroll
    for (int i = 0; i < 2; ++i) store_pair(shared + (stripe * 2 + i) * cb + 2 * pair, sums[i]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * cb; i += blockDim.x) {
    const int c = c0 + i % cb;
    float sum = 0.f;
    for (int j = 0; j < stripes; ++j) sum += shared[j * 2 * cb + i];
    if (c < channels) partials[int64_t(i / cb) * channels + c] = sum;
  }
}

}  // namespace fastcnn::cuda
