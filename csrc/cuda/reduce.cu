#include "reduce.h"
#include "statistics.cuh"

namespace fastcnn::cuda {
namespace {

// A block folds 32 columns with 8 rows of threads, each over every 8th slice: loads of a row are coalesced,
// and there are enough of them in flight although the slices (some hundreds) are folded in order.
constexpr int kColumns = 32, kRows = 8, kThreads = kColumns * kRows;

__global__ void merge_moments_kernel(const float* partials, int slices, int channels, float* mean,
                                     float* var) {
  Moments* shared = reinterpret_cast<Moments*>(dynamic_shared());
  const int column = threadIdx.x % kColumns, row = threadIdx.x / kColumns;
  const int c = blockIdx.x * kColumns + column;
  Moments m = {0.f, 0.f, 0.f};
  if (c < channels) {
    for (int i = row; i < slices; i += kRows) m = merge(m, load_moments(partials, i, channels, c));
  }
  shared[threadIdx.x] = m;
  __syncthreads();
  if (row != 0 || c >= channels) return;
  for (int i = 1; i < kRows; ++i) m = merge(m, shared[i * kColumns + column]);
  mean[c] = m.mean;
  var[c] = m.m2 / m.count;
}

__global__ void sum_partials_kernel(const float* partials, int slices, int rows, int channels,
                                    bool transposed, float* out) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const int column = threadIdx.x % kColumns, row = threadIdx.x / kColumns;
  const int64_t size = int64_t(rows) * channels, at = int64_t(blockIdx.x) * kColumns + column;
  float sum = 0.f;
  if (at < size) {
    for (int i = row; i < slices; i += kRows) sum += partials[i * size + at];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (row != 0 || at >= size) return;
  for (int i = 1; i < kRows; ++i) sum += shared[i * kColumns + column];
  out[transposed ? at % channels * rows + at / channels : at] = sum;
}

int blocks(int64_t columns) { return int((columns + kColumns - 1) / kColumns); }

}  // namespace

void merge_moments(const float* partials, int slices, int channels, float* mean, float* var, void* stream) {
  launch("merge_moments", merge_moments_kernel, dim3(blocks(channels)), kThreads, kThreads * sizeof(Moments),
         stream, partials, slices, channels, mean, var);
}

void sum_partials(const float* partials, int slices, int rows, int channels, bool transposed, float* out,
                  void* stream) {
  launch("sum_partials", sum_partials_kernel, dim3(blocks(int64_t(rows) * channels)), kThreads,
         kThreads * sizeof(float), stream, partials, slices, rows, channels, transposed, out);
}

}  // namespace fastcnn::cuda
