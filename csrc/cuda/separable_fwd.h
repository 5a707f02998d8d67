// One translation unit per element type: separable_fwd_f32.cu, separable_fwd_bf16.cu, separable_fwd_f16.cu.
#pragma once

#include "plan.h"

namespace fastcnn::cuda {

void separable_fwd_f32(const SeparableFwd& op, const SeparablePlan& plan);
void separable_fwd_bf16(const SeparableFwd& op, const SeparablePlan& plan);
void separable_fwd_f16(const SeparableFwd& op, const SeparablePlan& plan);

}  // namespace fastcnn::cuda
