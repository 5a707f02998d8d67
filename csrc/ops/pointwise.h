// 1x1 convolution: a matrix product [pixels, k] x [k, n] with prologue and epilogue.
#pragma once

#include "ops/tensor.h"

namespace fastcnn {

// Output pixel (image, p, q) reads input pixel (image, p * stride_h, q * stride_w).
struct PixelGrid {
  int64_t images = 0, in_h = 0, in_w = 0, out_h = 0, out_w = 0;
  int stride_h = 1, stride_w = 1;

  int64_t pixels() const { return images * out_h * out_w; }
  bool is_dense() const { return stride_h == 1 && stride_w == 1; }
};

struct PointwiseForward {
  PixelGrid grid;
  int64_t k = 0, n = 0;
  Dtype dtype = kFloat32;
  Activations x;
  ScaleShiftAct prologue;
  const void* packed_weight = nullptr;  // made by pack_matrix
  Epilogue epilogue;
};

struct PointwiseBackward {
  PixelGrid grid;
  int64_t k = 0, n = 0;
  Dtype dtype = kFloat32;
  GradientPrologue gradient;            // of the output, n channels
  BackwardInput input;                  // k channels
  const void* packed_weight = nullptr;  // W as [n, k], made by pack_matrix; unused without dx
  BackwardOutput output;
};

// A matrix B [taps * k, n]: element (tap, i, j) at data[tap / taps_w * stride_tap_h + tap % taps_w *
// stride_tap_w + i * stride_k + j * stride_n]. A tap's rows begin at whole words of the packed reduction.
struct MatrixSource {
  int64_t k = 0, n = 0;
  Dtype dtype = kFloat32;  // of data
  const void* data = nullptr;
  int64_t stride_k = 0, stride_n = 0;
  int64_t taps_h = 1, taps_w = 1, stride_tap_h = 0, stride_tap_w = 0;
  bool tap_major = false;  // packed as a matrix per tap, rather than a panel's taps one after the other
};

}  // namespace fastcnn
