// What is done to an image's output capsules between two passes: one block, a thread for each quad.
#pragma once

#include "plan.h"
#include "squash.cuh"
#include "vec.cuh"

namespace fastcnn::cuda {

// A quad of an image's outputs, and the block's shared memory: [threads / columns][column] of quads for sums
// over chunks, then [column] of quads of s, then [column] of quads of its gradient.
struct OutputThread {
  int columns, column;
  int row, rows;  // of threads; the first holds the results
  int capsule, quad;
  int count;  // values in the quad; none beyond the first row
  int64_t outputs, at;
  int out_caps, out_dim, quads;
  bool aligned;
  uint4* sums;
  float *s, *ds;

  FASTCNN_DEVICE OutputThread(const CapsuleShape& shape, int of_quads, bool is_aligned)
      : columns(shape.out_caps * of_quads),
        column(threadIdx.x % columns),
        row(threadIdx.x / columns),
        rows(blockDim.x / columns),
        capsule(column / of_quads),
        quad(column % of_quads),
        count(row == 0 ? min(shape.out_dim - 4 * quad, 4) : 0),
        outputs(shape.outputs()),
        at(int64_t(capsule) * shape.out_dim + 4 * quad),
        out_caps(shape.out_caps),
        out_dim(shape.out_dim),
        quads(of_quads),
        aligned(is_aligned),
        sums(reinterpret_cast<uint4*>(dynamic_shared())),
        s(reinterpret_cast<float*>(sums + blockDim.x)),
        ds(s + 4 * columns) {}

  // A quad of [*, outputs] at an image; zeros beyond the first row.
  FASTCNN_DEVICE Vector<float> load(const float* from, int64_t image) const {
    return load_vector<float, true>(from + image * outputs + at, count, aligned);
  }
  FASTCNN_DEVICE void store(float* to, int64_t image, const Vector<float>& v) const {
    store_vector(to + image * outputs + at, v.at, count, aligned);
  }
  FASTCNN_DEVICE void share(float* to, const Vector<float>& v) const {
    if (row == 0) reinterpret_cast<uint4*>(to)[column] = v.words;
  }

  // Over partials [chunk][batch, outputs], in the first row.
  FASTCNN_DEVICE Vector<float> sum_chunks(const float* partials, int chunks, int64_t batch,
                                          int64_t image) const {
    Vector<float> sum;
    sum.words = make_uint4(0, 0, 0, 0);
    const int values = row < rows ? min(out_dim - 4 * quad, 4) : 0;
#pragma unroll 4
    for (int chunk = row; chunk < chunks && values > 0; chunk += rows) {
      add(sum, load_vector(partials + (chunk * batch + image) * outputs + at, values, aligned));
    }
    sums[threadIdx.x] = sum.words;
    __syncthreads();
    for (int i = 1; i < rows && row == 0; ++i) {
      Vector<float> other;
      other.words = sums[i * columns + column];
      add(sum, other);
    }
    return sum;
  }

  static FASTCNN_DEVICE void add(Vector<float>& to, const Vector<float>& v) {
#pragma unroll
    for (int e = 0; e < 4; ++e) to.at[e] += v.at[e];
  }
};

// function(the output capsule, its factors, its shared s), one thread an output capsule; shared values are
// there before and results after.
template <class Function>
FASTCNN_DEVICE void for_each_output_capsule(const OutputThread& thread, Function function) {
  __syncthreads();
  for (int o = threadIdx.x; o < thread.out_caps; o += blockDim.x) {
    float* s = thread.s + 4 * o * thread.quads;
    function(o, squash_factors(s, thread.out_dim), s);
  }
  __syncthreads();
}

// v = squash(s); all of the block's threads call.
FASTCNN_DEVICE Vector<float> squashed(const OutputThread& thread, const Vector<float>& s) {
  float* factors = thread.ds;
  thread.share(thread.s, s);
  for_each_output_capsule(thread, [&](int o, const SquashFactors& q, float*) { factors[o] = q.f; });
  Vector<float> v;
#pragma unroll
  for (int e = 0; e < 4; ++e) v.at[e] = factors[thread.capsule] * s.at[e];
  __syncthreads();
  return v;
}

// ds = f g + n f' (s . g) s / n^2; all of the block's threads call. s / n replaces the shared s, and of each
// output capsule f and n f' (s . g) / n the shared gradient.
FASTCNN_DEVICE Vector<float> squash_gradient(const OutputThread& thread, const Vector<float>& s,
                                             const Vector<float>& grad) {
  thread.share(thread.s, s);
  thread.share(thread.ds, grad);
  for_each_output_capsule(thread, [&](int o, const SquashFactors& q, float* own) {
    float *g = thread.ds + 4 * o * thread.quads, along = 0.f;
    for (int e = 0; e < thread.out_dim; ++e) {
      own[e] /= q.norm;
      along = fmaf(own[e], g[e], along);
    }
    g[0] = q.f;
    g[1] = along * q.slope;
  });
  const float *factors = thread.ds + 4 * thread.capsule * thread.quads,
              *direction = thread.s + 4 * thread.column;
  Vector<float> ds;
#pragma unroll
  for (int e = 0; e < 4; ++e) ds.at[e] = fmaf(direction[e], factors[1], factors[0] * grad.at[e]);
  __syncthreads();
  return ds;
}

// Threads and shared memory of a kernel of these blocks.
inline int output_threads(const CapsulePassPlan& plan, bool with_sums) {
  return with_sums ? kCapsuleOutputThreads : (plan.columns + 31) / 32 * 32;
}
inline size_t output_shared_bytes(const CapsulePassPlan& plan, int threads) {
  return (size_t(threads) + 2 * size_t(plan.columns)) * sizeof(uint4);
}

}  // namespace fastcnn::cuda
