// squash of one output capsule: v = s n / (1 + n^2), n = |s|.
#pragma once

#include "platform.cuh"

namespace fastcnn::cuda {

struct SquashFactors {
  float norm;   // n; 1 where it is 0, and then f is 0
  float f;      // n / (1 + n^2)
  float slope;  // n f'(n)
};

// Squares of s over its largest value neither overflow nor vanish, and n / (1 + n^2) is the same for n and
// 1 / n.
FASTCNN_DEVICE SquashFactors squash_factors(const float* s, int dim) {
  float largest = 0.f;
  for (int i = 0; i < dim; ++i) largest = fmaxf(largest, fabsf(s[i]));
  if (largest == 0.f) return {1.f, 0.f, 0.f};
  float square = 0.f;
  for (int i = 0; i < dim; ++i) {
    const float x = s[i] / largest;
    square = fmaf(x, x, square);
  }
  const float norm = sqrtf(square) * largest, m = fminf(norm, 1.f / norm), m2 = m * m;
  const float f = m / (1.f + m2), slope = f * (1.f - m2) / (1.f + m2);
  return {norm, f, norm > 1.f ? -slope : slope};
}

}  // namespace fastcnn::cuda
