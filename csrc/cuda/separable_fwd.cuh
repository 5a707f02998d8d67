// Depthwise-separable convolution, forward, fused: the depthwise result lives in shared memory only.
//
// A block takes M pixels (a tile_h x tile_w rectangle). First it makes the whole depthwise
// result A [M][k], some 128 bytes of channels at a time: stage x through the prologue,
// stencil, scale-shift-activation. Then it multiplies A with the pointwise weights for all
// output channels, N at a time, the weights streaming from L2 through a ring of asynchronous
// copies that starts before the depthwise phase and does not drain between the N's.
//
// Floor: x read once, y written once; and 2 k channels operations per pixel. Every tile reads all of the
// weights from L2: channels * k / M elements per pixel, hence M as large as shared memory allows (plan.cpp).
#pragma once

#include "product.cuh"
#include "statistics.cuh"
#include "stencil.cuh"

namespace fastcnn::cuda {

constexpr int kSeparableStrip = 4;

struct SeparableAccess {
  bool vectors, pairs, weights, identity;
};

// The tile's place in the output.
struct PixelTile {
  int n;
  int p0, q0;
};

FASTCNN_DEVICE PixelTile pixel_tile(const SeparablePlan& plan, int index) {
  const int across = index % plan.tiles_w, rest = index / plan.tiles_w;
  return {rest / plan.tiles_h, rest % plan.tiles_h * plan.tile_h, across * plan.tile_w};
}

// Shared memory of a block, and what of it is filled when.
template <class T>
struct SeparableShared {
  T *a, *window, *ring;  // [m][k_padded + vector], [rows][cols][cb], the stages of B
  float* tables;  // two, of one channel step each: the filter [tap][cb], the prologue's constants [2][cb]
  int table_floats;

  FASTCNN_DEVICE SeparableShared(const SeparablePlan& plan) {
    char* at = dynamic_shared();
    a = reinterpret_cast<T*>(at);
    window = reinterpret_cast<T*>(at += plan.a_bytes);
    tables = reinterpret_cast<float*>(at += plan.window_bytes);
    table_floats = plan.table_bytes / int(sizeof(float));
    ring = reinterpret_cast<T*>(at += 2 * plan.table_bytes);
  }
  FASTCNN_DEVICE float* table(int step) const { return tables + step % 2 * table_floats; }
};

template <class T>
FASTCNN_DEVICE InputLoader<T> step_loader(const SeparableFwd& op, const SeparablePlan& plan, int c0,
                                          float* table, const SeparableAccess& access) {
  float* constants = table + op.g.r * op.g.s * plan.cb;
  return input_loader<T>(op, c0, plan.cb, access.vectors, access.identity, constants);
}

template <class T>
FASTCNN_DEVICE void stage_tables(const SeparableFwd& op, const SeparablePlan& plan, int c0, float* table,
                                 const SeparableAccess& access) {
  stage_filter<T>(table, op.weight, op.g.r * op.g.s, plan.cb, c0, op.g.c);
  step_loader<T>(op, plan, c0, table, access).stage_constants();
}

// The thread's strips of the staged window into A. Zeros in columns past the last channel.
template <class T, int K, int S>
FASTCNN_DEVICE void convolve_window(const SeparableFwd& op, const SeparablePlan& plan, int c0,
                                    const SeparableShared<T>& shared, const float* filter) {
  constexpr int L = kSeparableStrip;
  const Geometry& g = op.g;
  const int cb = plan.cb, pitch = plan.cols * cb, pitch_a = plan.k_padded + kVec<T>;
  const int pair = threadIdx.x % (cb / 2), stripe = threadIdx.x / (cb / 2), stripes = kThreads / (cb / 2);
  const int c = c0 + 2 * pair, strips = plan.tile_h * plan.strips_w;
  if (stripe >= stripes || c >= plan.k_padded) return;
  Stencil<T, K, S, L> stencil;
  stencil.read(filter + 2 * pair, g, cb);
  LocalAffine<2> affine;
  affine.read(op.mid, c, g.c);
  for (int strip = stripe; strip < strips; strip += stripes) {
    const int row = strip % plan.tile_h, col = strip / plan.tile_h * L;
    float2 acc[L];
#pragma unroll
    for (int t = 0; t < L; ++t) acc[t] = make_float2(0.f, 0.f);
    stencil(acc, shared.window + row * g.stride_h * pitch + col * g.stride_w * cb + 2 * pair, pitch, cb);
#pragma unroll
    for (int t = 0; t < L; ++t) {
      if (col + t >= plan.tile_w) continue;
      float2 v = affine(acc[t]);
      if (c >= g.c) v.x = 0.f;
      if (c + 1 >= g.c) v.y = 0.f;
      store_pair(shared.a + (row * plan.tile_w + col + t) * pitch_a + c, v);
    }
  }
}

// All of A, some channels at a time. The tables of the first step are staged; those of the next are fetched
// while this step's window is convolved.
template <class T, int K, int S>
FASTCNN_DEVICE void depthwise_phase(const SeparableFwd& op, const SeparablePlan& plan, const PixelTile& at,
                                    const SeparableShared<T>& shared, const SeparableAccess& access) {
  const Geometry& g = op.g;
  const Window window = {at.n,      g.h,      g.w, at.p0 * g.stride_h - g.pad_h, at.q0 * g.stride_w - g.pad_w,
                         plan.rows, plan.cols};
  int step = 0;
  for (int c0 = 0; c0 < plan.k_padded; c0 += plan.cb, ++step) {
    float* table = shared.table(step);
    InputLoader<T> loader = step_loader<T>(op, plan, c0, table, access);
    stage(shared.window, window, plan.cb, loader);
    __syncthreads();
    if (c0 + plan.cb < plan.k_padded) {
      stage_tables<T>(op, plan, c0 + plan.cb, shared.table(step + 1), access);
    }
    convolve_window<T, K, S>(op, plan, c0, shared, table);
    __syncthreads();
  }
}

// Moments of a column over the warp's rows (two passes over the
// registers, so exact), merged into the running ones.
template <class T, class P>
FASTCNN_DEVICE void accumulate_moments(const P& product, const bool (&valid)[4], int n0, int channels,
                                       float* partials, int64_t slice, bool first) {
  float count = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) count += valid[i] ? 1.f : 0.f;
  for (int offset = 4; offset < 32; offset *= 2) count += __shfl_xor_sync(0xffffffffu, count, offset);
#pragma unroll
  for (int j = 0; j < P::kTilesN; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = 0.f, m2 = 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += valid[i] ? product.acc[i / 2][j][i % 2 * 2 + e] : 0.f;
      for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      const float mean = count > 0.f ? sum / count : 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float d = valid[i] ? product.acc[i / 2][j][i % 2 * 2 + e] - mean : 0.f;
        m2 = fmaf(d, d, m2);
      }
      for (int offset = 4; offset < 32; offset *= 2) m2 += __shfl_xor_sync(0xffffffffu, m2, offset);
      const int c = n0 + product.column(j) + e;
      if (product.lane >= 4 || c >= channels) continue;
      const Moments m = {count, mean, m2};
      store_moments(partials, slice, channels, c,
                    first ? m : merge(load_moments(partials, slice, channels, c), m));
    }
  }
}

// Scale-shift-activation, residual, store; the accumulators become the stored values.
template <class T, class P>
FASTCNN_DEVICE void store_outputs(P& product, const SeparableFwd& op, const int64_t (&pixel)[4], int n0,
                                  bool pairs) {
#pragma unroll
  for (int j = 0; j < P::kTilesN; ++j) {
    const int c = n0 + product.column(j), count = op.channels - c;
    LocalAffine<2> affine;
    affine.read(op.out, c, op.channels);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* acc = product.acc[i / 2][j] + i % 2 * 2;
      float2 v = affine(make_float2(acc[0], acc[1]));
      if (pixel[i] < 0) continue;
      if (op.residual.data != nullptr) {
        const T* r = static_cast<const T*>(op.residual.data) + pixel[i] * op.residual.ld + c;
        const float2 added = load_pair(r, count, pairs);
        v.x += added.x;
        v.y += added.y;
      }
      v = affine.after_residual(v);
      store_pair(static_cast<T*>(op.y.data) + pixel[i] * op.y.ld + c, v, count, pairs);
      acc[0] = rounded<T>(v.x);
      acc[1] = rounded<T>(v.y);
    }
  }
}

// Index of the output pixel of each of the thread's four rows, -1 where the tile hangs over.
template <class P>
FASTCNN_DEVICE void locate_rows(const P& product, const Geometry& g, const SeparablePlan& plan,
                                const PixelTile& at, int64_t (&pixel)[4], bool (&valid)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = product.row(i / 2, i % 2), p = at.p0 + m / plan.tile_w, q = at.q0 + m % plan.tile_w;
    valid[i] = m < plan.tile_h * plan.tile_w && p < g.p && q < g.q;
    pixel[i] = valid[i] ? pixel_index(at.n, g.p, g.q, p, q) : -1;
  }
}

template <class T, int K, int S, int M, int N>
__global__ void __launch_bounds__(kThreads)
    separable_fwd_kernel(const SeparableFwd op, const SeparablePlan plan, const SeparableAccess access) {
  using P = typename ProductOf<T, M, N>::type;
  const SeparableShared<T> shared(plan);
  const T* b = static_cast<const T*>(op.pointwise);
  const int pitch_a = plan.k_padded + kVec<T>, depth = op.g.c;
  const int steps_k = plan.k_padded / P::kDepth, steps = steps_k * ((op.channels + N - 1) / N);
  P product;
  const int64_t slice = int64_t(blockIdx.x) * P::kWarpsM + product.warp_m / 32;

  const auto fetch = [&](int step) {
    if (step < steps) {
      T* stage = shared.ring + step % P::kStages * N * P::kPitchB;
      P::load_b(stage, b, op.channels, depth, step / steps_k * N, step % steps_k * P::kDepth, access.weights);
    }
    copy_async_commit();
  };
  for (int index = blockIdx.x; index < plan.tiles; index += gridDim.x) {
    const PixelTile at = pixel_tile(plan, index);
    for (int step = 0; step < P::kStages - 1; ++step) fetch(step);
    stage_tables<T>(op, plan, 0, shared.table(0), access);
    __syncthreads();
    depthwise_phase<T, K, S>(op, plan, at, shared, access);
    int64_t pixel[4];
    bool valid[4];
    locate_rows(product, op.g, plan, at, pixel, valid);
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<P::kStages - 2>();
      __syncthreads();
      fetch(step + P::kStages - 1);
      const int k = step % steps_k, n0 = step / steps_k * N;
      if (k == 0) product.clear();
      product.step(shared.a + k * P::kDepth, pitch_a, shared.ring + step % P::kStages * N * P::kPitchB);
      if (k != steps_k - 1) continue;
      store_outputs<T>(product, op, pixel, n0, access.pairs);
      if (op.mean != nullptr) {
        accumulate_moments<T>(product, valid, n0, op.channels, op.workspace, slice, index == int(blockIdx.x));
      }
    }
    __syncthreads();
  }
}

template <class T, int K, int S, int M, int N>
void launch_separable(const SeparableFwd& op, const SeparablePlan& plan) {
  const SeparableAccess access = {op.g.c == op.g.k && is_aligned<T>(op.x, kVec<T>),
                                  is_aligned<T>(op.y, 2) && is_aligned<T>(op.residual, 2),
                                  is_aligned<T>({const_cast<void*>(op.pointwise), op.g.c}, kVec<T>),
                                  is_identity(op.in)};
  launch("separable_fwd", separable_fwd_kernel<T, K, S, M, N>, dim3(plan.blocks), kThreads, plan.shared_bytes,
         op.stream, op, plan, access);
}

// MobileNet's and Xception's filters are unrolled, every other one takes the general stencil.
template <class T, int M, int N>
void launch_separable(const SeparableFwd& op, const SeparablePlan& plan) {
  const bool is3x3 = unrolled_kernel(op.g) == 3;
  if (is3x3 && op.g.stride_h == 1) return launch_separable<T, 3, 1, M, N>(op, plan);
  if (is3x3) return launch_separable<T, 3, 2, M, N>(op, plan);
  launch_separable<T, 0, 0, M, N>(op, plan);
}

// The 16-bit types: tensor cores.
template <class T>
void launch_separable(const SeparableFwd& op, const SeparablePlan& plan) {
  if (plan.m == 128) return launch_separable<T, 3, 1, 128, 128>(op, plan);
  if (plan.m == 32) return launch_separable<T, 32, 128>(op, plan);
  if (plan.n == 64) return launch_separable<T, 64, 64>(op, plan);
  launch_separable<T, 64, 128>(op, plan);
}

}  // namespace fastcnn::cuda
