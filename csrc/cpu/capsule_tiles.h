// Images in tiles of kLanes, for the passes of capsule routing.
#pragma once

#include <cstring>

#include "cpu/capsule_votes.h"
#include "cpu/squash.h"

namespace fastcnn {
namespace {

struct ImageTiles {
  int64_t batch, count;
  int64_t outputs;  // floats of a tile of output capsules

  explicit ImageTiles(const CapsuleShape& s)
      : batch(s.batch), count(ceil_div(s.batch, kLanes)), outputs(s.outputs() * kLanes) {}
  int64_t images(int64_t tile) const {
    return batch - tile * kLanes < kLanes ? batch - tile * kLanes : kLanes;
  }
};

// u [batch][in_caps * in_dim] as [tile][in_caps * in_dim][kLanes].
template <class T>
void capsules_to_lanes(const CapsuleShape& s, const T* u, float* lanes) {
  constexpr int64_t kColumns = 1024;
  const ImageTiles tiles(s);
  const int64_t columns = s.in_caps * s.in_dim, blocks = ceil_div(columns, kColumns);
  parallel_for(tiles.count * blocks, [&](int64_t unit) {
    const int64_t tile = unit / blocks, first = unit % blocks * kColumns;
    to_lanes(u + tile * kLanes * columns + first, columns, tiles.images(tile),
             columns - first < kColumns ? columns - first : kColumns,
             lanes + (tile * columns + first) * kLanes);
  });
}

// into += from
inline void add_all(const float* from, float* into, int64_t floats) {
  for (int64_t i = 0; i < floats; i += kLanes) store(into + i, add(load(into + i), load(from + i)));
}

}  // namespace
}  // namespace fastcnn
