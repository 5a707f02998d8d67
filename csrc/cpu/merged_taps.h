// A convolution of few input channels on AMX without patches. A kernel row's taps are one run of a line, and
// tiles load their rows, which overlap, from the line itself: one step of the reduction per 32 elements of a
// run. What a step reads beyond its run is multiplied by zeros.
#pragma once

#include "cpu/conv_stripes.h"
#include "cpu/patch_rows.h"
#include "cpu/product_forward.h"

namespace fastcnn {
namespace {

#if FASTCNN_ISA_LEVEL >= 4
// Elements of a kernel row in the reduction.
inline int64_t merged_taps_k(const Conv2dShape& s) {
  return round_up(s.kernel_w * s.channels, 2 * kTileWords);
}

// Packed weights are laid out by this, and know neither stride nor dilation: it must not depend on them.
// Patches have fewer steps, of 23 ns per pair of panels and 32 pixels, where a run fills little of its steps;
// copying them takes 32 x 1.6 ns per kernel row.
inline bool merges_taps(const Conv2dShape& s) {
  if (s.dtype != kBfloat16 || !takes_patches(s)) return false;
  const int64_t steps = s.kernel_h * merged_taps_k(s),
                dense = round_up(s.taps() * s.channels, 2 * kTileWords);
  return (steps - dense) / (2 * kTileWords) * ceil_div(s.n, 2 * kLanes) <= 2 * s.kernel_h;
}

// Whether no element is infinite or NaN: times zero those would not be zero.
inline bool all_finite(const bf16* p, int64_t count) {
  const W exponent = words_of(0x7f80);
  __mmask32 found = 0;
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    const W w = load_words(p + i, int(count - i < 2 * kLanes ? count - i : 2 * kLanes));
    found |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(w, exponent), exponent);
  }
  return found == 0;
}

// Lines are cheap to fill twice, and a single image of 32 x 32 should be more than one unit.
constexpr int64_t kMergedUnitPixels = kUnitPixels / 2;

class ForwardByMergedTaps {
 public:
  explicit ForwardByMergedTaps(const Conv2dForward& p)
      : p_(p),
        s_(p.shape),
        stripe_(forward_stripe(s_)),
        columns_(stripe_.source_columns(s_.out_w)),
        line_floats_(round_up(columns_ * s_.channels + 2 * kTileWords, 2 * kTileWords) / 2),
        words_(merged_taps_k(s_) / 2),
        units_(LineUnits(stripe_, line_floats_ * 4, kStripeBytes, 0, -1, kMergedUnitPixels).shared()),
        b_(p.packed_weight, s_.kernel_h * words_ * 2),
        offsets_(size_t(s_.kernel_h)) {
    for (int64_t kh = 0; kh < s_.kernel_h; ++kh) offsets_[size_t(kh)] = kh * s_.dilation_h * line_floats_;
  }

  void run() {
    for_units(
        units_.count, [&](int64_t unit) { return units_.lines(unit) * s_.out_w; }, s_.n, p_.epilogue,
        [&](int64_t unit, int64_t first_panel, int64_t last_panel, const StatisticsUnit* sums) {
          const int64_t begin = units_.first(unit);
          const StoreSink<bf16> sink(p_.epilogue, s_.n, begin * s_.out_w, sums, true);
          stripe_.for_images(begin, units_.first(unit + 1), [&](int64_t line, int64_t count) {
            multiply(line, count, (line - begin) * s_.out_w, Panels{first_panel, last_panel}, sink);
          });
        });
  }

 private:
  struct Panels {
    int64_t first, last;
  };

  // Output lines of one image; the first result is the sink's `row`.
  void multiply(int64_t line, int64_t count, int64_t row, const Panels& panels,
                const StoreSink<bf16>& sink) const {
    const int64_t slots = stripe_.source_lines(count), elements = slots * line_floats_ * 2;
    // A tile may read up to 31 rows past the last pixel.
    const int64_t pixel = s_.stride_w * s_.channels, beyond = kAmxBlock * pixel + 2 * kTileWords;
    float* memory = thread_scratch(size_t(slots * line_floats_ + beyond));
    for (int64_t i = 0; i < slots; ++i)
      fill_line(line / s_.out_h, line % s_.out_h * s_.stride_h - s_.pad_h + i,
                reinterpret_cast<bf16*>(memory + i * line_floats_));
    const ImageLines lines{memory, s_.stride_h * line_floats_, count, s_.out_w, row};
    if (s_.dilation_w == 1 && all_finite(reinterpret_cast<const bf16*>(memory), elements))
      multiply_panels(lines, pixel * 2, {offsets_.data(), s_.kernel_h, words_}, panels, sink);
    else
      multiply_patches(lines, pixel, panels, sink);
  }

  void fill_line(int64_t image, int64_t h, bf16* out) const {
    clear_run(out + columns_ * s_.channels, line_floats_ * 2 - columns_ * s_.channels);
    fill_padded_line(s_, p_.x, p_.prologue, image, h, -int64_t(s_.pad_w), columns_, out);
  }

  // The same sums without what lies beyond a run: patches with every kernel row's at a step of its own.
  void multiply_patches(const ImageLines& lines, int64_t pixel, const Panels& panels,
                        const StoreSink<bf16>& sink) const {
    const int64_t words = s_.kernel_h * words_, pitch = odd_lines(words), only_tap = 0;
    AlignedBuffer<float> patches(size_t((lines.count * lines.pixels + kAmxBlock) * pitch));
    if (s_.dilation_w > 1)  // what runs of single taps leave of a step
      std::memset(patches.data(), 0, size_t(lines.count * lines.pixels * pitch) * 4);
    const PatchRuns runs(s_, s_.dilation_h * line_floats_ * 2, words_ * 2);
    for (int64_t i = 0; i < lines.count; ++i)
      copy_patches(reinterpret_cast<const bf16*>(lines.first + i * lines.step), pixel, runs, lines.pixels,
                   reinterpret_cast<bf16*>(patches.data() + i * lines.pixels * pitch), pitch * 2, words * 2);
    multiply_panels({patches.data(), lines.pixels * pitch, lines.count, lines.pixels, lines.row}, pitch * 4,
                    {&only_tap, 1, words}, panels, sink);
  }

  void multiply_panels(const ImageLines& lines, int64_t row_bytes, const Taps& taps, const Panels& panels,
                       const StoreSink<bf16>& sink) const {
    for (int64_t panel = panels.first; panel < panels.last; panel += 2)
      amx_multiply_lines(lines, row_bytes, taps, b_, panel, panels.last - panel < 2 ? 1 : 2, sink);
  }

  const Conv2dForward& p_;
  const Conv2dShape& s_;
  const StripeShape stripe_;
  const int64_t columns_, line_floats_, words_;
  const LineUnits units_;
  const PackedView<PairWords> b_;
  AlignedBuffer<int64_t> offsets_;  // in words
};
#else
inline bool merges_taps(const Conv2dShape&) { return false; }
#endif

}  // namespace
}  // namespace fastcnn
