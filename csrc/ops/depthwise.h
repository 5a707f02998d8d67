// Depthwise convolution: a stencil per channel with prologue and epilogue.
#pragma once

#include "ops/tensor.h"

namespace fastcnn {

struct DepthwiseShape {
  int64_t images = 0, channels = 0,
          multiplier = 1;  // channels of the input; the output has channels * multiplier
  int64_t in_h = 0, in_w = 0, out_h = 0, out_w = 0;
  int kernel_h = 3, kernel_w = 3, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1,
      dilation_w = 1;
  Dtype dtype = kFloat32;

  int64_t out_channels() const { return channels * multiplier; }
  int taps() const { return kernel_h * kernel_w; }
};

struct DepthwiseForward {
  DepthwiseShape shape;
  Activations x;
  ScaleShiftAct prologue;
  const float* weight = nullptr;  // [out_channels, kernel_h, kernel_w], float32
  Epilogue epilogue;
};

struct DepthwiseBackward {
  DepthwiseShape shape;
  GradientPrologue gradient;  // of the output, out_channels
  BackwardInput input;        // channels
  const float* weight = nullptr;
  BackwardOutput output;
};

}  // namespace fastcnn
