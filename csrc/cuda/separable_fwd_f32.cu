#include "separable_fwd.cuh"
#include "separable_fwd.h"

namespace fastcnn::cuda {

void separable_fwd_f32(const SeparableFwd& op, const SeparablePlan& plan) {
  if (plan.m == 32) return launch_separable<float, 32, 64>(op, plan);
  launch_separable<float, 64, 64>(op, plan);
}

}  // namespace fastcnn::cuda
