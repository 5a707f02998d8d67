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
  for (int64_t i = 0; i < count; i += kCopied<T>) copy_vector(out + i, in + i, int(count - i));
}

template <class T>
inline void clear_run(T* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, zero());
}

// Columns [w, w + count) of line h of an image, side by side, prologue applied and zeros around the image. Up
// to a vector of zeros is written after them.
template <class T>
void fill_padded_line(const Conv2dShape& s, const Activations& x, const ScaleShiftAct& prologue,
                      int64_t image, int64_t h, int64_t w, int64_t count, T* out) {
  const int64_t first = w < 0 ? 0 : w, end = w + count < s.in_w ? w + count : s.in_w;
  const bool inside = h >= 0 && h < s.in_h && first < end;
  if (!inside || first > w || end < w + count) clear_run(out, count * s.channels);
  if (!inside) return;
  const T* in = static_cast<const T*>(x.data) + ((image * s.in_h + h) * s.in_w + first) * x.ld;
  out += (first - w) * s.channels;
  if (x.ld == s.channels && prologue.is_identity()) return copy_run(out, in, (end - first) * s.channels);
  for (int64_t i = first; i < end; ++i, in += x.ld, out += s.channels)
    for (int64_t c = 0; c < s.channels; c += kLanes)
      store(out + c, apply(prologue, load_upto(in + c, s.channels - c), c, s.channels - c));
}

// Runs of neighbouring elements that a patch is copied by: one per kernel row, or per tap where there are
// gaps.
class PatchRuns {
 public:
  // Kernel rows are read `line` and written `row` elements apart.
  PatchRuns(const Conv2dShape& s, int64_t line, int64_t row)
      : count(s.dilation_w > 1 ? s.taps() : s.kernel_h),
        length(s.kernel_w * s.channels * s.kernel_h / count),
        offsets_(size_t(2 * count)) {
    const int64_t per_row = count / s.kernel_h;
    for (int64_t i = 0; i < count; ++i) {
      offsets_[size_t(i)] = i / per_row * line + i % per_row * s.dilation_w * s.channels;
      offsets_[size_t(count + i)] = i / per_row * row + i % per_row * s.channels;
    }
  }

  const int64_t count, length;
  const int64_t* from() const { return offsets_.data(); }
  const int64_t* to() const { return offsets_.data() + count; }

 private:
  AlignedBuffer<int64_t> offsets_;
};

// Patches `step` elements apart, in vectors: kVectors - 1 whole ones of each run and a part, any number for
// 0. Out of line, since its loop wants every register: 8 ns for 7 runs, in the midst of others 30.
template <int kVectors, class T>
[[gnu::noinline]] void copy_patches(const T* in, int64_t step, const PatchRuns& of, int64_t count, T* rows,
                                    int64_t pitch, int64_t padded) {
  const int64_t whole = ((kVectors ? kVectors : ceil_div(of.length, kCopied<T>)) - 1) * kCopied<T>;
  const int64_t *from = of.from(), *to = of.to(), runs = of.count;
  const int64_t written = to[runs - 1] + whole + kCopied<T>;
  const int rest = int(of.length - whole);
  for (int64_t i = 0; i < count; ++i, in += step, rows += pitch) {
    for (int64_t run = 0; run < runs; ++run) {
      const T* source = in + from[run];
      T* out = rows + to[run];
      for (int64_t c = 0; c < whole; c += kCopied<T>) copy_vector(out + c, source + c, kCopied<T>);
      copy_vector(out + whole, source + whole, rest);
    }
    clear_run(rows + written, padded - written);
  }
}

template <class T>
void copy_patches(const T* in, int64_t step, const PatchRuns& of, int64_t count, T* rows, int64_t pitch,
                  int64_t padded) {
  const auto copy = of.length <= kCopied<T>       ? copy_patches<1, T>
                    : of.length <= 2 * kCopied<T> ? copy_patches<2, T>
                                                  : copy_patches<0, T>;
  copy(in, step, of, count, rows, pitch, padded);
}

// Patches of consecutive output pixels, as [kernel_h][kernel_w][channels] and zeros up to `padded` elements;
// padding is zero after the prologue. A patch is written by whole vectors: up to 2 * kLanes elements past it.
template <class T>
class PatchRows {
 public:
  PatchRows(const Conv2dShape& s, const Activations& x, const ScaleShiftAct& prologue, int64_t padded)
      : s_(s),
        x_(x),
        prologue_(prologue),
        padded_(padded),
        span_w_(int64_t(s.kernel_w - 1) * s.dilation_w + 1),
        line_((int64_t(s.out_w - 1) * s.stride_w + span_w_) * s.channels),
        lines_(size_t(s.kernel_h * line_ + 2 * kCopied<T>)),
        runs_(s, line_, s.kernel_w * s.channels) {}

  // Writes the patches of output pixels [first, first + count), `pitch` elements apart.
  void write(int64_t first, int64_t count, T* rows, int64_t pitch) {
    while (count > 0) {
      const int64_t q = first % s_.out_w, line = first / s_.out_w;
      const int64_t rest = s_.out_w - q, n = count < rest ? count : rest, step = s_.stride_w * s_.channels;
      for (int64_t kh = 0; kh < s_.kernel_h; ++kh)
        fill_padded_line(
            s_, x_, prologue_, line / s_.out_h, line % s_.out_h * s_.stride_h - s_.pad_h + kh * s_.dilation_h,
            q * s_.stride_w - s_.pad_w, (n - 1) * s_.stride_w + span_w_, lines_.data() + kh * line_);
      copy_patches(lines_.data(), step, runs_, n, rows, pitch, padded_);
      first += n, count -= n, rows += n * pitch;
    }
  }

 private:
  const Conv2dShape& s_;
  const Activations& x_;
  const ScaleShiftAct& prologue_;
  const int64_t padded_, span_w_, line_;  // elements of a patch; columns that it spans; elements of a line
  AlignedBuffer<T> lines_;
  const PatchRuns runs_;
};

// Elements of a patch padded to whole vectors, and of a buffer that holds one.
inline int64_t padded_patch(const Conv2dShape& s) { return round_up(s.taps() * s.channels, 2 * kLanes); }
inline int64_t patch_elements(const Conv2dShape& s) { return padded_patch(s) + 2 * kLanes; }

}  // namespace
}  // namespace fastcnn
