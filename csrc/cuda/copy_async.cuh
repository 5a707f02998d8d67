// Asynchronous copies as functions: inline PTX here, a plain implementation in the CPU stand-in.
#pragma once

#include <cstdint>

#include "platform.cuh"

#ifndef FASTCNN_CUDA_ON_CPU

namespace fastcnn::cuda {

FASTCNN_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes global to shared; zeros when not `valid` (then `global` is not read).
FASTCNN_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes)
               : "memory");
}
FASTCNN_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
FASTCNN_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace fastcnn::cuda

#endif
