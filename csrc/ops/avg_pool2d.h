// Average pooling with a prologue: what a pre-activation's normalisation makes of x is averaged as it is
// loaded.
#pragma once

#include "ops/tensor.h"

namespace fastcnn {

struct AvgPool2dShape {
  int64_t images = 0, channels = 0, in_h = 0, in_w = 0, out_h = 0, out_w = 0;
  int kernel_h = 2, kernel_w = 2, stride_h = 2, stride_w = 2, pad_h = 0, pad_w = 0;
  bool counts_padding = true;
  Dtype dtype = kFloat32;
};

struct AvgPool2dForward {
  AvgPool2dShape shape;
  Activations x;
  ScaleShiftAct prologue;
  void* out = nullptr;
  int64_t out_ld = 0;
};

struct AvgPool2dBackward {
  AvgPool2dShape shape;
  Activations grad;
  BackwardInput input;
  void* dx = nullptr;
  int64_t dx_ld = 0;
  float* sums = nullptr;  // [2, channels] or null
};

}  // namespace fastcnn
