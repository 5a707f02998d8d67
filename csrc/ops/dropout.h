// Inverted dropout: activations times a mask that is drawn, never stored.
#pragma once

#include "ops/tensor.h"

namespace fastcnn {

// What one draw decides on: an element, a channel of a sample, or a sample. fastcnn/ops/dropout.py has the
// same codes.
enum DropoutUnit : int { kDropElement = 0, kDropChannel = 1, kDropSample = 2 };

// Memory as a matrix [rows, channels], of rows_per_sample rows each sample. Draw i is word i % 4 of
// Philox-4x32-10 with the counter (i / 4, offset) and the key `seed`; what it decides on is kept, and scaled,
// where it is at least `threshold`, of 2^32.
struct DropoutMask {
  int64_t rows = 0, channels = 0, rows_per_sample = 1;
  int unit = kDropElement;
  uint64_t threshold = 0;
  float scale = 1.0f;
  uint64_t seed = 0, offset = 0;

  int64_t first_draw(int64_t row) const {
    return unit == kDropElement   ? row * channels
           : unit == kDropChannel ? row / rows_per_sample * channels
                                  : row / rows_per_sample;
  }
};

// out = mask * scale * act(x + bias) + residual; out may be x.
struct DropoutForward {
  DropoutMask mask;
  Dtype dtype = kFloat32;
  const void* x = nullptr;
  const float* bias = nullptr;
  int act = 0;
  const void* residual = nullptr;
  void* out = nullptr;
};

// dx = mask * scale * grad * act'(z + bias); dbias [channels] is its sum over the rows, or null. dx may be
// grad.
struct DropoutBackward {
  DropoutMask mask;
  Dtype dtype = kFloat32;
  const void* grad = nullptr;
  const void* z = nullptr;  // unused without an activation
  const float* bias = nullptr;
  int act = 0;
  void* dx = nullptr;
  float* dbias = nullptr;
};

}  // namespace fastcnn
