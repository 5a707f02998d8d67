// Everything that differs between nvcc and the test-only CPU stand-in: qualifiers, shared memory, launches.
#pragma once

#ifdef FASTCNN_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define FASTCNN_DEVICE __device__ __forceinline__
#define FASTCNN_HOST_DEVICE __host__ __device__ inline

namespace fastcnn::cuda {

FASTCNN_DEVICE char* dynamic_shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// v, of which the compiler no longer knows where it came from: it
// recomputes what depends on it instead of holding it.
FASTCNN_DEVICE int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
            void* stream, const Arguments&... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;  // more dynamic shared memory than this is opt-in per kernel
  if (shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name);
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}

}  // namespace fastcnn::cuda

#endif
