// Tensor-core products as functions: inline PTX here, a plain implementation in the CPU stand-in.
#pragma once

#include "copy_async.cuh"
#include "vec.cuh"

#ifndef FASTCNN_CUDA_ON_CPU

namespace fastcnn::cuda {

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
