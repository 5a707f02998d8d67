// Gathers a convolution's input patches: one row of the implicit matrix per output pixel, no im2col buffer in
// memory.
#pragma once

#include "cpu/prologue.h"
#include "ops/conv2d.h"

namespace fastcnn {
namespace {

// A copy of `count` elements by whole vectors, zeros after them; what follows overwrites those.
template <class T>
inline void copy_run(T* out, const T* in, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) copy_vector(out + i, in + i);
  if (i < count) copy_vector(out + i, in + i, int(count - i));
}

template <class T>
inline void clear_run(T* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, zero());
}

// Patches of consecutive output pixels, as [kernel_h][kernel_w][channels]; padding is zero after the
// prologue. A patch is written by whole vectors: up to kLanes elements past round_up(reduction, kLanes).
template <class T>
class PatchRows {
 public:
  PatchRows(const Conv2dShape& s, const Activations& x, const ScaleShiftAct& prologue, int64_t pixel)
      : s_(s),
        x_(x),
        prologue_(prologue),
        plain_(prologue.is_identity()),
        // Neighbouring taps of a dense, undilated input are one run of memory: three channels of a stem make
        // nine elements.
        runs_(plain_ && x.ld == s.channels && s.dilation_w == 1),
        span_(s.kernel_w * s.channels),
        q_(pixel % s.out_w),
        p_(pixel / s.out_w % s.out_h),
        image_(pixel / s.out_w / s.out_h) {}

  // Writes the patch of the pixel that is next in turn.
  void next(T* row) {
    const int64_t h0 = p_ * s_.stride_h - s_.pad_h, w0 = q_ * s_.stride_w - s_.pad_w;
    const bool inside = runs_ && w0 >= 0 && w0 + s_.kernel_w <= s_.in_w;
    for (int kh = 0; kh < s_.kernel_h; ++kh) {
      const int64_t h = h0 + int64_t(kh) * s_.dilation_h;
      T* out = row + kh * span_;
      if (h < 0 || h >= s_.in_h) {
        clear_run(out, span_);
        continue;
      }
      const T* line = static_cast<const T*>(x_.data) + (image_ * s_.in_h + h) * s_.in_w * x_.ld;
      if (inside)
        copy_run(out, line + w0 * x_.ld, span_);
      else
        taps(line, w0, out);
    }
    const int64_t k = s_.taps() * s_.channels;
    clear_run(row + k, round_up(k, kLanes) - k);
    advance();
  }

 private:
  // One kernel row of a patch, tap by tap.
  void taps(const T* line, int64_t w0, T* out) const {
    for (int kw = 0; kw < s_.kernel_w; ++kw, out += s_.channels) {
      const int64_t w = w0 + int64_t(kw) * s_.dilation_w;
      if (w < 0 || w >= s_.in_w) {
        clear_run(out, s_.channels);
        continue;
      }
      const T* in = line + w * x_.ld;
      if (plain_) {
        copy_run(out, in, s_.channels);
      } else {
        for (int64_t c = 0; c < s_.channels; c += kLanes)
          store(out + c, apply(prologue_, load_upto(in + c, s_.channels - c), c, s_.channels - c));
      }
    }
  }

  void advance() {
    if (++q_ < s_.out_w) return;
    q_ = 0;
    if (++p_ < s_.out_h) return;
    p_ = 0;
    ++image_;
  }

  const Conv2dShape& s_;
  const Activations& x_;
  const ScaleShiftAct& prologue_;
  const bool plain_, runs_;
  const int64_t span_;
  int64_t q_, p_, image_;
};

// Elements of a buffer that holds one patch.
inline int64_t patch_elements(const Conv2dShape& s) {
  return round_up(s.taps() * s.channels, kLanes) + 2 * kLanes;
}

}  // namespace
}  // namespace fastcnn
