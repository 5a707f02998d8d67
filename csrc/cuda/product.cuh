// The block's matrix product: A [m][k] resident in shared memory, B
// [channels][k] streamed from global memory.
//
// Warps stand WM x WN over an M x N tile, each with a 32 x (N / WN) part. Accumulators have the layout of
// mma.m16n8k16: lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and + 1 of each 16 x 8 tile; the
// float32 path (FMA: TF32 would cost 1e-3) keeps to it, so that one epilogue serves both.
#pragma once

#include "mma.cuh"
#include "plan.h"

namespace fastcnn::cuda {

template <class T, int M, int N>
struct Product {
  static constexpr int kWarps = kThreads / 32, kWarpsM = M / 32, kWarpsN = kWarps / kWarpsM;
  static constexpr int kTilesN = N / kWarpsN / 8;
  static constexpr int kDepth = kProductDepth, kStages = kProductStages;
  // 16 bytes beyond the row: eight rows then start in eight different bank groups.
  static constexpr int kPitchB = kDepth + kVec<T>;

  float acc[2][kTilesN][4];
  int warp_m, warp_n, lane;

  FASTCNN_DEVICE Product() {
    lane = threadIdx.x % 32;
    warp_m = threadIdx.x / 32 % kWarpsM * 32;
    warp_n = threadIdx.x / 32 / kWarpsM * (N / kWarpsN);
  }
  FASTCNN_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.f;
      }
    }
  }
  // The tile's row of accumulator (i, half), and the column of (j, first element).
  FASTCNN_DEVICE int row(int i, int half) const { return warp_m + 16 * i + 8 * half + lane / 4; }
  FASTCNN_DEVICE int column(int j) const { return warp_n + 8 * j + lane % 4 * 2; }

  // Stage [N][kPitchB] of B: channels [n0, n0 + N), depth [k0, k0 + kDepth), zeros beyond either end.
  static FASTCNN_DEVICE void load_b(T* stage, const T* b, int channels, int depth, int n0, int k0,
                                    bool aligned) {
    constexpr int kVectors = kDepth / kVec<T>;
    for (int i = threadIdx.x; i < N * kVectors; i += kThreads) {
      const int n = i / kVectors, k = i % kVectors * kVec<T>;
      const T* at = b + int64_t(n0 + n) * depth + k0 + k;
      T* to = stage + n * kPitchB + k;
      if (aligned) {
        const bool valid = n0 + n < channels && k0 + k < depth;
        copy_async(to, valid ? at : b, valid);
      } else {
        const int count = n0 + n < channels ? depth - k0 - k : 0;
        *reinterpret_cast<uint4*>(to) = load_vector(at, count, false).words;
      }
    }
  }

  // acc += A[:, k0 : k0 + kDepth] B^T; a points at the tile's column k0.
  FASTCNN_DEVICE void step(const T* a, int pitch_a, const T* b) {
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t fa[2][4], fb[kTilesN / 2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrices(fa[i], a + (warp_m + 16 * i + lane % 16) * pitch_a + k + lane / 16 * 8);
      }
#pragma unroll
      for (int j = 0; j < kTilesN / 2; ++j) {
        const int n = warp_n + 16 * j + lane / 16 * 8 + lane % 8;
        load_matrices(fb[j], b + n * kPitchB + k + lane / 8 % 2 * 8);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) multiply_add(acc[i][j], fa[i], fb[j / 2] + j % 2 * 2, T{});
      }
    }
  }
};

// Sums of four products in float32.
FASTCNN_DEVICE float dot(float4 a, float4 b, float c) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, c))));
}

template <int M, int N>
struct FloatProduct : Product<float, M, N> {
  using Base = Product<float, M, N>;

  FASTCNN_DEVICE void step(const float* a, int pitch_a, const float* b) {
#pragma unroll 2
    for (int k = 0; k < Base::kDepth; k += 4) {
      float4 fa[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        fa[i] = *reinterpret_cast<const float4*>(a + this->row(i / 2, i % 2) * pitch_a + k);
      }
#pragma unroll
      for (int j = 0; j < Base::kTilesN; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 fb = *reinterpret_cast<const float4*>(b + (this->column(j) + e) * Base::kPitchB + k);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& sum = this->acc[i / 2][j][i % 2 * 2 + e];
            sum = dot(fa[i], fb, sum);
          }
        }
      }
    }
  }
};

template <class T, int M, int N>
struct ProductOf {
  using type = Product<T, M, N>;
};
template <int M, int N>
struct ProductOf<float, M, N> {
  using type = FloatProduct<M, N>;
};

}  // namespace fastcnn::cuda
