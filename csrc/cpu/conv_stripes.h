// Where the products of a dense convolution read in their stripes.
#pragma once

#include "cpu/stripe.h"
#include "cpu/tap_product.h"

namespace fastcnn {
namespace {

// A stripe takes a third of a 1 MB L2; a panel of B and the results pass through the rest.
constexpr int64_t kStripeBytes = 352 * 1024;

// A microtile's panels of B that are longer than this many words (81 taps of 256 channels) pass through no L2
// between two lines. All lines of a stripe then take a block of taps, in L1, before the next one, and a
// stripe in L3 gives a block a hundred rows: 9 x 9 of 256 channels to 256 runs twice as fast. Where the
// panels fit, sums that leave their registers cost 3 to 20 %.
constexpr int64_t kMostPanelWords = 8192, kBlockOfTapsWords = 256, kLongStripeBytes = 1400 * 1024;
inline bool blocks_taps(const Conv2dShape& s, int64_t words) { return s.taps() * words > kMostPanelWords; }

// Few input channels make short taps: whole patches are then copied into A tiles (patch_rows.h), or on AMX
// kernel rows read as one tap each (merged_taps.h).
constexpr int64_t kPatchChannels = 8;
inline bool takes_patches(const Conv2dShape& s) { return s.channels < kPatchChannels && s.taps() > 1; }

inline StripeShape forward_stripe(const Conv2dShape& s) {
  StripeShape t;
  t.images = s.images;
  t.lines = s.out_h;
  t.columns = s.out_w;
  t.source_h = s.in_h;
  t.source_w = s.in_w;
  t.stride_h = s.stride_h;
  t.stride_w = s.stride_w;
  t.low_h = -s.pad_h;
  t.low_w = -s.pad_w;
  t.span_h = int64_t(s.kernel_h - 1) * s.dilation_h + 1;
  t.span_w = int64_t(s.kernel_w - 1) * s.dilation_w + 1;
  return t;
}

// For AMX: where an image's lines fill little more than half of the rows that its blocks compute, or a panel
// passes through no L2, the rows of all lines of a stripe are gathered into tiles, and sums leave them: 2 x 2
// pixels, or 9 x 9 of 256 channels to 256 on 6 x 6, take half the time so. 3 x 3 on 7 x 7 takes 1.5 times as
// long. (A block costs 4 for 32 rows: eight rows each.)
constexpr int64_t kFilledOf9 = 5;
inline bool gathers_rows(const Conv2dShape& s, int64_t words) {
  if (s.taps() == 1) return false;
  const StripeShape t = forward_stripe(s);
  const int64_t pitch = t.line_pitch(t.source_columns(s.out_w)) / s.stride_w;
  return s.taps() * words > kMostPanelWords ||
         s.out_h * s.out_w * 9 < lines_cost(s.out_h, s.out_w, pitch) * 8 * kFilledOf9;
}

// The data gradient's product for the input pixels (stride_h * i + h, stride_w * j + w): the taps that reach
// them, as a convolution of stride 1 over the output's gradient.
struct DgradPhase {
  int h = 0, w = 0;
  int64_t lines = 0, columns = 0;  // of the phase's pixels
  int first_h = 0, first_w = 0, step_h = 1, step_w = 1;
  int64_t taps_h = 0, taps_w = 0;

  int64_t taps() const { return taps_h * taps_w; }
};

// The taps of one axis that reach input pixels stride * i + phase: kernel positions first, first + step, ...
inline void taps_of_phase(int phase, int kernel, int stride, int pad, int dilation, int* first, int* step,
                          int64_t* count) {
  *count = 0;
  *first = *step = 0;
  for (int k = 0; k < kernel; ++k) {
    if ((phase + pad - k * dilation) % stride) continue;
    if (*count == 0) *first = k;
    if (*count == 1) *step = k - *first;
    ++*count;
  }
}

inline DgradPhase dgrad_phase(const Conv2dShape& s, int index) {
  DgradPhase p;
  p.h = index / s.stride_w;
  p.w = index % s.stride_w;
  p.lines = s.in_h > p.h ? ceil_div(s.in_h - p.h, s.stride_h) : 0;
  p.columns = s.in_w > p.w ? ceil_div(s.in_w - p.w, s.stride_w) : 0;
  taps_of_phase(p.h, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h, &p.first_h, &p.step_h, &p.taps_h);
  taps_of_phase(p.w, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w, &p.first_w, &p.step_w, &p.taps_w);
  return p;
}

// Which output pixel, from that of the phase's index on, a tap's gradient comes from.
inline int64_t dgrad_reach(int phase, int pad, int tap, int dilation, int stride) {
  return (int64_t(phase) + pad - int64_t(tap) * dilation) / stride;
}

// The stripe over the output's gradient that serves all phases.
inline StripeShape dgrad_stripe(const Conv2dShape& s) {
  StripeShape t;
  t.images = s.images;
  t.lines = ceil_div(s.in_h, s.stride_h);
  t.columns = ceil_div(s.in_w, s.stride_w);
  t.source_h = s.out_h;
  t.source_w = s.out_w;
  int64_t low_h = 0, high_h = 0, low_w = 0, high_w = 0;
  bool any_h = false, any_w = false;
  const auto include = [](int64_t at, bool* any, int64_t* low, int64_t* high) {
    *low = *any && *low < at ? *low : at;
    *high = *any && *high > at ? *high : at;
    *any = true;
  };
  for (int phase = 0; phase < s.stride_h * s.stride_w; ++phase) {
    const DgradPhase p = dgrad_phase(s, phase);
    for (int64_t i = 0; i < p.taps_h; ++i)
      include(dgrad_reach(p.h, s.pad_h, p.first_h + int(i) * p.step_h, s.dilation_h, s.stride_h), &any_h,
              &low_h, &high_h);
    for (int64_t i = 0; i < p.taps_w; ++i)
      include(dgrad_reach(p.w, s.pad_w, p.first_w + int(i) * p.step_w, s.dilation_w, s.stride_w), &any_w,
              &low_w, &high_w);
  }
  t.low_h = low_h;
  t.low_w = low_w;
  t.span_h = high_h - low_h + 1;
  t.span_w = high_w - low_w + 1;
  return t;
}

}  // namespace
}  // namespace fastcnn
