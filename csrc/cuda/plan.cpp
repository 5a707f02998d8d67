#include "plan.h"

#include <algorithm>
#include <functional>
#include <stdexcept>

namespace fastcnn::cuda {
namespace {

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Positions in a row and in a column, and how a tile of them costs shared memory.
struct Tileable {
  int n, height, width;                // positions
  int channels, vector, max_channels;  // of the tile's tensor; per 16 bytes; at most per block
  int strip;                           // positions per thread along W
  std::function<int(int)> rows, cols;  // window of a tile
  std::function<int64_t(int, int, int, int, int)> shared;  // bytes: rows, cols, tile_h, tile_w, cb
};

// Channels per block: at most `limit`, as even as whole vectors allow
// (144 of 64 at most: 3 x 48, not 64 + 64 + 16).
int balanced_channels(int channels, int vector, int limit) {
  const int vectors = ceil_div(channels, vector), per_tile = std::max(1, limit / vector);
  return ceil_div(vectors, ceil_div(vectors, per_tile)) * vector;
}

// Cost of a tiling per useful position: halo'd reads, the positions that
// hang over the edge, a barrier's worth per tile; more where shared memory
// keeps too few blocks on a multiprocessor, or too few blocks keep it idle.
double cost(const DepthwisePlan& plan, const Tileable& t, const Device& device) {
  const double per_tile = double(plan.rows) * plan.cols + 1.5 * plan.tile_h * plan.tile_w + 24;
  double total = per_tile * plan.tiles_h * plan.tiles_w / (double(t.height) * t.width);
  const double resident = std::min(6.0, double(device.shared_bytes) / plan.shared_bytes);
  total *= 1 + 0.6 / resident;
  const double blocks = double(plan.tiles) * plan.channel_tiles;
  return total * std::max(1.0, 2.0 * device.multiprocessors / blocks);
}

DepthwisePlan choose_tile(const Tileable& t, const Device& device) {
  DepthwisePlan best{};
  double best_cost = 0;
  for (int limit = t.max_channels; limit >= t.vector && best.cb == 0; limit /= 2) {
    DepthwisePlan plan{};
    plan.cb = balanced_channels(t.channels, t.vector, limit);
    plan.channel_tiles = ceil_div(t.channels, plan.cb);
    for (int strips = 1; strips <= 8; ++strips) {
      plan.tile_w = strips * t.strip;
      if (strips > 1 && plan.tile_w - t.strip >= t.width) break;
      for (int h : {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 28}) {
        if (h > t.height) break;
        plan.tile_h = h;
        plan.rows = t.rows(h);
        plan.cols = t.cols(plan.tile_w);
        const int64_t shared = t.shared(plan.rows, plan.cols, h, plan.tile_w, plan.cb);
        if (shared > device.shared_bytes) continue;
        plan.shared_bytes = int(shared);
        plan.tiles_h = ceil_div(t.height, h);
        plan.tiles_w = ceil_div(t.width, plan.tile_w);
        plan.tiles = plan.tiles_h * plan.tiles_w * t.n;
        const double c = cost(plan, t, device);
        if (best.cb == 0 || c < best_cost) {
          best = plan;
          best_cost = c;
        }
      }
    }
  }
  if (best.cb == 0)
    throw std::invalid_argument("depthwise convolution: no tile of this shape fits in shared memory");
  const int resident = std::max(1, std::min(8, device.shared_bytes / best.shared_bytes));
  best.slices = std::min(
      {best.tiles, std::max(1, ceil_div(device.multiprocessors * resident, best.channel_tiles)), 65535});
  return best;
}

// Room for the block reductions, which reuse the window: one row of
// taps, or moments, per thread and channel pair.
int64_t with_reduction(int64_t bytes, int values) {
  return std::max<int64_t>(bytes, kThreads * 2 * values * 4);
}

// An odd number of columns: threads that work on different rows of
// narrow channel tiles then hit different banks.
int odd(int cols) { return cols | 1; }

}  // namespace

int unrolled_kernel(const Geometry& g) {
  const bool square = g.r == g.s && g.stride_h == g.stride_w && g.dil_h == 1 && g.dil_w == 1 && g.c == g.k;
  return square && g.stride_h <= 2 && (g.r == 3 || g.r == 5 || g.r == 7) ? g.r : 0;
}

// 7 divides 112, 56, 28, 14 and 7.
int forward_strip(const Geometry& g) { return unrolled_kernel(g) ? 7 : 4; }

// Fewer where a position is 2 x 2 pixels and where 49 taps fill the registers.
int backward_strip(const Geometry& g) {
  const int kernel = unrolled_kernel(g);
  if (kernel == 0) return 4;
  if (g.stride_h == 2) return 2;
  return kernel == 7 ? 4 : 7;
}

DepthwisePlan plan_depthwise_fwd(const Geometry& g, int dtype, const Device& device) {
  const int size = element_size(dtype), taps = g.r * g.s;
  Tileable t{g.n, g.p, g.q, g.c, 16 / size, 128 / size, forward_strip(g), {}, {}, {}};
  t.rows = [&](int h) { return (h - 1) * g.stride_h + (g.r - 1) * g.dil_h + 1; };
  t.cols = [&](int w) { return odd((w - 1) * g.stride_w + (g.s - 1) * g.dil_w + 1); };
  t.shared = [&](int rows, int cols, int, int, int cb) {
    return with_reduction(int64_t(rows) * cols * cb * size + int64_t(taps + kInputConstants) * cb * 4, 3);
  };
  DepthwisePlan plan = choose_tile(t, device);
  plan.workspace = int64_t(plan.slices) * 3 * g.c;
  return plan;
}

DepthwisePlan plan_depthwise_bwd(const Geometry& g, int dtype, const Device& device) {
  const int size = element_size(dtype), taps = g.r * g.s, kernel = unrolled_kernel(g), multiplier = g.c / g.k;
  Tileable t{g.n, g.h, g.w, g.k, 16 / size, 128 / size, backward_strip(g), {}, {}, {}};
  int origin_h = 0, origin_w = 0;
  if (kernel != 0) {
    // A position m is the stride x stride input pixels stride * m + phase - pad.
    const int stride = g.stride_h, reach = (kernel - 1) / stride;
    origin_h = g.pad_h / stride;
    origin_w = g.pad_w / stride;
    t.height = (g.h - 1 + g.pad_h) / stride - origin_h + 1;
    t.width = (g.w - 1 + g.pad_w) / stride - origin_w + 1;
    t.rows = [=](int h) { return h + reach; };
    t.cols = [=](int w) { return odd(w + reach); };
    t.shared = [=](int rows, int cols, int, int, int cb) {
      return with_reduction(int64_t(rows) * cols * cb * size, kernel) +
             int64_t(taps + kGradientConstants) * cb * 4;
    };
  } else {
    t.rows = [=](int h) { return (h - 1 + (g.r - 1) * g.dil_h) / g.stride_h + 1; };
    t.cols = [=](int w) { return (w - 1 + (g.s - 1) * g.dil_w) / g.stride_w + 1; };
    t.shared = [=](int rows, int cols, int h, int w, int cb) {
      const int64_t windows = (int64_t(rows) * cols + h * w) * cb * size, dx = int64_t(h) * w * cb * 4;
      return with_reduction(windows + dx, 2) +
             (int64_t(taps) * (1 + multiplier) + kGradientConstants) * cb * 4;
    };
  }
  DepthwisePlan plan = choose_tile(t, device);
  plan.origin_h = origin_h;
  plan.origin_w = origin_w;
  plan.workspace = int64_t(plan.slices) * (int64_t(taps) * g.c + 2 * g.k);
  return plan;
}

}  // namespace fastcnn::cuda
