// Gathers a convolution's input patches: one row of the implicit matrix per output pixel, no im2col buffer in
// memory.
#pragma once

#include "cpu/epilogue.h"
#include "ops/conv2d.h"

namespace fastcnn {
namespace {

struct PatchOrigin {
  int64_t image, h, w;
};

inline PatchOrigin patch_origin(const Conv2dShape& s, int64_t pixel) {
  const int64_t q = pixel % s.out_w, rest = pixel / s.out_w;
  return {rest / s.out_h, rest % s.out_h * s.stride_h - s.pad_h, q * s.stride_w - s.pad_w};
}

// A copy of `count` elements by whole vectors; the few past the end are overwritten by what follows them.
template <class T>
inline void copy_run(T* out, const T* in, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, load_upto(in + i, count - i));
}

template <class T>
inline void clear_run(T* out, int64_t count) {
  if (count > 0) std::memset(static_cast<void*>(out), 0, size_t(count) * sizeof(T));
}

// One patch, [kernel_h][kernel_w][tap_channels] elements and up to kLanes more; padding is zero after the
// prologue.
template <class T>
void gather_patch(const Conv2dShape& s, const Activations& x, const ScaleShiftAct& prologue, int64_t pixel,
                  T* row) {
  const PatchOrigin o = patch_origin(s, pixel);
  const bool plain = prologue.is_identity();
  // Neighbouring taps of a dense, undilated input are one run of memory: three channels of a stem make nine
  // elements.
  const bool runs = plain && x.ld == s.channels && s.tap_channels == s.channels && s.dilation_w == 1;
  for (int kh = 0; kh < s.kernel_h; ++kh) {
    const int64_t h = o.h + int64_t(kh) * s.dilation_h, span = s.kernel_w * s.tap_channels;
    T* out = row + kh * span;
    if (h < 0 || h >= s.in_h) {
      clear_run(out, span + kLanes);
      continue;
    }
    const T* line = static_cast<const T*>(x.data) + (o.image * s.in_h + h) * s.in_w * x.ld;
    if (runs && o.w >= 0 && o.w + s.kernel_w <= s.in_w) {
      copy_run(out, line + o.w * x.ld, span);
      continue;
    }
    for (int kw = 0; kw < s.kernel_w; ++kw, out += s.tap_channels) {
      const int64_t w = o.w + int64_t(kw) * s.dilation_w;
      if (w < 0 || w >= s.in_w) {
        clear_run(out, s.tap_channels + kLanes);
        continue;
      }
      const T* in = line + w * x.ld;
      if (plain) {
        copy_run(out, in, s.channels);
      } else {
        for (int64_t c = 0; c < s.channels; c += kLanes)
          store(out + c, apply(prologue, load_upto(in + c, s.channels - c), c, s.channels - c));
      }
      const int64_t written = round_up(s.channels, kLanes);
      clear_run(out + written, s.tap_channels - written);
    }
  }
  const int64_t k = s.reduction();
  clear_run(row + k, round_up(k, kLanes) - k);
}

// Elements of a buffer that holds one patch.
inline int64_t patch_elements(const Conv2dShape& s) { return round_up(s.reduction(), kLanes) + 2 * kLanes; }

}  // namespace
}  // namespace fastcnn
