#include "separable_fwd.cuh"
#include "separable_fwd.h"

namespace fastcnn::cuda {

void separable_fwd_bf16(const SeparableFwd& op, const SeparablePlan& plan) {
  launch_separable<bf16>(op, plan);
}

}  // namespace fastcnn::cuda
