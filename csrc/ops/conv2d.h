// A general convolution as an implicit matrix product: rows are output pixels, the reduction runs over taps x
// channels.
#pragma once

#include "ops/tensor.h"

namespace fastcnn {

struct Conv2dShape {
  int64_t images = 0, channels = 0, n = 0, in_h = 0, in_w = 0, out_h = 0, out_w = 0;
  int kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1,
      dilation_w = 1;
  int groups = 1;
  Dtype dtype = kFloat32;

  int64_t pixels() const { return images * out_h * out_w; }
  int64_t taps() const { return int64_t(kernel_h) * kernel_w; }
};

// The weight [n, channels / groups, kernel_h, kernel_w] in any memory format.
struct Conv2dWeight {
  const void* data = nullptr;
  Dtype dtype = kFloat32;
  int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;
};

struct Conv2dForward {
  Conv2dShape shape;
  Activations x;
  ScaleShiftAct prologue;
  const void* packed_weight = nullptr;  // made by conv2d_pack
  Epilogue epilogue;
};

struct Conv2dBackward {
  Conv2dShape shape;
  GradientPrologue gradient;  // of the output, n channels
  BackwardInput input;
  Conv2dWeight weight;    // unused without dx
  BackwardOutput output;  // dw is float32 with the strides of dw_layout, whose data and dtype are not read
  Conv2dWeight dw_layout;
};

}  // namespace fastcnn
