// From a shape to the pass that suits it.
#pragma once

#include "capsule_pass.cuh"
#include "dispatch.h"

namespace fastcnn::cuda {

// Whether quads of rows of outputs begin at multiples of 16 bytes in all of these.
template <class... Pointers>
bool quads_are_aligned(const CapsuleShape& shape, const Pointers*... pointers) {
  return shape.out_dim % 4 == 0 && ((reinterpret_cast<uintptr_t>(pointers) % sizeof(uint4) == 0) && ...);
}

template <CapsuleCoefficients kCoefficients>
void launch_pass(const char* name, const CapsulePass& op, const CapsulePassPlan& plan, void* stream) {
  const dim3 grid(unsigned(plan.tiles) * unsigned(plan.chunks));
  with_dtype(op.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(name,
           plan.images == 8 ? capsule_pass_kernel<T, 8, kCoefficients>
                            : capsule_pass_kernel<T, 4, kCoefficients>,
           grid, plan.threads, plan.shared_bytes, stream, op, plan);
  });
}

}  // namespace fastcnn::cuda
