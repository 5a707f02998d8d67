// The depthwise stencil, one output row at a time, over a ring of zero-padded fp32 input rows.
//
// A ring row holds columns [-pad_w, -pad_w + ring_width) of one input row with the prologue already applied, as
// [ring_width][pitch] floats, pitch a multiple of kLanes. Padding is zero in it, above and below too, so that the
// stencil has neither edges nor tails. How the forward and the fused blocks use it:
//
//   const int64_t pitch = round_up(channels, kLanes);
//   RowRing ring(shape, pitch, thread_scratch(RowRing::floats(shape, pitch)));
//   pack_depthwise_weight(shape, weight, c0, channels, pitch, packed);            // once per call
//   const float* rows[kMostKernelRows];
//   for (p = ...) {
//     ring.advance(p, [&](int64_t h, float* row) { fill_row<T>(shape, x, prologue, image, h, c0, channels, pitch, row);
//                                                }, rows);
//     depthwise_row(shape, rows, pitch, packed, pitch, 0, pitch, dst, dst_ld);
//   }
#pragma once

#include <type_traits>

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

  // Points rows[0, kernel_h) at what output row p reads. fill(h, float* row) makes the input rows h that are not held.
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

// `kPixels` neighbouring pixels of a ring row, channels [0, count); at(c, n) makes the prologue of channels [c, c + n).
template <int kPixels, class T, class Prologue>
inline void fill_pixels(const T* src, int64_t ld, const Prologue& at, int64_t count, int64_t pitch, float* dst) {
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
void fill_multiplied(int64_t multiplier, const T* src, int64_t ld, int64_t columns, const ScaleShiftAct& prologue,
                     int64_t c0, int64_t count, int64_t pitch, float* dst) {
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
void fill_span(int64_t multiplier, const T* src, int64_t ld, int64_t columns, const ScaleShiftAct& prologue, int64_t c0,
               int64_t count, int64_t pitch, float* dst) {
  if (multiplier > 1) return fill_multiplied(multiplier, src, ld, columns, prologue, c0, count, pitch, dst);
  src += c0;
  if (prologue.is_identity())
    return fill_columns(src, ld, columns, [](int64_t, int64_t) { return [](V v) { return v; }; }, count, pitch, dst);
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

// Fills one ring row from row h of an image: output channels [c0, c0 + count), zero up to the pitch and in the padding.
template <class T>
void fill_row(const DepthwiseShape& s, const Activations& x, const ScaleShiftAct& prologue, int64_t image, int64_t h,
              int64_t c0, int64_t count, int64_t pitch, float* row) {
  const int64_t width = ring_width(s);
  const int64_t left = s.pad_w < width ? s.pad_w : width;
  const int64_t columns = width - left < s.in_w ? width - left : s.in_w;
  std::memset(row, 0, size_t(left * pitch) * sizeof(float));
  std::memset(row + (left + columns) * pitch, 0, size_t((width - left - columns) * pitch) * sizeof(float));
  const T* src = static_cast<const T*>(x.data) + (image * s.in_h + h) * s.in_w * x.ld;
  fill_span(s.multiplier, src, x.ld, columns, prologue, c0, count, pitch, row + left * pitch);
}

// Input rows that the next output row will read, fetched into L2 while this one is computed (8 to 30 percent, from
// memory); null: nothing. Pixels lie `pixel` bytes apart, rows `row`, channels `channel`.
struct Ahead {
  const char* data;
  int64_t pixel, row, channel;
  int rows;

  template <int kColumns>
  void fetch(int64_t column, int64_t c) const {
    for (int r = 0; r < rows; ++r) {
      const char* p = data + r * row + column * pixel + c * channel;
      for (int i = 0; i < kColumns; ++i) __builtin_prefetch(p + i * pixel, 0, 2);
    }
  }
};

// Rows of the (virtually) padded input that an output row reads: pixels `pitch` floats apart, of which columns
// [begin, end) exist; the others read as zero, and so do the kernel's rows outside [first_tap, last_tap).
struct StencilRows {
  const float* const* rows;
  int64_t pitch;
  int64_t begin, end;
  int first_tap, last_tap;
  Ahead ahead{};
};

// Walks the columns of a row. One register and one addition per column: left to itself GCC keeps a register for each
// column's offset, runs out of them and spills (measured: 15 cycles per output vector of a 3 x 3 instead of 11).
template <bool kEdge>
class Columns {
 public:
  Columns(const StencilRows& in, const float* x, int64_t column, int64_t step = 1)
      : p_(x), step_(step * in.pitch), at_(uint64_t(column - in.begin)), count_(uint64_t(in.end - in.begin)),
        column_step_(step) {}

  V next() {
    const float* p = p_;
    p_ += step_;
    asm("" : "+r"(p_));
    if constexpr (kEdge) {
      const bool exists = at_ < count_;
      at_ += column_step_;
      if (!exists) return zero();
    }
    return load(p);
  }

 private:
  const float* p_;
  int64_t step_;
  uint64_t at_, count_, column_step_;
};

// acc[b] += kTaps taps of one kernel row: kOutputs neighbouring outputs share each loaded column.
template <int kOutputs, int kTaps, int kStride, bool kEdge>
inline void accumulate_taps(const StencilRows& in, V (&acc)[kOutputs], const float* x, int64_t column, const float* w,
                            int64_t w_pitch) {
  V tap[kTaps];
#pragma GCC unroll 8
  for (int t = 0; t < kTaps; ++t) tap[t] = load(w + t * w_pitch);
  Columns<kEdge> columns(in, x, column);
#pragma GCC unroll 32
  for (int j = 0; j < (kOutputs - 1) * kStride + kTaps; ++j) {
    const V v = columns.next();
#pragma GCC unroll 8
    for (int b = 0; b < kOutputs; ++b)
      if (j >= b * kStride && j < b * kStride + kTaps) acc[b] = fmadd(v, tap[j - b * kStride], acc[b]);
  }
}

// One kernel row of any width, stride and dilation: four taps at a time where outputs can share columns.
template <int kOutputs, bool kEdge>
inline void accumulate_any(const DepthwiseShape& s, const StencilRows& in, V (&acc)[kOutputs], const float* x,
                           int64_t column, const float* w, int64_t w_pitch) {
  int t = 0;
  if (s.stride_w == 1 && s.dilation_w == 1)
    for (; t + 4 <= s.kernel_w; t += 4)
      accumulate_taps<kOutputs, 4, 1, kEdge>(in, acc, x + t * in.pitch, column + t, w + t * w_pitch, w_pitch);
  for (; t < s.kernel_w; ++t) {
    const V tap = load(w + t * w_pitch);
    const int64_t j = int64_t(t) * s.dilation_w;
    Columns<kEdge> columns(in, x + j * in.pitch, column + j, s.stride_w);
#pragma GCC unroll 8
    for (int b = 0; b < kOutputs; ++b) acc[b] = fmadd(columns.next(), tap, acc[b]);
  }
}

// kOutputs outputs from q on, for channels [c0, c1). kTaps 0: any kernel width, stride and dilation.
template <int kOutputs, int kTaps, int kStride, bool kEdge, class Sink>
[[gnu::noinline]] void row_block(const DepthwiseShape& s, const StencilRows in, const float* weight, int64_t weight_pitch,
                      int64_t c0, int64_t c1, int64_t q, const Sink& sink) {
  const int64_t column = q * s.stride_w, weight_row = s.kernel_w * weight_pitch;
  for (int64_t c = c0; c < c1; c += kLanes) {
    V acc[kOutputs];
#pragma GCC unroll 8
    for (int b = 0; b < kOutputs; ++b) acc[b] = zero();
    for (int r = in.first_tap; r < in.last_tap; ++r) {
      const float* x = in.rows[r] + column * in.pitch + c;
      const float* w = weight + r * weight_row + c;
      if constexpr (kTaps > 0)
        accumulate_taps<kOutputs, kTaps, kStride, kEdge>(in, acc, x, column, w, weight_pitch);
      else
        accumulate_any<kOutputs, kEdge>(s, in, acc, x, column, w, weight_pitch);
    }
    if (in.ahead.data) in.ahead.template fetch<kOutputs*(kStride ? kStride : 1)>(column, c);
    sink.put(q, c, acc);
  }
}

template <int kTaps, int kStride, class Sink>
void row_of_blocks(const DepthwiseShape& s, const StencilRows& in, const float* weight, int64_t weight_pitch,
                   int64_t c0, int64_t c1, const Sink& sink) {
  const int64_t reach = int64_t(s.kernel_w - 1) * s.dilation_w + 1;
  int64_t q = 0;
  const auto run = [&](auto outputs) {
    constexpr int kOutputs = decltype(outputs)::value;
    for (; q + kOutputs <= s.out_w; q += kOutputs) {
      if (q * s.stride_w >= in.begin && (q + kOutputs - 1) * s.stride_w + reach <= in.end)
        row_block<kOutputs, kTaps, kStride, false>(s, in, weight, weight_pitch, c0, c1, q, sink);
      else
        row_block<kOutputs, kTaps, kStride, true>(s, in, weight, weight_pitch, c0, c1, q, sink);
    }
  };
  // Seven divides the widths of most networks (112, 56, 28, 14, 7).
  run(std::integral_constant<int, 7>());
  run(std::integral_constant<int, 4>());
  run(std::integral_constant<int, 1>());
}

// One output row into a sink: sink.put(q, c, acc) takes outputs [q, q + kOutputs) of channels [c, c + kLanes), as
// `template <int kOutputs> void put(int64_t q, int64_t c, V (&acc)[kOutputs]) const`. Weight [tap][weight_pitch]; c0 and
// c1 are multiples of kLanes, counted from the start of the rows' pixels and of the weight.
template <class Sink>
void stencil_row(const DepthwiseShape& s, const StencilRows& in, const float* weight, int64_t weight_pitch, int64_t c0,
                 int64_t c1, const Sink& sink) {
#define FASTCNN_ROW(taps, stride) \
  if (s.kernel_w == taps && s.stride_w == stride) \
  return row_of_blocks<taps, stride>(s, in, weight, weight_pitch, c0, c1, sink)
  if (s.dilation_w == 1) {
    FASTCNN_ROW(3, 1);
    FASTCNN_ROW(3, 2);
    FASTCNN_ROW(5, 1);
    FASTCNN_ROW(5, 2);
    FASTCNN_ROW(7, 1);
  }
#undef FASTCNN_ROW
  row_of_blocks<0, 0>(s, in, weight, weight_pitch, c0, c1, sink);
}

// stencil_row over a ring's rows.
template <class Sink>
void depthwise_row_to(const DepthwiseShape& s, const float* const* rows, int64_t pitch, const float* weight,
                      int64_t weight_pitch, int64_t c0, int64_t c1, const Sink& sink) {
  stencil_row(s, StencilRows{rows, pitch, 0, ring_width(s), 0, s.kernel_h}, weight, weight_pitch, c0, c1, sink);
}

struct RawSink {
  float* dst;
  int64_t ld;

  template <int kOutputs>
  void put(int64_t q, int64_t c, V (&acc)[kOutputs]) const {
#pragma GCC unroll 8
    for (int b = 0; b < kOutputs; ++b) store(dst + (q + b) * ld + c, acc[b]);
  }
};

// One output row of raw results: dst[q * dst_ld + c] for every q of the row and c in [c0, c1).
inline void depthwise_row(const DepthwiseShape& s, const float* const* rows, int64_t pitch, const float* weight,
                          int64_t weight_pitch, int64_t c0, int64_t c1, float* dst, int64_t dst_ld) {
  const RawSink sink{dst, dst_ld};
  depthwise_row_to(s, rows, pitch, weight, weight_pitch, c0, c1, sink);
}

}  // namespace
}  // namespace fastcnn
