// From agreements in shared memory to coupling coefficients, and on to the gradients of their logits.
#pragma once

#include "platform.cuh"

namespace fastcnn::cuda {

constexpr int kRowLanes = 4;  // threads that share the output capsules of a row

// Rows of agreements, one for each image and input capsule: value (row, column) is at row * row_step +
// column * step, and an output capsule's quads are columns that are still to be summed. Its result is left in
// the first of them.
struct Agreements {
  float* logits;
  float* gradients;  // of the coupling coefficients; then of the logits
  int rows, row_step, step;
  int out_caps, quads;
  bool leaky;
};

FASTCNN_DEVICE float max_over_row(float v) {
#pragma unroll
  for (int offset = 1; offset < kRowLanes; offset *= 2) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
  }
  return v;
}

FASTCNN_DEVICE float sum_over_row(float v) {
#pragma unroll
  for (int offset = 1; offset < kRowLanes; offset *= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

FASTCNN_DEVICE float sum_quads(const float* at, int quads, int step) {
  float sum = at[0];
  for (int q = 1; q < quads; ++q) sum += at[q * step];
  return sum;
}

// Softmax over the output capsules, with one more logit of 0 if leaky, and the way back. `own` is the lane's
// first logit; a row that is not there has no end, but a shuffle takes whole warps. Loops stay loops: a lane
// has few output capsules, and the caller's votes wait in registers.
template <bool kGradient>
FASTCNN_DEVICE void couple_row(const Agreements& a, float* own, const float* end, bool has_leak) {
  const int each = kRowLanes * a.quads * a.step;
  const int64_t to_gradients = a.gradients - a.logits;
  float largest = a.leaky ? 0.f : -INFINITY;
#pragma unroll 1
  for (float* at = own; at < end; at += each) {
    *at = sum_quads(at, a.quads, a.step);
    largest = fmaxf(largest, *at);
  }
  largest = max_over_row(largest);
  float total = has_leak ? __expf(-largest) : 0.f;
#pragma unroll 1
  for (float* at = own; at < end; at += each) {
    *at = __expf(*at - largest);
    total += *at;
  }
  const float inverse = __fdividef(1.f, sum_over_row(total));
  float mean = 0.f;
#pragma unroll 1
  for (float* at = own; at < end; at += each) {
    *at *= inverse;
    if (!kGradient) continue;
    float* gradient = at + to_gradients;
    *gradient = sum_quads(gradient, a.quads, a.step);
    mean = fmaf(*at, *gradient, mean);
  }
  if (!kGradient) return;
  mean = sum_over_row(mean);
#pragma unroll 1
  for (float* at = own; at < end; at += each) at[to_gradients] = *at * (at[to_gradients] - mean);
}

// All of the block's threads, which are whole warps, take part; barriers before and after are the caller's.
template <bool kGradient>
FASTCNN_DEVICE void couple_rows(const Agreements& a) {
  const int at_once = blockDim.x / kRowLanes, lane = threadIdx.x % kRowLanes;
  const int row_length = a.out_caps * a.quads * a.step;
  for (int first = 0; first < a.rows; first += at_once) {
    const int row = first + threadIdx.x / kRowLanes;
    float* begin = a.logits + row * a.row_step;
    couple_row<kGradient>(a, begin + lane * a.quads * a.step, row < a.rows ? begin + row_length : begin,
                          a.leaky && lane == 0);
  }
}

// What every output capsule gets in the first iteration.
FASTCNN_HOST_DEVICE float uniform_coupling(int out_caps, bool leaky) {
  return 1.f / float(out_caps + (leaky ? 1 : 0));
}

}  // namespace fastcnn::cuda
