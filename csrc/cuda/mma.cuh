// Tensor-core products and asynchronous copies as functions: inline PTX
// here, a plain implementation in the CPU stand-in.
#pragma once

#include "vec.cuh"

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

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
FASTCNN_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b for a 16 x 8 tile over 16 of K, in float32.
#define FASTCNN_MMA(type)                                                             \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

FASTCNN_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, bf16) {
  FASTCNN_MMA("bf16");
}
FASTCNN_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, f16) {
  FASTCNN_MMA("f16");
}
#undef FASTCNN_MMA

}  // namespace fastcnn::cuda

#endif
