// Runs one case on the CPU stand-in: `driver CASE RESULT`. cpu_runner.py
// writes the case and reads the result.
//
// The case: int64 numbers (count first), then the buffers (count, then for each: bytes or -1 for a null
// pointer, offset of the operand in bytes, pixel stride, and the bytes). The result: every buffer's bytes
// after the run. Each case runs with ascending and descending threads, and the results must be the same bits.
#include <cstdio>
#include <fstream>
#include <memory>

#include "plan.h"
#include "platform.cuh"

namespace {

using namespace fastcnn::cuda;

constexpr int kPlanOnly = 10;  // added to the op: print the planned shared memory and run nothing

// A buffer of exactly its size on the heap, so that the sanitizer sees accesses beside it.
struct Buffer {
  int64_t bytes, offset, ld;
  std::unique_ptr<char[]> data;

  void* operand() const { return bytes < 0 ? nullptr : data.get() + offset; }
  float* floats() const { return static_cast<float*>(operand()); }
  View view() const { return {operand(), ld}; }
};

struct Case {
  std::vector<int64_t> numbers;
  std::vector<Buffer> buffers;
  size_t next_number = 0, next_buffer = 0;

  int64_t wide() { return numbers.at(next_number++); }
  int number() { return int(wide()); }
  const Buffer& buffer() { return buffers.at(next_buffer++); }
  ChannelAffine affine() {
    const float* scale = buffer().floats();
    const float* shift = buffer().floats();
    return {scale, shift, number()};
  }
  Filter filter() { return {buffer().operand(), number() != 0}; }
};

int64_t read_number(std::ifstream& in) {
  int64_t value;
  in.read(reinterpret_cast<char*>(&value), sizeof(value));
  return value;
}

Case read_case(const char* path) {
  std::ifstream in(path, std::ios::binary);
  in.exceptions(std::ios::failbit | std::ios::badbit);
  Case result;
  result.numbers.resize(read_number(in));
  for (int64_t& number : result.numbers) number = read_number(in);
  result.buffers.resize(read_number(in));
  for (Buffer& buffer : result.buffers) {
    buffer.bytes = read_number(in);
    buffer.offset = read_number(in);
    buffer.ld = read_number(in);
    if (buffer.bytes < 0) continue;
    buffer.data.reset(new char[buffer.bytes]);
    in.read(buffer.data.get(), buffer.bytes);
  }
  return result;
}

Geometry read_geometry(Case& c) {
  Geometry g;
  for (int* field : {&g.n, &g.h, &g.w, &g.k, &g.p, &g.q, &g.c, &g.r, &g.s, &g.stride_h, &g.stride_w, &g.pad_h,
                     &g.pad_w, &g.dil_h, &g.dil_w}) {
    *field = c.number();
  }
  return g;
}

std::vector<float> workspace(int64_t floats) { return std::vector<float>(floats, NAN); }

void run_depthwise_fwd(Case& c, const Geometry& g, int dtype, const Device& device) {
  DepthwiseFwd op{};
  op.g = g;
  op.dtype = dtype;
  op.x = c.buffer().view();
  op.weight = c.filter();
  op.in = c.affine();
  op.out = c.affine();
  op.residual = c.buffer().view();
  op.y = c.buffer().view();
  op.mean = c.buffer().floats();
  op.var = c.buffer().floats();
  const DepthwisePlan plan = plan_depthwise_fwd(g, dtype, device);
  std::vector<float> space = workspace(op.mean ? plan.workspace : 0);
  op.workspace = space.data();
  depthwise_fwd(op, plan);
}

void run_depthwise_bwd(Case& c, const Geometry& g, int dtype, const Device& device) {
  DepthwiseBwd op{};
  op.g = g;
  op.dtype = dtype;
  op.grad = c.buffer().view();
  op.y = c.buffer().view();
  op.out = c.affine();
  op.coef = c.buffer().floats();
  op.x = c.buffer().view();
  op.in = c.affine();
  op.x_mean = c.buffer().floats();
  op.weight = c.filter();
  op.dx = c.buffer().view();
  op.dw = c.buffer().floats();
  op.sums = c.buffer().floats();
  const DepthwisePlan plan = plan_depthwise_bwd(g, dtype, device);
  std::vector<float> space = workspace(plan.workspace);
  op.workspace = space.data();
  depthwise_bwd(op, plan);
}

void run_separable_fwd(Case& c, const Geometry& g, int dtype, const Device& device) {
  SeparableFwd op{};
  op.g = g;
  op.dtype = dtype;
  op.channels = c.number();
  const int m = c.number();
  op.x = c.buffer().view();
  op.weight = c.filter();
  op.pointwise = c.buffer().operand();
  op.in = c.affine();
  op.mid = c.affine();
  op.out = c.affine();
  op.residual = c.buffer().view();
  op.y = c.buffer().view();
  op.mean = c.buffer().floats();
  op.var = c.buffer().floats();
  const SeparablePlan plan = plan_separable_fwd(g, op.channels, dtype, device, m);
  std::vector<float> space = workspace(op.mean ? plan.workspace : 0);
  op.workspace = space.data();
  separable_fwd(op, plan);
}

// The mask, the activation and the bias, which both directions take.
template <class Op>
void read_dropout(Case& c, Op& op, int dtype) {
  DropoutMask& m = op.mask;
  op.dtype = dtype;
  m.rows = c.wide();
  m.channels = c.wide();
  m.rows_per_sample = c.wide();
  m.unit = c.number();
  m.threshold = uint64_t(c.wide());
  op.act = c.number();
  m.scale = *c.buffer().floats();
  m.seed = static_cast<const uint64_t*>(c.buffer().operand());
  op.bias = c.buffer().floats();
}

// In place where there is no output.
void run_dropout_fwd(Case& c, int dtype, const Device& device) {
  DropoutFwd op{};
  read_dropout(c, op, dtype);
  void* x = c.buffer().operand();
  op.x = x;
  op.residual = c.buffer().operand();
  void* out = c.buffer().operand();
  op.out = out != nullptr ? out : x;
  dropout_fwd(op, plan_dropout(op.mask, dtype, op.bias != nullptr, false, device));
}

void run_dropout_bwd(Case& c, int dtype, const Device& device) {
  DropoutBwd op{};
  read_dropout(c, op, dtype);
  op.grad = c.buffer().operand();
  op.z = c.buffer().operand();
  op.dx = c.buffer().operand();
  op.dbias = c.buffer().floats();
  const DropoutPlan plan = plan_dropout(op.mask, dtype, op.bias != nullptr, op.dbias != nullptr, device);
  std::vector<float> space = workspace(plan.workspace);
  op.workspace = space.data();
  dropout_bwd(op, plan);
}

CapsuleShape read_capsule_shape(Case& c, int dtype) {
  CapsuleShape shape{};
  shape.batch = c.wide();
  for (int* field : {&shape.in_caps, &shape.in_dim, &shape.out_caps, &shape.out_dim, &shape.iterations}) {
    *field = c.number();
  }
  shape.leaky = c.number() != 0;
  shape.dtype = dtype;
  return shape;
}

void run_capsule_fwd(Case& c, int dtype, const Device& device) {
  CapsuleFwd op{};
  op.shape = read_capsule_shape(c, dtype);
  op.u = c.buffer().operand();
  op.weight = c.buffer().floats();
  op.bias = c.buffer().floats();
  op.v = c.buffer().operand();
  op.s = c.buffer().floats();
  const CapsuleFwdPlan plan = plan_capsule_fwd(op.shape, device);
  std::vector<float> space = workspace(plan.workspace);
  op.workspace = space.data();
  capsule_fwd(op, plan);
}

void run_capsule_bwd(Case& c, int dtype, const Device& device) {
  CapsuleBwd op{};
  op.shape = read_capsule_shape(c, dtype);
  op.detach = c.number() != 0;
  op.grad = c.buffer().operand();
  op.u = c.buffer().operand();
  op.weight = c.buffer().floats();
  op.s = c.buffer().floats();
  op.du = c.buffer().operand();
  op.dw = c.buffer().floats();
  op.dbias = c.buffer().floats();
  const CapsuleBwdPlan plan = plan_capsule_bwd(op.shape, op.detach, device);
  std::vector<float> space = workspace(plan.workspace);
  op.workspace = space.data();
  capsule_bwd(op, plan);
}

// The larger of a capsule plan's kernels.
int planned_capsule_shared_bytes(Case& c, bool backward, int dtype, const Device& device) {
  const CapsuleShape shape = read_capsule_shape(c, dtype);
  if (!backward) return plan_capsule_fwd(shape, device).pass.shared_bytes;
  const CapsuleBwdPlan plan = plan_capsule_bwd(shape, c.number() != 0, device);
  return std::max(plan.pass.shared_bytes, plan.gradients.shared_bytes);
}

// Shared memory of the plan alone, for shapes that are too large to run here.
int planned_shared_bytes(Case& c, int op, const Geometry& g, int dtype, const Device& device) {
  if (op == 0) return plan_depthwise_fwd(g, dtype, device).shared_bytes;
  if (op == 1) return plan_depthwise_bwd(g, dtype, device).shared_bytes;
  return plan_separable_fwd(g, c.number(), dtype, device).shared_bytes;
}

Case run(const char* path, bool descending) {
  Case c = read_case(path);
  on_cpu::running().descending = descending;
  const int op = c.number(), dtype = c.number();
  Device device;
  device.multiprocessors = c.number();
  device.shared_bytes = c.number();
  if (op == 3 || op == 4) {
    (op == 3 ? run_dropout_fwd : run_dropout_bwd)(c, dtype, device);
    return c;
  }
  if (op == 5 || op == 6) {
    (op == 5 ? run_capsule_fwd : run_capsule_bwd)(c, dtype, device);
    return c;
  }
  if (op == kPlanOnly + 5 || op == kPlanOnly + 6) {
    const int bytes = planned_capsule_shared_bytes(c, op == kPlanOnly + 6, dtype, device);
    if (!descending) std::printf("%d\n", bytes);
    return c;
  }
  const Geometry g = read_geometry(c);
  if (op >= kPlanOnly) {
    if (!descending) std::printf("%d\n", planned_shared_bytes(c, op - kPlanOnly, g, dtype, device));
    return c;
  }
  if (op == 0) run_depthwise_fwd(c, g, dtype, device);
  if (op == 1) run_depthwise_bwd(c, g, dtype, device);
  if (op == 2) run_separable_fwd(c, g, dtype, device);
  return c;
}

}  // namespace

int main(int, char** argv) {
  try {
    const Case up = run(argv[1], false), down = run(argv[1], true);
    std::ofstream out(argv[2], std::ios::binary);
    for (size_t i = 0; i < up.buffers.size(); ++i) {
      const Buffer &a = up.buffers[i], &b = down.buffers[i];
      if (a.bytes < 0) continue;
      if (std::memcmp(a.data.get(), b.data.get(), a.bytes) != 0) {
        std::fprintf(stderr, "buffer %zu depends on the order of threads\n", i);
        return 1;
      }
      out.write(a.data.get(), a.bytes);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
