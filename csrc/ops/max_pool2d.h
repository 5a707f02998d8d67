// Maximum pooling.
#pragma once

#include "ops/tensor.h"

namespace fastcnn {

constexpr int kMostPositions = 256;  // of a window, that a byte tells apart

struct MaxPool2dForward {
  int64_t images = 0, channels = 0, in_h = 0, in_w = 0, out_h = 0, out_w = 0;
  int kernel_h = 3, kernel_w = 3, stride_h = 2, stride_w = 2, pad_h = 1, pad_w = 1;
  Dtype dtype = kFloat32;
  Activations x;
  void* out = nullptr;
  int64_t out_ld = 0;
  uint8_t* index =
      nullptr;  // [images, out_h, out_w, channels]: which of its window's positions won; null: not kept
};

// dx from the gradient of the output and the forward's index. Geometry as in the forward.
struct MaxPool2dBackward {
  MaxPool2dForward geometry;
  Activations grad;
  const uint8_t* index = nullptr;
  void* dx = nullptr;
  int64_t dx_ld = 0;
};

}  // namespace fastcnn
