// A strip of output rows of a depthwise convolution whose input rows are made on demand and kept in cache.
#pragma once

#include "cpu/depthwise_rows.h"

namespace fastcnn {
namespace {

// Output rows [first, last) of an image, in tiles of `rows_per_tile`; input rows live in a ring of fp32 rows.
class DepthwiseStrip {
 public:
  static int64_t slots(const DepthwiseShape& s, int64_t rows_per_tile) {
    return (rows_per_tile - 1) * s.stride_h + int64_t(s.kernel_h - 1) * s.dilation_h + 1;
  }
  static int64_t floats(const DepthwiseShape& s, int64_t rows_per_tile) {
    return (slots(s, rows_per_tile) + 1) * ring_width(s) * round_up(s.out_channels(), kLanes);
  }

  // weight: [tap][pitch], as pack_depthwise_weight leaves it; memory: `floats`.
  DepthwiseStrip(const DepthwiseShape& s, int64_t rows_per_tile, const float* weight, float* memory)
      : s_(s),
        pitch_(round_up(s.out_channels(), kLanes)),
        row_floats_(ring_width(s) * pitch_),
        slots_(slots(s, rows_per_tile)),
        weight_(weight),
        zeros_(memory) {
    for (int64_t i = 0; i < row_floats_; i += kLanes) store(zeros_ + i, zero());
  }

  int64_t pitch() const { return pitch_; }
  // Where input row h lies in the ring: [ring_width][pitch].
  float* row(int64_t h) const { return zeros_ + (1 + h % slots_) * row_floats_; }

  // Makes the input rows that output rows [p0, p1) read and that earlier tiles did not: make(h0, h1).
  template <class Make>
  void prepare(int64_t p0, int64_t p1, const Make& make) {
    const int64_t last = (p1 - 1) * s_.stride_h - s_.pad_h + int64_t(s_.kernel_h - 1) * s_.dilation_h;
    int64_t h0 = p0 * s_.stride_h - s_.pad_h, h1 = last + 1;
    if (h0 < made_) h0 = made_;
    if (h0 < 0) h0 = 0;
    if (h1 > s_.in_h) h1 = s_.in_h;
    if (h0 < h1) make(h0, h1);
    if (h1 > made_) made_ = h1;
  }

  // Output row p into a sink of depthwise_row_to.
  template <class Sink>
  void output_row(int64_t p, Sink& sink) const {
    const float* rows[kMostKernelRows];
    for (int r = 0; r < s_.kernel_h; ++r) {
      const int64_t h = p * s_.stride_h - s_.pad_h + int64_t(r) * s_.dilation_h;
      rows[r] = h < 0 || h >= s_.in_h ? zeros_ : row(h);
    }
    depthwise_row_to(s_, rows, pitch_, weight_, pitch_, 0, pitch_, sink);
  }

  // Zeroes the padding columns of the ring row of h.
  void clear_padding(int64_t h) const {
    float* out = row(h);
    const int64_t right = s_.pad_w + s_.in_w, width = ring_width(s_);
    for (int64_t i = 0; i < s_.pad_w * pitch_ && i < row_floats_; i += kLanes) store(out + i, zero());
    for (int64_t i = right * pitch_; i < width * pitch_; i += kLanes) store(out + i, zero());
  }

 private:
  const DepthwiseShape& s_;
  const int64_t pitch_, row_floats_, slots_;
  const float* weight_;
  float* zeros_;
  int64_t made_ = 0;
};

// A depthwise output row on its way into an A tile, with what lies between depthwise and pointwise applied.
template <class Words>
struct TileSink {
  const ScaleShiftAct& middle;
  TileWriter<Words> tile;
  int64_t first_row;
  int64_t channels;

  template <int kOutputs>
  void put(int64_t q, int64_t c, V (&acc)[kOutputs]) const {
    if (middle.scale || middle.shift) {
      const int64_t n = channels - c;
      const V scale = middle.scale ? load_upto(middle.scale + c, n) : set(1.0f);
      const V shift = middle.shift ? load_upto(middle.shift + c, n) : zero();
#pragma GCC unroll 8
      for (int b = 0; b < kOutputs; ++b) acc[b] = fmadd(acc[b], scale, shift);
    }
    activate_all(middle.act, acc);
#pragma GCC unroll 8
    for (int b = 0; b < kOutputs; ++b) tile.put(first_row + q + b, c, acc[b]);
  }
};

// How an image's output rows are shared: units of `rows` rows, walked in tiles of `per_tile`.
struct StripPlan {
  int64_t rows, per_tile, per_image;
};

// per_tile: enough pixels for the product's tile, within `ring_floats` of ring; strips: `units` in all where
// the rows suffice, as even as they can be.
inline StripPlan plan_strips(const DepthwiseShape& s, int64_t tile_pixels, int64_t ring_floats,
                             int64_t units) {
  int64_t most = tile_pixels / s.out_w;
  if (most < 1) most = 1;
  if (most > s.out_h) most = s.out_h;
  while (most > 1 && DepthwiseStrip::floats(s, most) > ring_floats) --most;
  const int64_t wanted = ceil_div(units, s.images), tiles = ceil_div(s.out_h, most);
  const int64_t rows = ceil_div(s.out_h, wanted < tiles ? wanted : tiles);
  const int64_t per_tile = ceil_div(rows, ceil_div(rows, most));
  return {rows, per_tile, ceil_div(s.out_h, rows)};
}

}  // namespace
}  // namespace fastcnn
