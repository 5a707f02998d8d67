// Depthwise convolution, both gradients in one pass over dy and x.
//
// With input pixel h = S m + phase - pad and tap r = phase + S j, the one output that pairs with (h, r) is p
// = m - j:
//     dx[h] += w[r] dy[p],     dw[r] += a[h] dy[p]
// A thread owns the S x S phases of a strip of L positions m for a pair of channels, so every index is known
// at compile time for any stride; dy is staged with its halo through the gradient prologue, x is read once
// and without one. The weight gradient of all K x K taps stays in registers over every tile that the block
// visits; then stripes are summed in shared memory and blocks by sum_partials, in a fixed order.
//
// Floor: grad, y and x read, dx written: 8 bytes per 16-bit element at stride 1, 1.7 elements per cycle and
// multiprocessor at 3.0 TB/s; issue allows 5 (3 x 3), 2 (5 x 5), 1 (7 x 7, bound by its 98 FMA).
#include "depthwise_bwd.cuh"
#include "dispatch.h"
#include "reduce.h"

namespace fastcnn::cuda {
namespace {

// Sums a pair's weight gradients over the block's stripes, a row of K
// taps at a time, into partials [taps][channels].
template <int K>
FASTCNN_DEVICE void store_block_weights(float* shared, const float2 (&dw)[K * K], int pair, int stripe,
                                        int stripes, int cb, float* partials, int channels, int c0) {
#pragma unroll
  for (int r = 0; r < K; ++r) {
    __syncthreads();
    if (stripe < stripes) {
#pragma unroll
      for (int s = 0; s < K; ++s) store_pair(shared + (stripe * K + s) * cb + 2 * pair, dw[r * K + s]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < K * cb; i += blockDim.x) {
      const int c = c0 + i % cb;
      float sum = 0.f;
      for (int j = 0; j < stripes; ++j) sum += shared[j * K * cb + i];
      if (c < channels) partials[int64_t(r * K + i / cb) * channels + c] = sum;
    }
  }
}

// Threads per block, and blocks per multiprocessor that the register budget must allow. The weight gradient
// alone takes 2 K^2 registers; smaller blocks still let one load while another computes.
template <int K>
constexpr int kBlock = K == 3 ? 256 : 128;
template <int K, int S>
constexpr int kResident = K == 5 && S == 1 ? 3 : 2;

template <class T, int K, int S, int L>
__global__ void __launch_bounds__(kBlock<K>, kResident<K, S>)
    depthwise_bwd_kernel(const DepthwiseBwd op, const DepthwisePlan plan, const Access access) {
  constexpr int kReach = (K - 1) / S;
  const Geometry& g = op.g;
  const int cb = plan.cb, c0 = blockIdx.x * cb, pitch = plan.cols * cb;
  float* weights = reinterpret_cast<float*>(dynamic_shared());
  float* constants = weights + K * K * cb;
  T* tile = reinterpret_cast<T*>(constants + kGradientConstants * cb);
  const int pair = threadIdx.x % (cb / 2), stripe = threadIdx.x / (cb / 2), stripes = kBlock<K> / (cb / 2);

  stage_filter<T>(weights, op.weight, K * K, cb, c0, g.k);
  weights += 2 * pair;
  GradientLoader<T> loader = gradient_loader<T>(op, c0, cb, 0, access, constants);
  loader.stage_constants();
  __syncthreads();
  InputGradient<T> input;
  input.read(op, c0 + 2 * pair, access);
  float2 dw[K * K];
#pragma unroll
  for (int i = 0; i < K * K; ++i) dw[i] = make_float2(0.f, 0.f);

  const int strips = plan.tile_h * (plan.tile_w / L);
  for (int index = blockIdx.y; index < plan.tiles; index += gridDim.y) {
    const int across = index % plan.tiles_w, rest = index / plan.tiles_w;
    const int mh0 = plan.origin_h + rest % plan.tiles_h * plan.tile_h,
              mw0 = plan.origin_w + across * plan.tile_w;
    const int n = rest / plan.tiles_h;
    const Window window = {n, g.p, g.q, mh0 - kReach, mw0 - kReach, plan.rows, plan.cols};
    stage(tile, window, cb, loader);
    __syncthreads();
    for (int strip = stripe; stripe < stripes && strip < strips; strip += stripes) {
      const int row = strip % plan.tile_h, col = strip / plan.tile_h * L;
      const int h0 = S * (mh0 + row) - g.pad_h, w0 = S * (mw0 + col) - g.pad_w;
      if (h0 >= g.h || w0 >= g.w) continue;
      const int64_t origin = input.pixel(n, h0, w0);
      float2 a[S * S * L], dx[S * S * L];
#pragma unroll
      for (int i = 0; i < S * S * L; ++i) {
        const int h = h0 + i / (S * L), w = w0 + i % (S * L);
        a[i] = dx[i] = make_float2(0.f, 0.f);
        if (op.dw != nullptr && input.exists(h, w))
          a[i] = input.activated(origin + i / (S * L) * g.w + i % (S * L));
      }
#pragma unroll
      for (int j = 0; j <= kReach; ++j) {
        const T* dy_row = tile + (row + kReach - j) * pitch + col * cb + 2 * pair;
#pragma unroll
        for (int phase_h = 0; phase_h < S && phase_h + S * j < K; ++phase_h) {
          const int r = phase_h + S * j;
          float2 w[K];
#pragma unroll
          for (int s = 0; s < K; ++s) w[s] = load_pair(weights + (r * K + s) * cb);
#pragma unroll
          for (int at = 0; at < L + kReach; ++at) {
            const float2 dy = load_pair(dy_row + at * cb);
#pragma unroll
            for (int s = 0; s < K; ++s) {
              const int m = at - kReach + s / S;  // position in the strip whose tap s meets this dy
              if (m < 0 || m >= L) continue;
              const int i = phase_h * S * L + m * S + s % S;
              dx[i] = fma(w[s], dy, dx[i]);
              dw[r * K + s] = fma(a[i], dy, dw[r * K + s]);
            }
          }
        }
      }
      if (op.dx.data == nullptr) continue;
      const int64_t again =
          input.pixel(opaque(n), h0, w0);  // addresses computed anew, not held through the taps
#pragma unroll
      for (int i = 0; i < S * S * L; ++i) {
        const int h = h0 + i / (S * L), w = w0 + i % (S * L);
        if (input.exists(h, w)) input.store(dx[i], again + i / (S * L) * g.w + i % (S * L));
      }
    }
    __syncthreads();
  }
  float* shared = reinterpret_cast<float*>(tile);
  if (op.dw != nullptr) {
    store_block_weights<K>(shared, dw, pair, stripe, stripes, cb,
                           op.workspace + int64_t(blockIdx.y) * K * K * g.c, g.c, c0);
  }
  if (op.sums != nullptr) {
    store_block_sums(shared, input.sums, pair, stripe, stripes, cb, sums_partials(op, plan, blockIdx.y), g.k,
                     c0);
  }
}

template <class T, int K, int S>
void launch_bwd(const DepthwiseBwd& op, const DepthwisePlan& plan, const Access& access, Unrolled<K, S>) {
  constexpr int kStrip = S == 2 ? 2 : (K == 7 ? 4 : 7);  // backward_strip() in plan.cpp
  launch("depthwise_bwd", depthwise_bwd_kernel<T, K, S, kStrip>, dim3(plan.channel_tiles, plan.slices),
         kBlock<K>, plan.shared_bytes, op.stream, op, plan, access);
}

template <class T>
void launch_bwd(const DepthwiseBwd& op, const DepthwisePlan& plan, const Access& access, Unrolled<0, 0>) {
  launch_depthwise_bwd_generic(op, plan, access);
}

}  // namespace

void depthwise_bwd(const DepthwiseBwd& op, const DepthwisePlan& plan) {
  const Geometry& g = op.g;
  with_dtype(op.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool vectors = is_aligned<T>(op.grad, kVec<T>) && is_aligned<T>(op.y, kVec<T>);
    const Access access = {vectors && g.c == g.k, is_aligned<T>(op.x, 2) && is_aligned<T>(op.dx, 2),
                           is_identity(op.in)};
    with_unrolled(g, [&](auto unrolled) { launch_bwd<T>(op, plan, access, unrolled); });
  });
  if (op.dw != nullptr) sum_partials(op.workspace, plan.slices, g.r * g.s, g.c, true, op.dw, op.stream);
  if (op.sums != nullptr) {
    sum_partials(sums_partials(op, plan, 0), plan.slices, 2, g.k, false, op.sums, op.stream);
  }
}

}  // namespace fastcnn::cuda
