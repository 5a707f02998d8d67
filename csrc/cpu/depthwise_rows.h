// The depthwise stencil, one output row at a time, over a ring of zero-padded fp32 input rows.
//
// A ring row holds columns [-pad_w, -pad_w + ring_width) of one input row with the prologue already applied,
// as [ring_width][pitch] floats, pitch a multiple of kLanes. Padding is zero in it, above and below too, so
// that the stencil has neither edges nor tails. How the forward and the fused blocks use it:
//
//   const int64_t pitch = round_up(channels, kLanes);
//   RowRing ring(shape, pitch, thread_scratch(RowRing::floats(shape, pitch)));
//   pack_depthwise_weight(shape, weight, c0, channels, pitch, packed);  // once per call
//   const auto fill = [&](int64_t h, float* row) {
//     fill_row<T>(shape, x, prologue, image, h, c0, channels, pitch, row);
//   };
//   const float* rows[kMostKernelRows];
//   for (p = ...) {
//     ring.advance(p, fill, rows);
//     depthwise_row(shape, rows, pitch, packed, pitch, 0, pitch, dst, dst_ld);
//   }
#pragma once

#include <type_traits>

#include "cpu/depthwise_ring.h"

namespace fastcnn {
namespace {

// Input rows that the next output row will read, fetched into L2 while this one is computed (8 to 30 percent,
// from memory); null: nothing. Pixels lie `pixel` bytes apart, rows `row`, channels `channel`.
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

// Rows of the (virtually) padded input that an output row reads: pixels `pitch` floats apart, of which
// columns [begin, end) exist; the others read as zero, and so do the kernel's rows outside [first_tap,
// last_tap).
struct StencilRows {
  const float* const* rows;
  int64_t pitch;
  int64_t begin, end;
  int first_tap, last_tap;
  Ahead ahead{};
};

// Walks the columns of a row. One register and one addition per column: left to itself GCC keeps a register
// for each column's offset, runs out of them and spills (measured: 15 cycles per output vector of a 3 x 3
// instead of 11).
template <bool kEdge>
class Columns {
 public:
  Columns(const StencilRows& in, const float* x, int64_t column, int64_t step = 1)
      : p_(x),
        step_(step * in.pitch),
        at_(uint64_t(column - in.begin)),
        count_(uint64_t(in.end - in.begin)),
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
inline void accumulate_taps(const StencilRows& in, V (&acc)[kOutputs], const float* x, int64_t column,
                            const float* w, int64_t w_pitch) {
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
[[gnu::noinline]] void row_block(const DepthwiseShape& s, const StencilRows in, const float* weight,
                                 int64_t weight_pitch, int64_t c0, int64_t c1, int64_t q, const Sink& sink) {
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

// One output row into a sink: sink.put(q, c, acc) takes outputs [q, q + kOutputs) of channels [c, c +
// kLanes), as `template <int kOutputs> void put(int64_t q, int64_t c, V (&acc)[kOutputs]) const`. Weight
// [tap][weight_pitch]; c0 and c1 are multiples of kLanes, counted from the start of the rows' pixels and of
// the weight.
template <class Sink>
void stencil_row(const DepthwiseShape& s, const StencilRows& in, const float* weight, int64_t weight_pitch,
                 int64_t c0, int64_t c1, const Sink& sink) {
#define FASTCNN_ROW(taps, stride)                 \
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
  stencil_row(s, StencilRows{rows, pitch, 0, ring_width(s), 0, s.kernel_h}, weight, weight_pitch, c0, c1,
              sink);
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
inline void depthwise_row(const DepthwiseShape& s, const float* const* rows, int64_t pitch,
                          const float* weight, int64_t weight_pitch, int64_t c0, int64_t c1, float* dst,
                          int64_t dst_ld) {
  const RawSink sink{dst, dst_ld};
  depthwise_row_to(s, rows, pitch, weight, weight_pitch, c0, c1, sink);
}

}  // namespace
}  // namespace fastcnn
