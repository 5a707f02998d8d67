#include <algorithm>
#include <stdexcept>
#include <string>

#include "plan.h"

namespace fastcnn::cuda {
namespace {

constexpr int kMostColumns = 512;  // a thread each
// Threads of a block, and of a multiprocessor, that have registers for eight images each; or else for four.
constexpr int kFewThreads = 128, kFewResident = 384, kMostResident = 512;
constexpr int kInputBytes = 32 * 1024;  // of u in a block, so that several blocks share the memory
constexpr int kStart = 2;               // what a block's first loads and last stores cost, in input capsules

[[noreturn]] void refuse(const char* what) {
  throw std::invalid_argument(std::string("capsule routing: ") + what);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int quads_of(const CapsuleShape& s) { return int(ceil_div(s.out_dim, 4)); }

void check(const CapsuleShape& s) {
  if (int64_t(s.out_caps) * quads_of(s) > kMostColumns) {
    refuse("more than 2048 outputs, with out_dim rounded up to a multiple of 4");
  }
}

// Chunks of input capsules for so many groups of images and kinds of agreements; false where no shared memory
// is enough.
bool fit_pass(const CapsuleShape& s, int kinds, const Device& device, CapsulePassPlan& plan) {
  plan.tiles = int(ceil_div(s.batch, int64_t(plan.groups) * plan.images));
  plan.threads = int(round_up(int64_t(plan.columns) * plan.groups, 32));
  const int64_t weights = int64_t(kCapsuleStages) * kCapsuleRows * plan.columns * 16;
  const int64_t fixed = weights + int64_t(kinds) * plan.columns * plan.pitch() * 4;
  const int64_t each = int64_t(s.in_dim) * plan.pitch() * 4;
  const int64_t room = device.shared_bytes - fixed;
  if (room < each) return false;
  const int64_t resident = std::max(1, (plan.images == 8 ? kFewResident : kMostResident) / plan.threads);
  const int64_t wanted =
      std::max<int64_t>(1, device.multiprocessors * resident / std::max<int64_t>(1, plan.tiles));
  plan.chunk = int(ceil_div(s.in_caps, std::min<int64_t>(s.in_caps, wanted)));
  plan.chunks = int(ceil_div(s.in_caps, plan.chunk));
  plan.staged = int(std::clamp<int64_t>(std::min<int64_t>(room, kInputBytes) / each, 1, plan.chunk));
  plan.shared_bytes = int(fixed + plan.staged * each);
  return true;
}

// The groups of images per block that keep the busiest multiprocessor busy for the shortest time.
CapsulePassPlan plan_pass(const CapsuleShape& s, int kinds, const Device& device) {
  CapsulePassPlan best{};
  double best_cost = 0;
  CapsulePassPlan plan{};
  plan.quads = quads_of(s);
  plan.columns = s.out_caps * plan.quads;
  plan.images = plan.columns <= kFewThreads && s.batch > 4 ? 8 : 4;
  const int most = plan.images == 8 ? kFewThreads : kMostColumns;
  const int64_t groups = std::max<int64_t>(1, ceil_div(s.batch, plan.images));
  for (plan.groups = 1; plan.groups <= groups && plan.groups * plan.columns <= most; ++plan.groups) {
    if (!fit_pass(s, kinds, device, plan)) break;
    const double busiest = double(ceil_div(int64_t(plan.tiles) * plan.chunks, device.multiprocessors));
    const double cost = busiest * plan.threads * (plan.chunk + kStart);
    if (best.groups != 0 && cost >= best_cost) continue;
    best = plan;
    best_cost = cost;
  }
  if (best.groups == 0) refuse("no tile of this shape fits in shared memory");
  return best;
}

int64_t gradient_bytes(const CapsuleGradientPlan& p) {
  const int64_t lanes = p.lanes();
  const int64_t image = int64_t(p.planes()) * p.stride * 4 + int64_t(p.capsules) * p.depth +
                        2 * p.terms * lanes + lanes * p.depth / kCapsuleLanes;
  return image * p.images * 4;
}

// Input capsules per block and images per tile, as plan_pass; blocks of few input capsules read the images'
// outputs often, tiles of few images meet at barriers often.
CapsuleGradientPlan plan_gradients(const CapsuleShape& s, bool detach, const Device& device) {
  CapsuleGradientPlan best{};
  double best_cost = 0;
  CapsuleGradientPlan plan{};
  plan.depth = s.in_dim <= 8 ? 8 : 16;
  plan.stride = int(round_up(int64_t(s.out_caps) * quads_of(s), kCapsuleLanes));
  plan.terms = detach ? std::min(s.iterations - 1, 1) : s.iterations - 1;
  plan.uniform = !detach || s.iterations == 1;
  const int most = plan.depth == 8 ? 512 : 256;
  if (s.in_dim > 16) refuse("backward takes an in_dim of at most 16");
  if (plan.stride > most) refuse("backward has no threads for so many outputs of so large an in_dim");
  for (plan.capsules = 1; plan.capsules * plan.stride <= most; ++plan.capsules) {
    if (plan.capsules > s.in_caps) break;
    plan.threads = int(round_up(plan.lanes(), 32));
    const double busiest = double(ceil_div(ceil_div(s.in_caps, plan.capsules), device.multiprocessors));
    for (plan.images = 16; plan.images >= 1; plan.images /= 2) {
      if (plan.images / 2 >= std::max<int64_t>(s.batch, 1)) continue;
      if (gradient_bytes(plan) > device.shared_bytes) continue;
      plan.shared_bytes = int(gradient_bytes(plan));
      const double cost = busiest * plan.threads * (1 + 1.0 / plan.capsules + 1.0 / plan.images);
      if (best.capsules != 0 && cost >= best_cost) continue;
      best = plan;
      best_cost = cost;
    }
  }
  if (best.capsules == 0) refuse("no tile of this shape and so many iterations fits in shared memory");
  return best;
}

}  // namespace

CapsuleFwdPlan plan_capsule_fwd(const CapsuleShape& shape, const Device& device) {
  check(shape);
  CapsuleFwdPlan plan{};
  plan.pass = plan_pass(shape, 1, device);
  plan.workspace = shape.batch * shape.outputs() * (plan.pass.chunks + (shape.iterations > 1 ? 1 : 0));
  return plan;
}

CapsuleBwdPlan plan_capsule_bwd(const CapsuleShape& shape, bool detach, const Device& device) {
  check(shape);
  CapsuleBwdPlan plan{};
  plan.pass = plan_pass(shape, 2, device);
  plan.gradients = plan_gradients(shape, detach, device);
  const bool has_passes = !detach && shape.iterations > 1;
  plan.workspace =
      shape.batch * shape.outputs() * (2 * shape.iterations + (has_passes ? plan.pass.chunks : 0));
  return plan;
}

}  // namespace fastcnn::cuda
