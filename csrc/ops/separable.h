// Depthwise-separable convolution and MobileNet-v2's block: the intermediates stay in cache, tile by tile.
#pragma once

#include "ops/depthwise.h"
#include "ops/pointwise.h"

namespace fastcnn {

struct SeparableForward {
  DepthwiseShape depthwise;
  Activations x;
  ScaleShiftAct prologue;
  const float* dw_weight = nullptr;
  ScaleShiftAct middle;
  int64_t n = 0;  // output channels
  const void* packed_pointwise = nullptr;
  Epilogue epilogue;
};

struct InvertedResidualForward {
  int64_t k = 0;             // input channels
  DepthwiseShape depthwise;  // over the hidden channels
  Activations x;
  ScaleShiftAct prologue;
  const void* packed_expand = nullptr;
  ScaleShiftAct expand;
  const float* dw_weight = nullptr;
  ScaleShiftAct middle;
  int64_t n = 0;
  const void* packed_project = nullptr;
  Epilogue epilogue;
};

}  // namespace fastcnn
