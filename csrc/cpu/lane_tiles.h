// Matrices turned so that a vector holds one column of kLanes rows: what runs over a short dimension (a
// capsule's coordinates, the classes) is then a loop over vectors, for every width of vector and without sums
// across lanes.
#pragma once

#include "cpu/vec.h"

namespace fastcnn {
namespace {

// out [columns][kLanes] of rows [0, count) of `rows`, ld apart; rows beyond are zero.
template <class T>
void to_lanes(const T* rows, int64_t ld, int64_t count, int64_t columns, float* out) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int64_t n = columns - c < kLanes ? columns - c : kLanes;
    V tile[kLanes];
    for (int i = 0; i < kLanes; ++i)
      tile[i] = i >= count ? zero() : n == kLanes ? load(rows + i * ld + c) : load(rows + i * ld + c, int(n));
    transpose(tile);
    for (int64_t i = 0; i < n; ++i) store(out + (c + i) * kLanes, tile[i]);
  }
}

// The inverse.
template <class T>
void from_lanes(const float* lanes, int64_t columns, int64_t count, T* rows, int64_t ld) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int64_t n = columns - c < kLanes ? columns - c : kLanes;
    V tile[kLanes];
    for (int i = 0; i < kLanes; ++i) tile[i] = i < n ? load(lanes + (c + i) * kLanes) : zero();
    transpose(tile);
    for (int64_t i = 0; i < kLanes && i < count; ++i)
      n == kLanes ? store(rows + i * ld + c, tile[i]) : store(rows + i * ld + c, tile[i], int(n));
  }
}

}  // namespace
}  // namespace fastcnn
