// Depthwise convolution, forward.
//
// A block stages a window of pixels by up to 128 bytes of channels through the prologue (once per element and
// halo), then each thread makes strips of L outputs for a pair of channels. A warp is 32 pairs of one pixel:
// shared-memory reads and global stores are whole 128-byte lines.
//
// Floor: x read once, y written once (4 bytes per 16-bit output at stride 1), so 3.0 TB/s allow an H100 3.3
// outputs per cycle and multiprocessor. Shared memory and issue allow 8 (3 x 3), 4 (5 x 5), 2.6 (7 x 7, then
// bound by FMA): memory is the bound up to 5 x 5. Halo reads (7 x 28 tiles: 1.4 x) are left to L2.
#include "dispatch.h"
#include "reduce.h"
#include "statistics.cuh"
#include "stencil.cuh"

namespace fastcnn::cuda {
namespace {

// What happens to a pair of results before it is stored.
template <class T>
struct Epilogue {
  LocalAffine<2> affine;
  View residual, y;
  int c, count;
  bool aligned, stats;
  ShiftedSums sums[2];

  FASTCNN_DEVICE void read(const DepthwiseFwd& op, int channel, bool pair_aligned) {
    affine.read(op.out, channel, op.g.c);
    residual = op.residual;
    y = op.y;
    c = channel;
    count = op.g.c - channel;
    aligned = pair_aligned;
    stats = op.mean != nullptr;
  }
  FASTCNN_DEVICE void operator()(float2 v, int64_t pixel) {
    v = affine(v);
    if (residual.data != nullptr) {
      const float2 r =
          load_pair(static_cast<const T*>(residual.data) + pixel * residual.ld + c, count, aligned);
      v.x += r.x;
      v.y += r.y;
    }
    v = affine.after_residual(v);
    store_pair(static_cast<T*>(y.data) + pixel * y.ld + c, v, count, aligned);
    if (stats) {
      // Of the stored values: what the next convolution will normalise.
      sums[0].add(rounded<T>(v.x));
      sums[1].add(rounded<T>(v.y));
    }
  }
};

template <class T, int K, int S, int L>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_fwd_kernel(const DepthwiseFwd op, const DepthwisePlan plan, const Access access) {
  const Geometry& g = op.g;
  T* tile = reinterpret_cast<T*>(dynamic_shared());
  const int cb = plan.cb, c0 = blockIdx.x * cb, pitch = plan.cols * cb;
  float* constants = reinterpret_cast<float*>(tile + plan.rows * pitch);
  float* weights = constants + kInputConstants * cb;
  const int pair = threadIdx.x % (cb / 2), stripe = threadIdx.x / (cb / 2), stripes = kThreads / (cb / 2);

  stage_filter<T>(weights, op.weight, g.r * g.s, cb, c0, g.c);
  InputLoader<T> loader = input_loader<T>(op, c0, cb, access.vectors, access.identity, constants);
  loader.stage_constants();
  __syncthreads();
  Epilogue<T> epilogue;
  epilogue.read(op, c0 + 2 * pair, access.pairs);

  const int strips = plan.tile_h * (plan.tile_w / L);
  for (int index = blockIdx.y; index < plan.tiles; index += gridDim.y) {
    const int across = index % plan.tiles_w, rest = index / plan.tiles_w;
    const int p0 = rest % plan.tiles_h * plan.tile_h, q0 = across * plan.tile_w;
    const int n = rest / plan.tiles_h;
    const Window window = {n,         g.h,      g.w, p0 * g.stride_h - g.pad_h, q0 * g.stride_w - g.pad_w,
                           plan.rows, plan.cols};
    stage(tile, window, cb, loader);
    __syncthreads();
    // Read anew for every tile: held through the staging, the taps would cost a resident block.
    Stencil<T, K, S, L> stencil;
    if (stripe < stripes) stencil.read(weights + 2 * pair, g, cb);
    // Rows first: neighbouring stripes are an odd number of pixels apart, so in different banks.
    for (int strip = stripe; stripe < stripes && strip < strips; strip += stripes) {
      const int row = strip % plan.tile_h, col = strip / plan.tile_h * L;
      if (p0 + row >= g.p || q0 + col >= g.q) continue;
      float2 acc[L];
#pragma unroll
      for (int t = 0; t < L; ++t) acc[t] = make_float2(0.f, 0.f);
      stencil(acc, tile + row * g.stride_h * pitch + col * g.stride_w * cb + 2 * pair, pitch, cb);
      const int64_t pixel = pixel_index(n, g.p, g.q, p0 + row, q0 + col);
#pragma unroll
      for (int t = 0; t < L; ++t) {
        if (q0 + col + t < g.q) epilogue(acc[t], pixel + t);
      }
    }
    __syncthreads();
  }
  if (op.mean != nullptr) {
    store_block_moments(reinterpret_cast<float*>(tile), epilogue.sums, pair, stripe, stripes, cb,
                        op.workspace, blockIdx.y, g.c, c0);
  }
}

template <class T, int K, int S>
void launch_fwd(const DepthwiseFwd& op, const DepthwisePlan& plan, Unrolled<K, S>) {
  constexpr int kStrip = K == 0 ? 4 : 7;  // forward_strip() in plan.cpp
  const Access access = {is_aligned<T>(op.x, kVec<T>),
                         is_aligned<T>(op.y, 2) && is_aligned<T>(op.residual, 2), is_identity(op.in)};
  launch("depthwise_fwd", depthwise_fwd_kernel<T, K, S, kStrip>, dim3(plan.channel_tiles, plan.slices),
         kThreads, plan.shared_bytes, op.stream, op, plan, access);
}

}  // namespace

void depthwise_fwd(const DepthwiseFwd& op, const DepthwisePlan& plan) {
  with_dtype(op.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_unrolled(op.g, [&](auto unrolled) { launch_fwd<T>(op, plan, unrolled); });
  });
  if (op.mean != nullptr) merge_moments(op.workspace, plan.slices, op.g.c, op.mean, op.var, op.stream);
}

}  // namespace fastcnn::cuda
