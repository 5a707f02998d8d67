// Scale-shift-activation-residual in one pass, and the two sums of its gradient.
#pragma once

#include "ops/tensor.h"

namespace fastcnn {

struct AffineActForward {
  int64_t pixels = 0, channels = 0;
  Dtype dtype = kFloat32;
  Activations y;
  Epilogue epilogue;  // no statistics
};

struct AffineActSums {
  int64_t pixels = 0, channels = 0;
  Dtype dtype = kFloat32;
  Activations grad;
  Activations y;
  ScaleShiftAct affine;
  const float* mean = nullptr;
  float* sums = nullptr;  // [2, channels]
};

}  // namespace fastcnn
