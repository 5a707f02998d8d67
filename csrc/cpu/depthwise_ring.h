// Rows of fp32 floats with the prologue applied, kept while a stencil walks down an image. See
// depthwise_rows.h.
#pragma once

#include "cpu/epilogue.h"
#include "ops/depthwise.h"

namespace fastcnn {
namespace {

constexpr int kMostKernelRows = 31;

// Columns of the padded input that a row of outputs reads.
inline int64_t ring_width(const DepthwiseShape& s) {
  return (s.out_w - 1) * s.stride_w + int64_t(s.kernel_w - 1) * s.dilation_w + 1;
}

// Channels [c0, c0 + count) of the output, as [tap][pitch] and zero up to the pitch.
inline void pack_depthwise_weight(const DepthwiseShape& s, const float* weight, int64_t c0, int64_t count,
                                  int64_t pitch, float* packed) {
  for (int t = 0; t < s.taps(); ++t) {
    for (int64_t c = 0; c < count; ++c) packed[t * pitch + c] = weight[(c0 + c) * s.taps() + t];
    for (int64_t c = count; c < pitch; ++c) packed[t * pitch + c] = 0;
  }
}

// Rows of floats by row number modulo the number of slots, made when first asked for.
class RowCache {
 public:
  static size_t floats(int64_t slots, int64_t row_floats) {
    return size_t(slots * row_floats + round_up(slots, 8) * 2);
  }

  RowCache(int64_t slots, int64_t row_floats, float* memory)
      : memory_(memory), slots_(slots), row_floats_(row_floats) {
    held_ = reinterpret_cast<int64_t*>(memory + slots * row_floats);
    for (int64_t i = 0; i < slots; ++i) held_[i] = -1;
  }

  // fill(h, float* row) makes a row that is not held.
  template <class Fill>
  const float* row(int64_t h, const Fill& fill) {
    const int64_t slot = h % slots_;
    float* at = memory_ + slot * row_floats_;
    if (held_[slot] != h) fill(h, at);
    held_[slot] = h;
    return at;
  }

 private:
  float* memory_;
  int64_t slots_, row_floats_;
  int64_t* held_;
};

// The input rows that an output row reads, and one row of zeros for what lies outside the image.
class RowRing {
 public:
  static int64_t slots(const DepthwiseShape& s) {
    const int64_t span = int64_t(s.kernel_h - 1) * s.dilation_h + 1;
    return span < s.in_h ? span : s.in_h;
  }
  static size_t floats(const DepthwiseShape& s, int64_t pitch) {
    return size_t(ring_width(s) * pitch) + RowCache::floats(slots(s), ring_width(s) * pitch);
  }

  // memory: `floats` of it, 64-byte aligned.
  RowRing(const DepthwiseShape& s, int64_t pitch, float* memory)
      : s_(s), zeros_(memory), cache_(slots(s), ring_width(s) * pitch, memory + ring_width(s) * pitch) {
    std::memset(zeros_, 0, size_t(ring_width(s) * pitch) * sizeof(float));
  }

  // Points rows[0, kernel_h) at what output row p reads. fill(h, float* row) makes the input rows h that are
  // not held.
  template <class Fill>
  void advance(int64_t p, const Fill& fill, const float** rows) {
    for (int r = 0; r < s_.kernel_h; ++r) {
      const int64_t h = p * s_.stride_h - s_.pad_h + int64_t(r) * s_.dilation_h;
      rows[r] = h < 0 || h >= s_.in_h ? zeros_ : cache_.row(h, fill);
    }
  }

 private:
  const DepthwiseShape& s_;
  float* zeros_;
  RowCache cache_;
};

// `kPixels` neighbouring pixels of a ring row, channels [0, count); at(c, n) makes the prologue of channels
// [c, c + n).
template <int kPixels, class T, class Prologue>
inline void fill_pixels(const T* src, int64_t ld, const Prologue& at, int64_t count, int64_t pitch,
                        float* dst) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    const auto apply = at(c, kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kPixels; ++i) store(dst + i * pitch + c, apply(load(src + i * ld + c)));
  }
  if (c < count) {
    const int n = int(count - c);
    const auto apply = at(c, n);
    for (int i = 0; i < kPixels; ++i) store(dst + i * pitch + c, apply(load(src + i * ld + c, n)));
    c += kLanes;
  }
  for (; c < pitch; c += kLanes)
    for (int i = 0; i < kPixels; ++i) store(dst + i * pitch + c, zero());
}

template <class T, class Prologue>
void fill_columns(const T* src, int64_t ld, int64_t columns, const Prologue& at, int64_t count, int64_t pitch,
                  float* dst) {
  int64_t w = 0;
  for (; w + 4 <= columns; w += 4) fill_pixels<4>(src + w * ld, ld, at, count, pitch, dst + w * pitch);
  for (; w < columns; ++w) fill_pixels<1>(src + w * ld, ld, at, count, pitch, dst + w * pitch);
}

// With a multiplier, output channel c reads input channel c / multiplier.
template <class T>
void fill_multiplied(int64_t multiplier, const T* src, int64_t ld, int64_t columns,
                     const ScaleShiftAct& prologue, int64_t c0, int64_t count, int64_t pitch, float* dst) {
  for (int64_t w = 0; w < columns; ++w, src += ld, dst += pitch) {
    for (int64_t c = 0; c < count; ++c) {
      const int64_t k = (c0 + c) / multiplier;
      const float scaled = prologue.scale ? prologue.scale[k] * to_float(src[k]) : to_float(src[k]);
      dst[c] = prologue.shift ? scaled + prologue.shift[k] : scaled;
    }
    for (int64_t c = count; c < pitch; ++c) dst[c] = 0;
    if (!prologue.act) continue;
    for (int64_t c = 0; c < pitch; c += kLanes) store(dst + c, activate(prologue.act, load(dst + c)));
  }
}

// Neighbouring pixels with the prologue applied: output channels [c0, c0 + count), zero up to the pitch.
template <class T>
void fill_span(int64_t multiplier, const T* src, int64_t ld, int64_t columns, const ScaleShiftAct& prologue,
               int64_t c0, int64_t count, int64_t pitch, float* dst) {
  if (multiplier > 1) return fill_multiplied(multiplier, src, ld, columns, prologue, c0, count, pitch, dst);
  src += c0;
  if (prologue.is_identity())
    return fill_columns(
        src, ld, columns, [](int64_t, int64_t) { return [](V v) { return v; }; }, count, pitch, dst);
  const auto scale = [&](int64_t c, int64_t n) {
    return prologue.scale ? load_upto(prologue.scale + c0 + c, n) : set(1.0f);
  };
  const auto shift = [&](int64_t c, int64_t n) {
    return prologue.shift ? load_upto(prologue.shift + c0 + c, n) : zero();
  };
  if (prologue.act > kRelu6) {
    const int act = prologue.act;
    const auto at = [&](int64_t c, int64_t n) {
      return [act, a = scale(c, n), b = shift(c, n)](V v) { return activate(act, fmadd(v, a, b)); };
    };
    return fill_columns(src, ld, columns, at, count, pitch, dst);
  }
  // None, ReLU and ReLU6 alike are a clamp.
  const V low = prologue.act ? zero() : set(-__builtin_inff());
  const V high = prologue.act == kRelu6 ? set(6.0f) : set(__builtin_inff());
  const auto at = [&](int64_t c, int64_t n) {
    return [low, high, a = scale(c, n), b = shift(c, n)](V v) { return min(max(fmadd(v, a, b), low), high); };
  };
  fill_columns(src, ld, columns, at, count, pitch, dst);
}

// Fills one ring row from row h of an image: output channels [c0, c0 + count), zero up to the pitch and in
// the padding.
template <class T>
void fill_row(const DepthwiseShape& s, const Activations& x, const ScaleShiftAct& prologue, int64_t image,
              int64_t h, int64_t c0, int64_t count, int64_t pitch, float* row) {
  const int64_t width = ring_width(s);
  const int64_t left = s.pad_w < width ? s.pad_w : width;
  const int64_t columns = width - left < s.in_w ? width - left : s.in_w;
  std::memset(row, 0, size_t(left * pitch) * sizeof(float));
  std::memset(row + (left + columns) * pitch, 0, size_t((width - left - columns) * pitch) * sizeof(float));
  const T* src = static_cast<const T*>(x.data) + (image * s.in_h + h) * s.in_w * x.ld;
  fill_span(s.multiplier, src, x.ld, columns, prologue, c0, count, pitch, row + left * pitch);
}

}  // namespace
}  // namespace fastcnn
