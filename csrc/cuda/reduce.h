// The second stage of every reduction: per-block partials to results, in a fixed order.
#pragma once

#include <cstdint>

namespace fastcnn::cuda {

// partials [slices][3][channels] (statistics.cuh) to the mean and the biased variance.
void merge_moments(const float* partials, int slices, int channels, float* mean, float* var, void* stream);

// partials [slices][rows][channels], summed over slices, to out
// [rows][channels], or [channels][rows] if transposed.
void sum_partials(const float* partials, int slices, int rows, int channels, bool transposed, float* out,
                  void* stream);

}  // namespace fastcnn::cuda
