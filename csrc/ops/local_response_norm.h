// Local response normalisation across channels, y = x / d^beta with d = k + share * (sum of x^2 over a
// window), and its gradient.
#pragma once

#include "ops/tensor.h"

namespace fastcnn {

// With `grad` the gradient of x, else y.
struct LocalResponseNorm {
  int64_t pixels = 0, channels = 0;
  Dtype dtype = kFloat32;
  int64_t before = 0, after = 0;               // channels around its own that a window sees, below `channels`
  float share = 0.0f, beta = 0.75f, k = 1.0f;  // share: alpha over the window's size
  Activations x;
  Activations grad;
  void* out = nullptr;
  int64_t out_ld = 0;
};

}  // namespace fastcnn
