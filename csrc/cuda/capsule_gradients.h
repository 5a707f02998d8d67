// du and dW of capsule routing.
#pragma once

#include "plan.h"

namespace fastcnn::cuda {

// The votes' gradient is c ds + dlogits * (total of v before) over `terms` iterations, and, if the plan says
// uniform, c ds of the first one. Null outputs are not wanted.
struct CapsuleGradients {
  CapsuleShape shape;
  bool detach;  // no gradients through the logits
  const void* u;
  const float* weight;
  const float *totals, *ds;  // [terms, batch, out_caps, out_dim]
  const float* first_ds;     // [batch, out_caps, out_dim]
  void* du;
  float* dw;
  bool aligned;  // whether quads of weights and outputs are
};

void capsule_gradients(const CapsuleGradients& op, const CapsuleGradientPlan& plan, void* stream);

}  // namespace fastcnn::cuda
