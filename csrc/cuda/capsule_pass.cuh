// A pass of routing over the input capsules: votes are made on the way, coefficients come from their
// agreement with the output capsules so far, and a block leaves its share of the sum of coefficients * votes.
//
// A thread holds a quad of an output capsule for kImages images: votes, sums and what the votes are compared
// with, in registers. The weights of an input capsule are streamed into shared memory once for all images of
// the block, its u are there already. A coordinate of u costs a thread two or three 16-byte loads for 4
// kImages multiply-adds.
//
// Floor for 1152 x 8 -> 10 x 16 and 100 images on an H100 (29.6 T multiply-adds per second): votes are 147 M
// multiply-adds, 5.0 us; agreements and sums another 18 M each, so a routed pass takes 6.2 us. u and W are
// 9.6 MB, read from memory once (3.2 us) and then from L2; the votes would be 74 MB in every reading and
// writing of them.
#pragma once

#include "capsule_coupling.cuh"
#include "copy_async.cuh"
#include "plan.h"
#include "vec.cuh"

namespace fastcnn::cuda {

// What the coefficients are: nothing (the caller scales the sum), the coupling coefficients, or the gradients
// of their logits.
enum CapsuleCoefficients { kUniform, kCoupling, kLogitGradient };

struct CapsulePass {
  CapsuleShape shape;
  const void* u;
  const float* weight;
  const float* totals;  // [batch, out_caps, out_dim]: of v over the iterations before; unused if uniform
  const float* ds;      // [batch, out_caps, out_dim]: s' gradient; for logits' gradients only
  float* partials;      // [chunks, batch, out_caps, out_dim]
  bool aligned;         // whether quads of weights and outputs are
};

// Eight images where registers allow them, four for more columns or few images. Three blocks of 128 threads
// leave 168 registers to a thread.
template <int kImages>
constexpr int kCapsuleThreads = kImages == 8 ? 128 : 512;
template <int kImages>
constexpr int kCapsuleBlocks = kImages == 8 ? 3 : 1;
// Coordinates whose u and W are loaded at once.
template <CapsuleCoefficients kCoefficients>
constexpr int kCapsuleAtOnce = kCoefficients == kLogitGradient ? 1 : 4;

template <int kImages>
using Quads = float[kImages][4];

// A thread's share of a block's work.
template <int kImages>
struct PassThread {
  int column, group;
  int out_capsule, quad;
  int count;       // values in the quad; none for a thread that is left over
  int64_t output;  // of an image's
  int64_t image;
  int images;

  FASTCNN_DEVICE PassThread(const CapsuleShape& shape, const CapsulePassPlan& plan, int tile, int index)
      : column(index % plan.columns),
        group(index / plan.columns),
        out_capsule(column / plan.quads),
        quad(column % plan.quads),
        count(group < plan.groups ? min(shape.out_dim - 4 * quad, 4) : 0),
        output(int64_t(out_capsule) * shape.out_dim + 4 * quad),
        image((int64_t(tile) * plan.groups + group) * kImages),
        images(int(min(shape.batch - image, int64_t(kImages)))) {}

  FASTCNN_DEVICE int64_t at(int64_t outputs, int i) const { return (image + i) * outputs + output; }

  // from [batch, outputs]; zeros where there is no image.
  FASTCNN_DEVICE void load(const float* from, int64_t outputs, bool aligned, Quads<kImages>& to) const {
#pragma unroll
    for (int i = 0; i < kImages; ++i) {
      const Vector<float> v = load_vector(from + at(outputs, i), i < images ? count : 0, aligned);
#pragma unroll
      for (int e = 0; e < 4; ++e) to[i][e] = v.at[e];
    }
  }

  FASTCNN_DEVICE void store(const Quads<kImages>& from, float* to, int64_t outputs, bool aligned) const {
#pragma unroll
    for (int i = 0; i < kImages; ++i) {
      if (i < images) store_vector(to + at(outputs, i), from[i], count, aligned);
    }
  }
};

// W of an input capsule's coordinates [row, row + kCapsuleRows), [row][column] of quads, one stage ahead.
class WeightRing {
 public:
  template <int kImages>
  FASTCNN_DEVICE WeightRing(const CapsulePass& op, const CapsulePassPlan& plan,
                            const PassThread<kImages>& thread, float* shared)
      : op_(op),
        plan_(plan),
        shared_(shared),
        column_(thread.column),
        group_(thread.group),
        offset_(thread.out_capsule * op.shape.in_dim * op.shape.out_dim + 4 * thread.quad) {}

  // Into the stage that is free; nothing beyond the last capsule.
  FASTCNN_DEVICE void fetch(int capsule, int row, int last) {
    const CapsuleShape& s = op_.shape;
    const int rows = capsule < last && group_ < plan_.groups ? min(s.in_dim - row, kCapsuleRows) : 0;
    const float* from = op_.weight + (capsule * s.outputs() * s.in_dim + int64_t(row) * s.out_dim) + offset_;
    float* to = stage();
    for (int d = group_; d < rows; d += plan_.groups) {
      if (op_.aligned) {
        copy_async(to + d * plan_.columns * 4, from + d * s.out_dim, true);
      } else {
        const int count = min(s.out_dim - column_ % plan_.quads * 4, 4);
        *reinterpret_cast<uint4*>(to + d * plan_.columns * 4) =
            load_vector(from + d * s.out_dim, count, false).words;
      }
    }
    copy_async_commit();
    stage_ ^= 1;
  }

  // The weights of the thread's quad that were fetched last, and the fetch of the next ones, into the stage
  // that all threads are done with.
  FASTCNN_DEVICE const float* next(int capsule, int row, int last) {
    copy_async_wait<0>();
    __syncthreads();
    fetch(capsule, row, last);
    return stage();
  }

 private:
  static_assert(kCapsuleStages == 2, "a stage is in use while the other is filled");

  FASTCNN_DEVICE float* stage() const {
    return shared_ + (stage_ * kCapsuleRows * plan_.columns + column_) * 4;
  }

  const CapsulePass& op_;
  const CapsulePassPlan& plan_;
  float* const shared_;
  const int column_, group_;
  const int offset_;  // of the quad, in an input capsule's weights
  int stage_ = 0;
};

// u of input capsules [capsule][coordinate] x [image], zeros where there is no image.
template <class T>
FASTCNN_DEVICE void stage_inputs(const CapsulePass& op, const CapsulePassPlan& plan, int tile, int first,
                                 int capsules, float* shared) {
  const int in_tile = plan.groups * plan.images, rows = capsules * op.shape.in_dim;
  const int64_t row = int64_t(op.shape.in_caps) * op.shape.in_dim;
  for (int i = threadIdx.x / 32; i < in_tile; i += blockDim.x / 32) {
    const int64_t image = int64_t(tile) * in_tile + i;
    const T* from = static_cast<const T*>(op.u) + image * row + int64_t(first) * op.shape.in_dim;
    for (int j = threadIdx.x % 32; j < rows; j += 32) {
      shared[j * plan.pitch() + i] = image < op.shape.batch ? to_float(from[j]) : 0.f;
    }
  }
}

// votes += u W over `rows` coordinates, kAtOnce of which are loaded at once.
template <int kImages, int kAtOnce>
FASTCNN_DEVICE void add_votes(const float* u, int pitch, const float* weight, int columns, int rows,
                              Quads<kImages>& votes) {
#pragma unroll kAtOnce
  for (int d = 0; d < rows; ++d) {
    Vector<float> w, x[kImages / 4];
    w.words = *reinterpret_cast<const uint4*>(weight + d * columns * 4);
#pragma unroll
    for (int i = 0; i < kImages / 4; ++i) {
      x[i].words = *reinterpret_cast<const uint4*>(u + d * pitch + 4 * i);
    }
#pragma unroll
    for (int i = 0; i < kImages; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) votes[i][e] = fmaf(x[i / 4].at[i % 4], w.at[e], votes[i][e]);
    }
  }
}

// The quad's share of votes . other for each image, to consecutive floats.
template <int kImages>
FASTCNN_DEVICE void store_agreements(const Quads<kImages>& votes, const Quads<kImages>& other, float* to) {
#pragma unroll
  for (int i = 0; i < kImages; i += 4) {
    Vector<float> sums;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sums.at[j] = 0.f;
#pragma unroll
      for (int e = 0; e < 4; ++e) sums.at[j] = fmaf(votes[i + j][e], other[i + j][e], sums.at[j]);
    }
    *reinterpret_cast<uint4*>(to + i) = sums.words;
  }
}

// sums += coefficient * votes, and the votes are used up.
template <int kImages>
FASTCNN_DEVICE void use_votes(const float* coefficients, Quads<kImages>& votes, Quads<kImages>& sums) {
#pragma unroll
  for (int i = 0; i < kImages; i += 4) {
    Vector<float> c;
    c.words = *reinterpret_cast<const uint4*>(coefficients + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums[i + j][e] = fmaf(c.at[j], votes[i + j][e], sums[i + j][e]);
        votes[i + j][e] = 0.f;
      }
    }
  }
}

template <class T, int kImages, CapsuleCoefficients kCoefficients>
class PassBlock {
 public:
  FASTCNN_DEVICE PassBlock(const CapsulePass& op, const CapsulePassPlan& plan)
      : op_(op),
        plan_(plan),
        tile_(blockIdx.x % plan.tiles),
        chunk_(blockIdx.x / plan.tiles),
        last_(min((chunk_ + 1) * plan.chunk, op.shape.in_caps)),
        thread_(op.shape, plan, tile_, threadIdx.x),
        works_(thread_.count > 0),
        weights_(reinterpret_cast<float*>(dynamic_shared())),
        logits_(weights_ + kCapsuleStages * kCapsuleRows * plan.columns * 4),
        gradients_(logits_ + (kCoefficients == kLogitGradient ? plan.columns * plan.pitch() : 0)),
        inputs_(gradients_ + plan.columns * plan.pitch()),
        ring_(op, plan, thread_, weights_) {}

  FASTCNN_DEVICE void run() {
    const int64_t outputs = op_.shape.outputs();
    const int first = chunk_ * plan_.chunk;
    ring_.fetch(first, 0, last_);
    if (kCoefficients != kUniform) thread_.load(op_.totals, outputs, op_.aligned, total_);
    if (kCoefficients == kLogitGradient) thread_.load(op_.ds, outputs, op_.aligned, ds_);
    for (int begin = first; begin < last_; begin += plan_.staged) {
      const int end = min(begin + plan_.staged, last_);
      __syncthreads();
      stage_inputs<T>(op_, plan_, tile_, begin, end - begin, inputs_);
      const float* u = inputs_ + thread_.group * kImages;
      for (int capsule = begin; capsule < end; ++capsule) {
        u = make_votes(capsule, u);
        if (kCoefficients != kUniform) route();
      }
    }
    // Its place again, instead of registers held so long.
    const PassThread<kImages> thread(op_.shape, plan_, tile_, opaque(threadIdx.x));
    thread.store(sums_, op_.partials + chunk_ * op_.shape.batch * outputs, outputs, op_.aligned);
  }

 private:
  // From u of an input capsule on; returns that of the next. Uniform coefficients need no votes of their own.
  FASTCNN_DEVICE const float* make_votes(int capsule, const float* u) {
    const int in_dim = op_.shape.in_dim, pitch = plan_.pitch();
    for (int row = 0; row < in_dim; row += kCapsuleRows) {
      const int rows = min(in_dim - row, kCapsuleRows);
      const bool ends = row + rows == in_dim;
      const float* weight = ring_.next(capsule + ends, ends ? 0 : row + rows, last_);
      if (works_) {
        add_votes<kImages, kCapsuleAtOnce<kCoefficients>>(u, pitch, weight, plan_.columns, rows,
                                                          kCoefficients == kUniform ? sums_ : votes_);
      }
      u += rows * pitch;
    }
    return u;
  }

  // From votes to their share of the sums.
  FASTCNN_DEVICE void route() {
    const int pitch = plan_.pitch(), own = thread_.column * pitch + thread_.group * kImages;
    if (works_) {
      store_agreements<kImages>(votes_, total_, logits_ + own);
      if (kCoefficients == kLogitGradient) store_agreements<kImages>(votes_, ds_, gradients_ + own);
    }
    __syncthreads();
    couple_rows<kCoefficients == kLogitGradient>({logits_, gradients_, plan_.groups * kImages, 1, pitch,
                                                  op_.shape.out_caps, plan_.quads, op_.shape.leaky});
    __syncthreads();
    if (works_) {
      const float* from = kCoefficients == kLogitGradient ? gradients_ : logits_;
      use_votes<kImages>(from + own - thread_.quad * pitch, votes_, sums_);
    }
  }

  const CapsulePass& op_;
  const CapsulePassPlan& plan_;
  const int tile_, chunk_, last_;
  const PassThread<kImages> thread_;
  const bool works_;
  float *const weights_, *const logits_, *const gradients_, *const inputs_;
  WeightRing ring_;
  Quads<kImages> total_, ds_, votes_ = {}, sums_ = {};
};

template <class T, int kImages, CapsuleCoefficients kCoefficients>
__global__ void __launch_bounds__(kCapsuleThreads<kImages>, kCapsuleBlocks<kImages>)
    capsule_pass_kernel(const CapsulePass op, const CapsulePassPlan plan) {
  PassBlock<T, kImages, kCoefficients>(op, plan).run();
}

}  // namespace fastcnn::cuda
