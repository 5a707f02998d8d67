// A general convolution as an implicit matrix product: rows are output pixels, the reduction runs over taps x
// channels.
#pragma once

#include "ops/tensor.h"

namespace fastcnn {

struct Conv2dShape {
  int64_t images = 0, channels = 0, n = 0, in_h = 0, in_w = 0, out_h = 0, out_w = 0;
  int kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1,
      dilation_w = 1;
  // Channels between neighbouring taps of the reduction: `channels`, or more where taps are padded to whole
  // vectors.
  int64_t tap_channels = 0;
  Dtype dtype = kFloat32;

  int64_t pixels() const { return images * out_h * out_w; }
  int64_t reduction() const { return int64_t(kernel_h) * kernel_w * tap_channels; }
};

struct Conv2dForward {
  Conv2dShape shape;
  Activations x;
  ScaleShiftAct prologue;
  const void* packed_weight = nullptr;  // [reduction, n], made by pack_matrix
  Epilogue epilogue;
};

struct Conv2dWeightGradient {
  Conv2dShape shape;
  GradientPrologue gradient;
  Activations x;
  ScaleShiftAct prologue;
  float* dw = nullptr;  // [n, reduction]
};

}  // namespace fastcnn
