#include "separable_fwd.h"

#include <stdexcept>

#include "reduce.h"

namespace fastcnn::cuda {

void separable_fwd(const SeparableFwd& op, const SeparablePlan& plan) {
  switch (op.dtype) {
    case kFloat32:
      separable_fwd_f32(op, plan);
      break;
    case kBFloat16:
      separable_fwd_bf16(op, plan);
      break;
    case kFloat16:
      separable_fwd_f16(op, plan);
      break;
    default:
      throw std::invalid_argument("dtype: expected float32, bfloat16 or float16");
  }
  if (op.mean == nullptr) return;
  merge_moments(op.workspace, plan.blocks * (plan.m / 32), op.channels, op.mean, op.var, op.stream);
}

}  // namespace fastcnn::cuda
