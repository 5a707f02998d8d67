#include <algorithm>
#include <numeric>

#include "plan.h"

namespace fastcnn::cuda {
namespace {

constexpr int64_t kBlocks = 4;          // per multiprocessor: what 64 registers per thread leave room for
constexpr int64_t kVectors = 32;        // of a line, per block: a warp reads 512 bytes at once
constexpr int64_t kPasses = 4;          // over a block's lines: what its start is spread over
constexpr int64_t kMostSlices = 65535;  // of a grid

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where nothing depends on the columns, lines that suit the blocks.
void fill_lines(DropoutPlan& plan, const DropoutMask& m, int64_t vector, bool columns_matter) {
  plan.folds = columns_matter ? int(std::min(m.rows, vector / std::gcd(m.channels, vector))) : 1;
  plan.width = columns_matter ? plan.folds * m.channels : kVectors * vector;
  plan.elements = m.rows * m.channels;
}

}  // namespace

DropoutPlan plan_dropout(const DropoutMask& m, int dtype, bool with_bias, bool with_sums,
                         const Device& device) {
  DropoutPlan plan{};
  if (m.rows == 0 || m.channels == 0) return plan;
  const int64_t vector = 16 / element_size(dtype);
  fill_lines(plan, m, vector, with_bias || with_sums || m.unit != kDropElement);
  const int64_t lines = ceil_div(plan.elements, plan.width);
  const int64_t vectors = ceil_div(plan.width, vector);
  // As many threads side by side as there are too few lines to have them one above the other.
  plan.tiles = int(ceil_div(vectors, std::max(kVectors, kThreads / lines)));
  plan.vectors = int(ceil_div(vectors, plan.tiles));
  plan.stripes = kThreads / plan.vectors;
  const int64_t passes = ceil_div(lines, plan.stripes);
  // Sums are merged over the slices, so there are no more of them than keep the GPU busy.
  const int64_t busy = ceil_div(device.multiprocessors * kBlocks, plan.tiles);
  const int64_t wanted = with_sums ? busy : std::max(busy, ceil_div(passes, kPasses));
  const int64_t each = ceil_div(passes, std::min({wanted, passes, kMostSlices}));
  plan.chunk = each * plan.stripes;
  plan.slices = int(ceil_div(passes, each));
  plan.workspace = with_sums ? plan.slices * plan.width : 0;
  return plan;
}

}  // namespace fastcnn::cuda
