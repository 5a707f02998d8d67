// Plain descriptions of tensors and of what a prologue or an epilogue does to them. No torch, no Python.
#pragma once

#include <cstdint>

namespace fastcnn {

enum Dtype : int { kFloat32 = 0, kBfloat16 = 1 };

inline int64_t bytes_of(Dtype dtype) { return dtype == kFloat32 ? 4 : 2; }

// NHWC activations; `ld` elements lie between neighbouring pixels (above the channel count in a channel
// slice).
struct Activations {
  const void* data = nullptr;
  int64_t ld = 0;
};

// act(scale * x + shift) per channel; a null scale is 1, a null shift 0.
struct ScaleShiftAct {
  const float* scale = nullptr;
  const float* shift = nullptr;
  int act = 0;

  bool is_identity() const { return !scale && !shift && act == 0; }
};

struct DropoutMask;

// What happens to results before they are stored at out[pixel * out_ld + channel].
struct Epilogue {
  const DropoutMask* mask = nullptr;  // of elements of [pixels, channels], before everything else
  ScaleShiftAct affine;
  bool act_last = false;  // the activation comes after the residual
  Activations residual;
  void* out = nullptr;
  int64_t out_ld = 0;
  float* mean = nullptr;  // with var: per-channel statistics of what is stored
  float* var = nullptr;
};

// The gradient of a raw convolution output, made on load:
//   dz = grad * act'(scale * y + shift),  dy = coef[0] * dz + coef[1] * (y - coef[2]) + coef[3]   (coef [4,
//   C])
struct GradientPrologue {
  Activations grad;
  Activations y;
  ScaleShiftAct affine;
  const float* coef = nullptr;
  int64_t coef_ld = 0;  // channels between rows of coef; 0: those of the output
};

// An input as the backward sees it: its forward prologue, and the mean that its gradient's second sum is
// centred on.
struct BackwardInput {
  Activations x;
  ScaleShiftAct affine;
  const float* mean = nullptr;
};

// Where a backward writes; null is not asked for. sums is [2, K]: sum dx, sum dx * (x - mean), before the
// residual, another gradient of x, is added to dx. With `scales` dx is the gradient before the prologue's
// scale, but for what statistics of x pass on: their share needs the sums.
struct BackwardOutput {
  void* dx = nullptr;
  int64_t dx_ld = 0;
  float* dw = nullptr;
  float* sums = nullptr;
  Activations residual;
  bool scales = false;
};

}  // namespace fastcnn
