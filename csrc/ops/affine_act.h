// Passes over memory at the ends of a chain of convolutions: scale-shift-activation-residual and its
// backward.
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

// dx = the gradient prologue's dy + residual.
struct AffineActDataGradient {
  int64_t pixels = 0, channels = 0;
  Dtype dtype = kFloat32;
  GradientPrologue gradient;
  Activations residual;
  void* dx = nullptr;
  int64_t dx_ld = 0;
};

// dz = grad * act'(z) where out = act(z); act is none, relu or relu6. sums [2, channels] of dz and dz * (y -
// mean), or null.
struct ResidualActBackward {
  int64_t pixels = 0, channels = 0;
  Dtype dtype = kFloat32;
  Activations grad;
  Activations out;
  int act = 0;
  Activations y;
  const float* mean = nullptr;
  void* dz = nullptr;
  int64_t dz_ld = 0;
  float* sums = nullptr;
};

struct ChannelStatistics {
  int64_t pixels = 0, channels = 0;
  Dtype dtype = kFloat32;
  Activations x;
  float* mean = nullptr;
  float* var = nullptr;
};

}  // namespace fastcnn
