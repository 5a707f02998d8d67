// Capsules: squash, and votes with all iterations of routing (fastcnn/ops/capsule_routing.py has the
// formulas).
#pragma once

#include "ops/tensor.h"

namespace fastcnn {

// v = squash(s) over rows of `dim`; with grad also ds, into out.
struct Squash {
  int64_t rows = 0, dim = 0;
  Dtype dtype = kFloat32;
  const void* s = nullptr;
  const void* grad = nullptr;  // null: forward
  void* out = nullptr;
};

struct CapsuleShape {
  int64_t batch = 0, in_caps = 0, in_dim = 0, out_caps = 0, out_dim = 0;
  int iterations = 1;
  bool leaky = false;
  Dtype dtype = kFloat32;  // of u, v and their gradients; everything else is float32

  int64_t outputs() const { return out_caps * out_dim; }
};

struct CapsuleForward {
  CapsuleShape shape;
  const void* u = nullptr;        // [batch, in_caps, in_dim]
  const float* weight = nullptr;  // [in_caps, out_caps, in_dim, out_dim]
  const float* bias = nullptr;    // [out_caps, out_dim] or null
  void* v = nullptr;              // [batch, out_caps, out_dim]
  float* s = nullptr;             // [iterations, batch, out_caps, out_dim]
};

struct CapsuleBackward {
  CapsuleShape shape;
  bool detach = false;
  const void* grad = nullptr;
  const void* u = nullptr;
  const float* weight = nullptr;
  const float* s = nullptr;
  void* du = nullptr;      // or null
  float* dw = nullptr;     // or null
  float* dbias = nullptr;  // [out_caps, out_dim]
};

}  // namespace fastcnn
