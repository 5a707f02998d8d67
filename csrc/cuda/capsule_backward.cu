// Capsule votes and routing, backward: the iterations from the last to the second, a pass over the input
// capsules each; then one kernel that makes du and dW of what all iterations want of a vote.
#include "capsule_gradients.h"
#include "capsule_launch.cuh"
#include "capsule_outputs.cuh"
#include "reduce.h"

namespace fastcnn::cuda {
namespace {

// Everything [*, batch, out_caps, out_dim]: totals of v before the iterations from the second on, ds of every
// iteration, dv summed over the later ones.
struct CapsuleStep {
  CapsuleShape shape;
  int quads, chunks;
  const void* grad;
  const float* s;
  const float* partials;
  float *totals, *ds, *dv;
  bool aligned;
};

// The totals, and the last iteration's ds. One block per multiprocessor is enough (as is said to the
// compiler, which would rather spill than keep room for fewer than three).
template <class T>
__global__ void __launch_bounds__(kCapsuleOutputThreads, 1) capsule_prepare_kernel(const CapsuleStep op) {
  const int64_t image = blockIdx.x, plane = op.shape.batch * op.shape.outputs();
  const OutputThread thread(op.shape, op.quads, op.aligned);
  const int last = op.shape.iterations - 1;
  Vector<float> total, grad;
  total.words = make_uint4(0, 0, 0, 0);
  for (int t = 0; t < last; ++t) {
    OutputThread::add(total, squashed(thread, thread.load(op.s + t * plane, image)));
    thread.store(op.totals + t * plane, image, total);
  }
  const T* from = static_cast<const T*>(op.grad) + image * thread.outputs + thread.at;
#pragma unroll
  for (int e = 0; e < 4; ++e) grad.at[e] = e < thread.count ? to_float(from[e]) : 0.f;
  const Vector<float> s = thread.load(op.s + last * plane, image);
  thread.store(op.ds + last * plane, image, squash_gradient(thread, s, grad));
}

// ds of iteration t - 1 from the pass of iteration t: its v is in the totals before t and all later ones.
__global__ void __launch_bounds__(kCapsuleOutputThreads, 1)
    capsule_step_kernel(const CapsuleStep op, const int t) {
  const int64_t image = blockIdx.x, before = (t - 1) * op.shape.batch * op.shape.outputs();
  const OutputThread thread(op.shape, op.quads, op.aligned);
  Vector<float> dv = thread.sum_chunks(op.partials, op.chunks, op.shape.batch, image);
  if (t + 1 < op.shape.iterations) OutputThread::add(dv, thread.load(op.dv, image));
  thread.store(op.dv, image, dv);
  const Vector<float> s = thread.load(op.s + before, image);
  thread.store(op.ds + before, image, squash_gradient(thread, s, dv));
}

// Of the whole batch: ds of every iteration that counts.
void find_gradients_of_s(const CapsuleBwd& op, const CapsulePassPlan& plan, const CapsuleStep& step) {
  const CapsuleShape& shape = op.shape;
  const int64_t plane = shape.batch * shape.outputs();
  const dim3 images(unsigned(shape.batch));
  int threads = output_threads(plan, false);
  with_dtype(shape.dtype, [&](auto type) {
    launch("capsule_routing_bwd", capsule_prepare_kernel<typename decltype(type)::type>, images, threads,
           output_shared_bytes(plan, threads), op.stream, step);
  });
  threads = output_threads(plan, true);
  for (int t = shape.iterations - 1; t > 0 && !op.detach; --t) {
    const CapsulePass pass = {shape,
                              op.u,
                              op.weight,
                              step.totals + (t - 1) * plane,
                              step.ds + t * plane,
                              const_cast<float*>(step.partials),
                              step.aligned};
    launch_pass<kLogitGradient>("capsule_routing_bwd", pass, plan, op.stream);
    launch("capsule_routing_bwd", capsule_step_kernel, images, threads, output_shared_bytes(plan, threads),
           op.stream, step, t);
  }
}

}  // namespace

void capsule_bwd(const CapsuleBwd& op, const CapsuleBwdPlan& plan) {
  const CapsuleShape& shape = op.shape;
  const int64_t plane = shape.batch * shape.outputs();
  const int last = shape.iterations - 1, first = op.detach ? last : 0;
  float *totals = op.workspace, *ds = totals + last * plane, *dv = ds + shape.iterations * plane,
        *partials = dv + plane;
  const bool aligned = quads_are_aligned(shape, op.weight, op.s, op.dw, op.workspace);
  if (shape.batch != 0) {
    find_gradients_of_s(
        op, plan.pass,
        {shape, plan.pass.quads, plan.pass.chunks, op.grad, op.s, partials, totals, ds, dv, aligned});
  }
  sum_partials(ds + first * plane, int((shape.iterations - first) * shape.batch), 1, int(shape.outputs()),
               false, op.dbias, op.stream);
  if (op.du == nullptr && op.dw == nullptr) return;
  const int terms = plan.gradients.terms;
  capsule_gradients({shape, op.detach, op.u, op.weight, totals + (last - terms) * plane,
                     ds + (last + 1 - terms) * plane, ds, op.du, op.dw, aligned},
                    plan.gradients, op.stream);
}

}  // namespace fastcnn::cuda
