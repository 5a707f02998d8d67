// The vocabulary of fastcnn/ops/prologue_epilogue.py in registers:
// scale, shift, activation and its derivative.
#pragma once

#include "params.h"
#include "vec.cuh"

namespace fastcnn::cuda {

enum Activation : int { kNone, kRelu, kRelu6, kSilu, kHardswish };

// Added to an epilogue's activation that comes after the residual.
constexpr int kAfterResidual = 8;

FASTCNN_DEVICE float sigmoid(float z) { return __fdividef(1.f, 1.f + __expf(-z)); }

// Comparisons are written so that a NaN passes through, as in torch. A code with kAfterResidual is the
// identity.
FASTCNN_DEVICE float activate(float z, int act) {
  switch (act) {
    case kRelu:
      return z < 0.f ? 0.f : z;
    case kRelu6:
      return z < 0.f ? 0.f : (z > 6.f ? 6.f : z);
    case kSilu:
      return z * sigmoid(z);
    case kHardswish:
      return z <= -3.f ? 0.f : (z >= 3.f ? z : z * (z + 3.f) * (1.f / 6.f));
    default:
      return z;
  }
}

// At the kinks the value that torch's backward takes.
FASTCNN_DEVICE float activation_derivative(float z, int act) {
  switch (act) {
    case kRelu:
      return z > 0.f ? 1.f : 0.f;
    case kRelu6:
      return z > 0.f && z < 6.f ? 1.f : 0.f;
    case kSilu: {
      const float s = sigmoid(z);
      return s * (1.f + z * (1.f - s));
    }
    case kHardswish:
      return z < -3.f ? 0.f : (z <= 3.f ? z * (1.f / 3.f) + 0.5f : 1.f);
    default:
      return 1.f;
  }
}

inline bool is_identity(const ChannelAffine& a) {
  return a.scale == nullptr && a.shift == nullptr && a.act == kNone;
}

FASTCNN_DEVICE float channel_value(const float* values, int c, bool exists, float otherwise) {
  return values != nullptr && exists ? __ldg(values + c) : otherwise;
}

// A ChannelAffine for the Count channels from c on that a thread works
// on, of which those below `channels` exist.
template <int Count>
struct LocalAffine {
  float scale[Count], shift[Count];
  int act;

  FASTCNN_DEVICE void read(const ChannelAffine& a, int c, int channels, int divisor = 1) {
    act = a.act;
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      const bool exists = c + i < channels;
      const int source = divisor == 1 ? c + i : (c + i) / divisor;
      scale[i] = channel_value(a.scale, source, exists, 1.f);
      shift[i] = channel_value(a.shift, source, exists, 0.f);
    }
  }
  FASTCNN_DEVICE float affine(float v, int i) const { return fmaf(scale[i], v, shift[i]); }
  FASTCNN_DEVICE float operator()(float v, int i) const { return activate(affine(v, i), act); }
  FASTCNN_DEVICE float2 operator()(float2 v) const { return make_float2((*this)(v.x, 0), (*this)(v.y, 1)); }
  // The activation of a sum with a residual, which operator() left out for want of the residual.
  FASTCNN_DEVICE float2 after_residual(float2 v) const {
    if (act < kAfterResidual) return v;
    return make_float2(activate(v.x, act - kAfterResidual), activate(v.y, act - kAfterResidual));
  }
};

}  // namespace fastcnn::cuda
