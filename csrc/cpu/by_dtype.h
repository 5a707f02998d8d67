// A kernel's float32 and bfloat16 forms. From AVX-512 with bf16 on only the latter is new: float32 is left to
// the plain AVX-512 build, which saves a fifth of what the compiler does.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace fastcnn {
namespace {

// run(float()) or run(bf16()); `kernel` is the table's entry for run.
template <class Parameters, class Run>
void by_dtype(Dtype dtype, [[maybe_unused]] void (*Kernels::*kernel)(const Parameters&),
              [[maybe_unused]] const Parameters& p, const Run& run) {
  if (dtype != kFloat32) return run(bf16());
#if FASTCNN_ISA_LEVEL >= 3
  (avx512_kernels().*kernel)(p);
#else
  run(float());
#endif
}

}  // namespace
}  // namespace fastcnn
