// The depthwise stencil over a staged tile: L outputs along W for a pair
// of channels, columns reused in registers.
#pragma once

#include "tile.cuh"

namespace fastcnn::cuda {

// The K x K weights of one pair of channels: 3 x 3 in registers, more a row at a time from shared memory,
// which has time to spare (5 x 5: 4.3 outputs per cycle where memory allows 3.3); 50 registers more would
// spill in some types.
template <int K>
struct Taps {
  static constexpr bool kResident = K <= 3;
  float2 held[kResident ? K * K : K];
  const float* shared;
  int cb;

  FASTCNN_DEVICE void read(const float* weights, int channels_per_tile) {
    shared = weights;
    cb = channels_per_tile;
    if (kResident) {
#pragma unroll
      for (int i = 0; i < K * K; ++i) held[i] = load_pair(shared + i * cb);
    }
  }
  FASTCNN_DEVICE void select_row(int r) {
    if constexpr (!kResident) {
#pragma unroll
      for (int s = 0; s < K; ++s) held[s] = load_pair(shared + (r * K + s) * cb);
    }
  }
  FASTCNN_DEVICE float2 at(int r, int s) const { return held[kResident ? r * K + s : s]; }
};

// K x K taps, stride S, dilation 1, unrolled: an input column is read
// once per row and serves every output it touches.
template <class T, int K, int S, int L>
struct Stencil {
  Taps<K> taps;

  FASTCNN_DEVICE void read(const float* weights, const Geometry&, int cb) { taps.read(weights, cb); }
  // `in`: the thread's pair at the input pixel of its first output's first
  // tap; `pitch`: elements per tile row.
  FASTCNN_DEVICE void operator()(float2 (&acc)[L], const T* in, int pitch, int cb) {
#pragma unroll
    for (int r = 0; r < K; ++r) {
      taps.select_row(r);
#pragma unroll
      for (int col = 0; col < (L - 1) * S + K; ++col) {
        const float2 v = load_pair(in + r * pitch + col * cb);
#pragma unroll
        for (int s = 0; s < K; ++s) {
          if ((col - s) % S == 0 && col >= s && (col - s) / S < L) {
            acc[(col - s) / S] = fma(v, taps.at(r, s), acc[(col - s) / S]);
          }
        }
      }
    }
  }
};

// Any filter, stride and dilation.
template <class T, int L>
struct Stencil<T, 0, 0, L> {
  const float* weights;
  int r, s, stride, dil_h, dil_w;

  FASTCNN_DEVICE void read(const float* shared, const Geometry& g, int) {
    weights = shared;
    r = g.r;
    s = g.s;
    stride = g.stride_w;
    dil_h = g.dil_h;
    dil_w = g.dil_w;
  }
  FASTCNN_DEVICE void operator()(float2 (&acc)[L], const T* in, int pitch, int cb) {
    const float* weight = weights;
    for (int i = 0; i < r; ++i) {
      const T* row = in + i * dil_h * pitch;
      for (int j = 0; j < s; ++j) {
        const float2 w = load_pair(weight);
        weight += cb;
        const T* at = row + j * dil_w * cb;
#pragma unroll
        for (int t = 0; t < L; ++t) acc[t] = fma(load_pair(at + t * stride * cb), w, acc[t]);
      }
    }
  }
};

}  // namespace fastcnn::cuda
