// du and dW of capsule routing: a block has some input capsules for all images.
//
// A thread holds the weights of one quad of output values for kDepth coordinates of an input capsule, and the
// gradients of those weights, in registers; images go by in tiles. For a tile the block makes the votes'
// agreements with every iteration's vectors, of these the coefficients, and then each vote's gradient, which
// is used for dW at once and for du after a sum over the columns. dW needs no sum beyond the thread.
//
// Floor for 1152 x 8 -> 10 x 16, 100 images, 3 iterations, on an H100 (29.6 T multiply-adds per second): 148
// per thread and image for 32 that a vote's quad is, 0.68 G, 23 us. Every block reads what the images'
// outputs are compared with, 0.3 MB, from L2: hence as many input capsules per block as it has threads for.
#include "capsule_coupling.cuh"
#include "capsule_gradients.h"
#include "dispatch.h"

namespace fastcnn::cuda {
namespace {

template <int kDepth>
constexpr int kGradientThreads = kDepth == 8 ? 512 : 256;

FASTCNN_DEVICE float dot(const Vector<float>& a, const Vector<float>& b) {
  float sum = 0.f;
#pragma unroll
  for (int e = 0; e < 4; ++e) sum = fmaf(a.at[e], b.at[e], sum);
  return sum;
}

// Sums v over kCapsuleLanes neighbouring threads; thread j of them keeps the j-th part of v, at its front.
template <int kDepth>
FASTCNN_DEVICE void sum_and_scatter(float (&v)[kDepth]) {
  static_assert(kCapsuleLanes == 8 && kDepth % kCapsuleLanes == 0, "one shuffle for each power of two");
#pragma unroll
  for (int half = kDepth / 2, offset = kCapsuleLanes / 2; offset > 0; half /= 2, offset /= 2) {
    const bool upper = threadIdx.x & offset;
#pragma unroll
    for (int i = 0; i < kDepth / 2; ++i) {
      if (i >= half) break;
      const float other = __shfl_xor_sync(0xffffffffu, upper ? v[i] : v[i + half], offset);
      v[i] = (upper ? v[i + half] : v[i]) + other;
    }
  }
}

template <class T, int kDepth>
class GradientBlock {
 public:
  FASTCNN_DEVICE GradientBlock(const CapsuleGradients& op, const CapsuleGradientPlan& plan)
      : op_(op), plan_(plan), s_(op.shape), lanes_(plan.lanes()) {
    // A thread that is left over reads what the last one reads, and writes nothing.
    thread_ = min(int(threadIdx.x), lanes_ - 1);
    works_ = int(threadIdx.x) < lanes_;
    own_capsule_ = thread_ / plan.stride;
    const int column = thread_ % plan.stride, quads = (s_.out_dim + 3) / 4, out_capsule = column / quads;
    const bool is_column = out_capsule < s_.out_caps;
    quad_ = is_column ? column % quads : 0;
    count_ = is_column ? min(s_.out_dim - 4 * quad_, 4) : 0;
    output_ = int64_t(out_capsule) * s_.out_dim + 4 * quad_;
    first_ = int64_t(blockIdx.x) * plan.capsules;
    const bool is_capsule = count_ > 0 && first_ + own_capsule_ < s_.in_caps;
    weight_count_ = is_capsule ? count_ : 0;
    weight_at_ = ((first_ + own_capsule_) * s_.out_caps + out_capsule) * s_.in_dim * s_.out_dim + 4 * quad_;

    planes_ = reinterpret_cast<float*>(dynamic_shared());
    u_ = planes_ + plan.planes() * plan.images * plan.stride * 4;
    logits_ = u_ + plan.images * plan.capsules * kDepth;
    gradients_ = logits_ + plan.terms * plan.images * lanes_;
    parts_ = gradients_ + plan.terms * plan.images * lanes_;
  }

  FASTCNN_DEVICE void run() {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      weight_[d] = load_vector(op_.weight + weight_at_ + d * s_.out_dim, d < s_.in_dim ? weight_count_ : 0,
                               op_.aligned);
      dw_[d].words = make_uint4(0, 0, 0, 0);
    }
    const Agreements agreements = {logits_,
                                   gradients_,
                                   plan_.terms * plan_.images * plan_.capsules,
                                   plan_.stride,
                                   1,
                                   s_.out_caps,
                                   (s_.out_dim + 3) / 4,
                                   s_.leaky};
    for (image_ = 0; image_ < s_.batch; image_ += plan_.images) {
      stage_planes();
      stage_u();
      __syncthreads();
      if (plan_.terms > 0) {
        for (int i = 0; i < plan_.images; ++i) agree(i);
        __syncthreads();
        op_.detach ? couple_rows<false>(agreements) : couple_rows<true>(agreements);
        __syncthreads();
      }
      for (int i = 0; i < plan_.images; ++i) use(i);
      __syncthreads();
      if (op_.du != nullptr) store_du();
    }
    if (op_.dw != nullptr && works_) store_dw();
  }

 private:
  // The tile's images of totals and ds of every term, and of the first ds: [plane][image][column] of quads.
  FASTCNN_DEVICE void stage_planes() const {
    const int64_t outputs = s_.outputs(), plane_size = s_.batch * outputs;
    const int rows = works_ ? plan_.planes() * plan_.images : 0, column = thread_ % plan_.stride;
    for (int row = own_capsule_; row < rows; row += plan_.capsules) {
      const int plane = row / plan_.images, term = plane / 2;
      const int64_t image = image_ + row % plan_.images;
      const float* from =
          term == plan_.terms ? op_.first_ds : (plane % 2 ? op_.ds : op_.totals) + term * plane_size;
      const int count = image < s_.batch ? count_ : 0;
      *reinterpret_cast<uint4*>(planes_ + (row * plan_.stride + column) * 4) =
          load_vector(from + image * outputs + output_, count, op_.aligned).words;
    }
  }

  // [image][input capsule][coordinate], zeros where there is none.
  FASTCNN_DEVICE void stage_u() const {
    for (int i = threadIdx.x; i < plan_.images * plan_.capsules * kDepth; i += blockDim.x) {
      const int d = i % kDepth, capsule = i / kDepth % plan_.capsules;
      const int64_t image = image_ + i / kDepth / plan_.capsules;
      const bool is_there = image < s_.batch && first_ + capsule < s_.in_caps && d < s_.in_dim;
      u_[i] = is_there ? to_float(static_cast<const T*>(op_.u)[u_at(image, capsule) + d]) : 0.f;
    }
  }

  FASTCNN_DEVICE int64_t u_at(int64_t image, int capsule) const {
    return (image * s_.in_caps + first_ + capsule) * s_.in_dim;
  }

  FASTCNN_DEVICE void load_u(int image, Vector<float> (&u)[kDepth / 4]) const {
    const float* from = u_ + (image * plan_.capsules + own_capsule_) * kDepth;
#pragma unroll
    for (int i = 0; i < kDepth / 4; ++i) u[i].words = *reinterpret_cast<const uint4*>(from + 4 * i);
  }

  FASTCNN_DEVICE Vector<float> plane(int index, int image) const {
    Vector<float> v;
    const int row = index * plan_.images + image;
    v.words = *reinterpret_cast<const uint4*>(planes_ + (row * plan_.stride + thread_ % plan_.stride) * 4);
    return v;
  }

  // A vote's quad, and its share of the logits and of the coupling coefficients' gradients of every term.
  FASTCNN_DEVICE void agree(int image) const {
    Vector<float> u[kDepth / 4], vote;
    load_u(image, u);
    vote.words = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int d = 0; d < kDepth; ++d) add_scaled(vote, u[d / 4].at[d % 4], weight_[d]);
    for (int k = 0; k < plan_.terms && works_; ++k) {
      const int at = (k * plan_.images + image) * lanes_ + thread_;
      logits_[at] = dot(vote, plane(2 * k, image));
      if (!op_.detach) gradients_[at] = dot(vote, plane(2 * k + 1, image));
    }
  }

  // The vote's gradient, for dW and du.
  FASTCNN_DEVICE void use(int image) {
    Vector<float> u[kDepth / 4], dvote;
    dvote.words = make_uint4(0, 0, 0, 0);
    if (plan_.uniform) {
      add_scaled(dvote, uniform_coupling(s_.out_caps, s_.leaky), plane(2 * plan_.terms, image));
    }
    for (int k = 0; k < plan_.terms; ++k) {
      const int at = (k * plan_.images + image) * lanes_ + thread_ - quad_;
      add_scaled(dvote, logits_[at], plane(2 * k + 1, image));
      if (!op_.detach) add_scaled(dvote, gradients_[at], plane(2 * k, image));
    }
    load_u(image, u);
#pragma unroll
    for (int d = 0; d < kDepth; ++d) add_scaled(dw_[d], u[d / 4].at[d % 4], dvote);
    if (op_.du == nullptr) return;
    float part[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) part[d] = dot(weight_[d], dvote);
    sum_and_scatter(part);
    constexpr int kKept = kDepth / kCapsuleLanes;
#pragma unroll
    for (int i = 0; i < kKept && works_; ++i) parts_[(image * lanes_ + thread_) * kKept + i] = part[i];
  }

  // Over the groups of threads of an input capsule.
  FASTCNN_DEVICE void store_du() const {
    const int groups = plan_.stride / kCapsuleLanes;
    for (int i = threadIdx.x; i < plan_.images * plan_.capsules * kDepth; i += blockDim.x) {
      const int d = i % kDepth, row = i / kDepth, capsule = row % plan_.capsules;
      const int64_t image = image_ + row / plan_.capsules;
      if (image >= s_.batch || first_ + capsule >= s_.in_caps || d >= s_.in_dim) continue;
      float sum = 0.f;
      for (int group = 0; group < groups; ++group) sum += parts_[(row * groups + group) * kDepth + d];
      static_cast<T*>(op_.du)[u_at(image, capsule) + d] = from_float<T>(sum);
    }
  }

  FASTCNN_DEVICE void store_dw() const {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (d < s_.in_dim) {
        store_vector(op_.dw + weight_at_ + d * s_.out_dim, dw_[d].at, weight_count_, op_.aligned);
      }
    }
  }

  static FASTCNN_DEVICE void add_scaled(Vector<float>& to, float scale, const Vector<float>& v) {
#pragma unroll
    for (int e = 0; e < 4; ++e) to.at[e] = fmaf(scale, v.at[e], to.at[e]);
  }

  const CapsuleGradients& op_;
  const CapsuleGradientPlan& plan_;
  const CapsuleShape& s_;
  const int lanes_;  // threads of the block's input capsules
  int thread_;
  bool works_;
  int own_capsule_, quad_;
  int count_, weight_count_;  // values in the quad
  int64_t output_, weight_at_;
  int64_t first_, image_;
  Vector<float> weight_[kDepth], dw_[kDepth];
  float *planes_, *u_, *logits_, *gradients_, *parts_;
};

template <class T, int kDepth>
__global__ void __launch_bounds__(kGradientThreads<kDepth>)
    capsule_gradients_kernel(const CapsuleGradients op, const CapsuleGradientPlan plan) {
  GradientBlock<T, kDepth>(op, plan).run();
}

}  // namespace

void capsule_gradients(const CapsuleGradients& op, const CapsuleGradientPlan& plan, void* stream) {
  const dim3 grid(unsigned((op.shape.in_caps + plan.capsules - 1) / plan.capsules));
  with_dtype(op.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch("capsule_routing_bwd",
           plan.depth == 8 ? capsule_gradients_kernel<T, 8> : capsule_gradients_kernel<T, 16>, grid,
           plan.threads, plan.shared_bytes, stream, op, plan);
  });
}

}  // namespace fastcnn::cuda
