// Mean and variance without cancellation: shifted sums within a thread,
// Chan's merge between threads and blocks.
//
// A block leaves its moments as partials[slice][count, mean, m2][channel]; merge_moments (reduce.cuh) folds
// the slices. Every merge is in a fixed order, so the same input gives the same bits.
#pragma once

#include "vec.cuh"

namespace fastcnn::cuda {

// Count, mean and sum of squared deviations of a set of values.
struct Moments {
  float count, mean, m2;
};

// Chan, Golub & LeVeque 1983.
FASTCNN_DEVICE Moments merge(Moments a, Moments b) {
  if (b.count == 0.f) return a;
  if (a.count == 0.f) return b;
  const float count = a.count + b.count, share = b.count / count, delta = b.mean - a.mean;
  return {count, fmaf(delta, share, a.mean), a.m2 + b.m2 + delta * delta * a.count * share};
}

// Sums about the first value seen: |mean| >> std costs no digits, unlike sum(y) and sum(y^2).
struct ShiftedSums {
  float count = 0.f, shift = 0.f, sum = 0.f, squares = 0.f;

  FASTCNN_DEVICE void add(float v) {
    if (count == 0.f) shift = v;
    const float d = v - shift;
    count += 1.f;
    sum += d;
    squares = fmaf(d, d, squares);
  }
  FASTCNN_DEVICE Moments moments() const {
    if (count == 0.f) return {0.f, 0.f, 0.f};
    const float d = sum / count;
    return {count, shift + d, fmaxf(squares - sum * d, 0.f)};
  }
};

FASTCNN_DEVICE void store_moments(float* partials, int64_t slice, int channels, int c, Moments m) {
  float* at = partials + slice * 3 * channels + c;
  at[0] = m.count;
  at[channels] = m.mean;
  at[2 * channels] = m.m2;
}

FASTCNN_DEVICE Moments load_moments(const float* partials, int64_t slice, int channels, int c) {
  const float* at = partials + slice * 3 * channels + c;
  return {at[0], at[channels], at[2 * channels]};
}

// Merges a block's threads: thread (stripe, pair) holds the moments of channels 2 pair and 2 pair + 1 of the
// block's cb channels. `shared` has room for 3 * 2 * blockDim.x floats and is free. All threads call.
FASTCNN_DEVICE void store_block_moments(float* shared, const ShiftedSums (&sums)[2], int pair, int stripe,
                                        int stripes, int cb, float* partials, int64_t slice, int channels,
                                        int c0) {
  __syncthreads();
  if (stripe < stripes) {
#pragma unroll
    for (int i = 0; i < 2; ++i) store_moments(shared, stripe, cb, 2 * pair + i, sums[i].moments());
  }
  __syncthreads();
  for (int c = threadIdx.x; c < cb && c0 + c < channels; c += blockDim.x) {
    Moments m = load_moments(shared, 0, cb, c);
    for (int i = 1; i < stripes; ++i) m = merge(m, load_moments(shared, i, cb, c));
    store_moments(partials, slice, channels, c0 + c, m);
  }
}

}  // namespace fastcnn::cuda
