// What the CUDA launchers take: raw pointers, sizes, pixel strides and a stream. No torch, no Python.
#pragma once

#include <cstdint>

namespace fastcnn::cuda {

enum Dtype : int { kFloat32, kBFloat16, kFloat16 };

inline int element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// The depthwise stencil's shape: x [n, h, w, k], weight [c, 1, r, s],
// output [n, p, q, c]; c is a multiple of k.
struct Geometry {
  int n, h, w, k;
  int p, q, c;
  int r, s;
  int stride_h, stride_w;
  int pad_h, pad_w;
  int dil_h, dil_w;
};

// NHWC memory, perhaps a channel slice: `ld` elements from pixel to pixel. No data: the operand is absent.
struct View {
  void* data;
  int64_t ld;
};

// act(scale * v + shift) per channel; a null scale is 1, a null shift 0;
// act as in fastcnn/ops/activations.py.
struct ChannelAffine {
  const float* scale;
  const float* shift;
  int act;
};

// A depthwise filter [c, r * s] in float32 or in the op's dtype.
struct Filter {
  const void* data;
  bool is_float32;
};

// mean and var [c] or null. The workspace holds the plan's `workspace` floats and comes uninitialised.
struct DepthwiseFwd {
  Geometry g;
  int dtype;
  View x;
  Filter weight;
  ChannelAffine in, out;
  View residual, y;
  float *mean, *var;
  float* workspace;
  void* stream;
};

// Null outputs are not wanted. coef [4, c], sums [2, k], dw [c, r * s].
struct DepthwiseBwd {
  Geometry g;
  int dtype;
  View grad, y;
  ChannelAffine out;
  const float* coef;
  View x;
  ChannelAffine in;
  const float* x_mean;
  Filter weight;
  View dx;
  float *dw, *sums;
  float* workspace;
  void* stream;
};

// The pointwise weight [channels, g.c] is in the op's dtype.
struct SeparableFwd {
  Geometry g;
  int channels;
  int dtype;
  View x;
  Filter weight;
  const void* pointwise;
  ChannelAffine in, mid, out;
  View residual, y;
  float *mean, *var;
  float* workspace;
  void* stream;
};

// What one draw decides on; fastcnn/ops/dropout.py has the same codes.
enum DropoutUnit : int { kDropElement, kDropChannel, kDropSample };

// Memory as a matrix [rows, channels], of rows_per_sample rows each sample. Draw i is word i % 4 of
// Philox-4x32-10 with the counter (i / 4, seed[1]) and the key seed[0]; what it decides on is kept, and
// scaled, where it is at least `threshold`, of 2^32. The seed is in the GPU's memory.
struct DropoutMask {
  int64_t rows, channels, rows_per_sample;
  int unit;
  uint64_t threshold;
  float scale;
  const uint64_t* seed;
};

// out = mask * scale * act(x + bias) + residual; out may be x.
struct DropoutFwd {
  DropoutMask mask;
  int dtype;
  const void* x;
  const float* bias;
  int act;
  const void* residual;
  void* out;
  void* stream;
};

// dx = mask * scale * grad * act'(z + bias), z unused without an activation; dbias [channels] is its sum over
// the rows, or null. The workspace holds the plan's `workspace` floats and comes uninitialised.
struct DropoutBwd {
  DropoutMask mask;
  int dtype;
  const void *grad, *z;
  const float* bias;
  int act;
  void* dx;
  float* dbias;
  float* workspace;
  void* stream;
};

// Capsule votes and routing; fastcnn/ops/capsule_routing.py has the formulas. The dtype is that of u, v and
// their gradients; everything else is float32.
struct CapsuleShape {
  int64_t batch;
  int in_caps, in_dim, out_caps, out_dim;
  int iterations;
  bool leaky;
  int dtype;

  constexpr int64_t outputs() const { return int64_t(out_caps) * out_dim; }
};

// u [batch, in_caps, in_dim], weight [in_caps, out_caps, in_dim, out_dim], bias [out_caps, out_dim] or null,
// v [batch, out_caps, out_dim], s [iterations, batch, out_caps, out_dim]. The workspace holds the plan's
// `workspace` floats and comes uninitialised.
struct CapsuleFwd {
  CapsuleShape shape;
  const void* u;
  const float *weight, *bias;
  void* v;
  float* s;
  float* workspace;
  void* stream;
};

// du and dw may be null; `detach`: the coupling coefficients are constants.
struct CapsuleBwd {
  CapsuleShape shape;
  bool detach;
  const void *grad, *u;
  const float *weight, *s;
  void* du;
  float *dw, *dbias;
  float* workspace;
  void* stream;
};

}  // namespace fastcnn::cuda
