// squash of rows and its gradient: tiles of kLanes rows, turned across lanes. Bound by memory.
#include "cpu/squash.h"

#include "cpu/by_dtype.h"
#include "cpu/kernels.h"
#include "cpu/lane_tiles.h"
#include "cpu/parallel.h"

namespace fastcnn {
namespace {

constexpr int64_t kUnitElements = 16384;

template <class T>
void squash(const Squash& p) {
  const int64_t tiles = ceil_div(p.rows, kLanes), lanes = p.dim * kLanes;
  const int64_t per_unit = lanes < kUnitElements ? kUnitElements / lanes : 1;
  parallel_for(ceil_div(tiles, per_unit), [&](int64_t unit) {
    float *s = thread_scratch(size_t(2 * lanes)), *g = s + lanes;
    for (int64_t tile = unit * per_unit; tile < tiles && tile < (unit + 1) * per_unit; ++tile) {
      const int64_t row = tile * kLanes, count = p.rows - row < kLanes ? p.rows - row : kLanes;
      to_lanes(static_cast<const T*>(p.s) + row * p.dim, p.dim, count, p.dim, s);
      if (p.grad) {
        to_lanes(static_cast<const T*>(p.grad) + row * p.dim, p.dim, count, p.dim, g);
        squash_gradient_lanes(s, g, p.dim, s);
      } else {
        squash_lanes(s, p.dim, s);
      }
      from_lanes(s, p.dim, count, static_cast<T*>(p.out) + row * p.dim, p.dim);
    }
  });
}

void squash_of(const Squash& p) {
  by_dtype(p.dtype, &Kernels::squash, p, [&](auto t) { squash<decltype(t)>(p); });
}

}  // namespace

namespace FASTCNN_ISA {
void register_squash(Kernels& k) { k.squash = squash_of; }
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
