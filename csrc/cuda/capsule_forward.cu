// Capsule votes and routing, forward: for each iteration a pass over the input capsules (capsule_pass.cuh),
// then the output capsules of every image, on 0.1 MB of results and as many shares as there are chunks.
#include "capsule_launch.cuh"
#include "capsule_outputs.cuh"

namespace fastcnn::cuda {
namespace {

struct CapsuleFinish {
  CapsuleShape shape;
  int quads, chunks;
  const float* partials;
  float scale;  // of the sums
  const float* bias;
  float* s;  // of this iteration
  float* totals;
  bool is_first, is_last;
  void* v;
  bool aligned;
};

template <class T>
__global__ void __launch_bounds__(kCapsuleOutputThreads) capsule_finish_kernel(const CapsuleFinish op) {
  const int64_t image = blockIdx.x;
  const OutputThread thread(op.shape, op.quads, op.aligned);
  Vector<float> s = thread.sum_chunks(op.partials, op.chunks, op.shape.batch, image);
  Vector<float> bias;
  bias.words = make_uint4(0, 0, 0, 0);
  if (op.bias != nullptr) bias = load_vector(op.bias + thread.at, thread.count, op.aligned);
#pragma unroll
  for (int e = 0; e < 4; ++e) s.at[e] = fmaf(s.at[e], op.scale, bias.at[e]);
  thread.store(op.s, image, s);
  Vector<float> v = squashed(thread, s);
  if (op.is_last) {
    T* to = static_cast<T*>(op.v) + image * thread.outputs + thread.at;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e < thread.count) to[e] = from_float<T>(v.at[e]);
    }
    return;
  }
  if (!op.is_first) OutputThread::add(v, thread.load(op.totals, image));
  thread.store(op.totals, image, v);
}

}  // namespace

void capsule_fwd(const CapsuleFwd& op, const CapsuleFwdPlan& plan) {
  const CapsuleShape& shape = op.shape;
  if (shape.batch == 0) return;
  const int64_t plane = shape.batch * shape.outputs();
  float *totals = op.workspace, *partials = totals + (shape.iterations > 1 ? plane : 0);
  const bool aligned = quads_are_aligned(shape, op.weight, op.bias, op.s, op.workspace);
  const int threads = output_threads(plan.pass, true);
  for (int t = 0; t < shape.iterations; ++t) {
    const CapsulePass pass = {shape, op.u, op.weight, totals, nullptr, partials, aligned};
    if (t == 0) launch_pass<kUniform>("capsule_routing_fwd", pass, plan.pass, op.stream);
    if (t != 0) launch_pass<kCoupling>("capsule_routing_fwd", pass, plan.pass, op.stream);
    const CapsuleFinish finish = {shape,
                                  plan.pass.quads,
                                  plan.pass.chunks,
                                  partials,
                                  t == 0 ? uniform_coupling(shape.out_caps, shape.leaky) : 1.f,
                                  op.bias,
                                  op.s + t * plane,
                                  totals,
                                  t == 0,
                                  t + 1 == shape.iterations,
                                  op.v,
                                  aligned};
    with_dtype(shape.dtype, [&](auto type) {
      launch("capsule_routing_fwd", capsule_finish_kernel<typename decltype(type)::type>,
             dim3(unsigned(shape.batch)), threads, output_shared_bytes(plan.pass, threads), op.stream,
             finish);
    });
  }
}

}  // namespace fastcnn::cuda
