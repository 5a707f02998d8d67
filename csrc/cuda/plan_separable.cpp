#include <algorithm>
#include <stdexcept>

#include "plan.h"

namespace fastcnn::cuda {
namespace {

// Per cycle and multiprocessor of an H100: bytes from DRAM and from L2, multiply-adds of mma.sync and of FMA.
constexpr double kDramBytes = 13, kL2Bytes = 40, kTensorMacs = 1300, kFloatMacs = 100;

int ceil_div(int a, int b) { return (a + b - 1) / b; }
int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Sizes that follow from m, n, tile_h and tile_w. The stencil makes
// strips of 4, so the window is that much wider.
void fill(SeparablePlan& plan, const Geometry& g, int size, const Device& device) {
  constexpr int kStrip = 4;
  plan.k_padded = round_up(g.c, kProductDepth);
  plan.cb = std::min(plan.k_padded, 128 / size);
  plan.strips_w = ceil_div(plan.tile_w, kStrip);
  plan.rows = (plan.tile_h - 1) * g.stride_h + (g.r - 1) * g.dil_h + 1;
  plan.cols = ((plan.strips_w * kStrip - 1) * g.stride_w + (g.s - 1) * g.dil_w + 1) | 1;
  plan.tiles_h = ceil_div(g.p, plan.tile_h);
  plan.tiles_w = ceil_div(g.q, plan.tile_w);
  plan.tiles = g.n * plan.tiles_h * plan.tiles_w;
  const int64_t a = int64_t(plan.m) * (plan.k_padded * size + 16);
  const int64_t window = int64_t(plan.rows) * plan.cols * plan.cb * size;
  const int64_t table = int64_t(g.r * g.s + kInputConstants) * plan.cb * 4;
  const int64_t ring = int64_t(kProductStages) * plan.n * (kProductDepth * size + 16);
  plan.shared_bytes = int(std::min<int64_t>(a + window + 2 * table + ring, INT32_MAX));
  if (plan.shared_bytes > device.shared_bytes) return;
  plan.a_bytes = int(a);
  plan.window_bytes = int(window);
  plan.table_bytes = int(table);
}

// Blocks that share a multiprocessor: by shared memory, and by registers
// (about 128 per thread, more at m = 128).
int resident_blocks(const SeparablePlan& plan, const Device& device) {
  return std::max(1,
                  std::min(plan.m == 128 ? 1 : 2, (device.shared_bytes + 1024) / (plan.shared_bytes + 1024)));
}

// Cycles until the last tile is done. Two resident blocks overlap one's loads with the other's product.
double cycles(const SeparablePlan& plan, const Geometry& g, int channels, int size, const Device& device) {
  const double n_padded = round_up(channels, plan.n);
  const double traffic =
      (double(plan.rows) * plan.cols * g.c + double(plan.tile_h) * plan.tile_w * channels) * size /
      kDramBytes;
  const double macs = double(plan.m) * plan.k_padded * n_padded / (size == 4 ? kFloatMacs : kTensorMacs);
  const double product = std::max(macs, n_padded * plan.k_padded * size / kL2Bytes);
  const int resident = resident_blocks(plan, device);
  const double tile =
      resident > 1 ? std::max(traffic, product) + 0.3 * std::min(traffic, product) : traffic + product;
  return double(ceil_div(plan.tiles, device.multiprocessors * resident)) * resident * tile;
}

struct Tile {
  int m, n;
};

// The products that separable_fwd_*.cu instantiate; 128 x 128 for the 3 x 3, stride-1 kernel only.
int instantiated(const Geometry& g, int channels, int size, Tile (&tiles)[3]) {
  if (size == 4) {
    tiles[0] = {64, 64};
    tiles[1] = {32, 64};
    return 2;
  }
  int count = 0;
  if (channels > 64 && unrolled_kernel(g) == 3 && g.stride_h == 1) tiles[count++] = {128, 128};
  tiles[count++] = {64, channels > 64 ? 128 : 64};
  tiles[count++] = {32, 128};
  return count;
}

}  // namespace

SeparablePlan plan_separable_fwd(const Geometry& g, int channels, int dtype, const Device& device, int m) {
  const int size = element_size(dtype);
  Tile tiles[3];
  SeparablePlan best{};
  double best_cycles = 0;
  for (int i = 0, count = instantiated(g, channels, size, tiles); i < count; ++i) {
    if (m != 0 && tiles[i].m != m) continue;
    for (int w = 1; w <= std::min(tiles[i].m, g.q); ++w) {
      SeparablePlan plan{};
      plan.m = tiles[i].m;
      plan.n = tiles[i].n;
      plan.tile_w = w;
      plan.tile_h = std::min(plan.m / w, g.p);
      fill(plan, g, size, device);
      if (plan.shared_bytes > device.shared_bytes) continue;
      const double c = cycles(plan, g, channels, size, device);
      if (best.m == 0 || c < best_cycles) {
        best = plan;
        best_cycles = c;
      }
    }
  }
  if (best.m == 0) {
    throw std::invalid_argument("separable convolution: no tile of this shape fits in shared memory");
  }
  best.blocks = std::min(best.tiles, device.multiprocessors * resident_blocks(best, device));
  best.workspace = int64_t(best.blocks) * (best.m / 32) * 3 * channels;
  return best;
}

}  // namespace fastcnn::cuda
