// Depthwise convolution forward. A unit of work is one image's chunk of output rows for one block of
// channels; it walks down the rows over a ring of transformed input rows (depthwise_rows.h), and stores with
// the epilogue.
#include "cpu/by_dtype.h"
#include "cpu/depthwise_rows.h"
#include "cpu/kernels.h"
#include "cpu/lanes.h"

namespace fastcnn {
namespace {

// Epilogue of one output row's blocks. The vectors are the unit's, padded to whole lanes.
template <class T>
struct EpilogueSink {
  const float *scale, *shift;  // null: the identity
  StatisticsUnit statistics;   // shift null: none
  int act;
  bool act_last;
  bool first;  // no value of this unit has been seen yet
  bool streamed;
  int64_t channels;   // of the unit
  const T* residual;  // of the row, at the unit's first channel
  int64_t residual_ld;
  T* out;
  int64_t out_ld;
  int64_t next_row;  // elements from a row of out to the next, or 0

  template <int kOutputs>
  void put(int64_t q, int64_t c, V (&acc)[kOutputs]) const {
    if (scale) {
      const V a = load(scale + c), b = load(shift + c);
#pragma GCC unroll 8
      for (int i = 0; i < kOutputs; ++i) acc[i] = fmadd(acc[i], a, b);
    }
    if (statistics.shift) add_statistics(q, c, acc);
    if (!act_last) activate_all(act, acc);
    const int64_t n = channels - c;
    if (n < kLanes)
      store_all(q, c, acc, SomeLanes{int(n)});
    else if (streamed)
      store_all(q, c, acc, StreamedLanes{});
    else
      store_all(q, c, acc, AllLanes{});
  }

 private:
  template <int kOutputs>
  void add_statistics(int64_t q, int64_t c, V (&acc)[kOutputs]) const {
    const bool start = first && q == 0;
    const V base = start ? acc[0] : load(statistics.shift + c);
    V sum = zero(), square = zero();
#pragma GCC unroll 8
    for (int i = 0; i < kOutputs; ++i) {
      const V d = sub(acc[i], base);
      sum = add(sum, d);
      square = fmadd(d, d, square);
    }
    statistics.put(c, base, sum, square, start);
  }

  template <int kOutputs, class Lanes>
  void store_all(int64_t q, int64_t c, V (&acc)[kOutputs], const Lanes& lanes) const {
    T* p = out + q * out_ld + c;
    if (residual) {
      const T* from = residual + q * residual_ld + c;
#pragma GCC unroll 8
      for (int i = 0; i < kOutputs; ++i) acc[i] = add(acc[i], lanes.get(from + i * residual_ld));
    }
    if (act_last) activate_all(act, acc);
    if (next_row)
      for (int i = 0; i < kOutputs; ++i) __builtin_prefetch(p + i * out_ld + next_row, 1, 3);
#pragma GCC unroll 8
    for (int i = 0; i < kOutputs; ++i) lanes.put(p + i * out_ld, acc[i]);
  }
};

constexpr int64_t kRingFloats = 48 * 1024;  // what a unit's rows may take: a fifth of a 1 MB L2
constexpr int64_t kChunkPixels = 4096;      // bounds the error of a unit's float sums

template <class T>
class Forward {
 public:
  explicit Forward(const DepthwiseForward& p)
      : p_(p),
        s_(p.shape),
        channels_(s_.out_channels()),
        direct_(std::is_same_v<T, float> && p.prologue.is_identity() && s_.multiplier == 1),
        streamed_(can_stream(static_cast<const T*>(p.epilogue.out), p.epilogue.out_ld,
                             s_.images * s_.out_h * s_.out_w * channels_ * int64_t(sizeof(T)))) {
    const int64_t most = kRingFloats / ((RowRing::slots(s_) + 1) * ring_width(s_)) / 16 * 16;
    const int64_t blocks = ceil_div(channels_, most < 16 ? 16 : most);
    block_ = round_up(ceil_div(channels_, blocks), 16);
    blocks_ = ceil_div(channels_, block_);
    const int64_t rows = kChunkPixels / s_.out_w;
    chunks_ = ceil_div(s_.out_h, rows < 1 ? 1 : rows);
    pitch_ = blocks_ * block_;
  }

  void run() {
    const int64_t tasks = s_.images * chunks_;
    AlignedBuffer<float> vectors(size_t((s_.taps() + 2) * pitch_));
    AlignedBuffer<float> statistics(p_.epilogue.mean ? size_t(tasks * 3 * pitch_) : 1);
    vectors_ = vectors.data();
    statistics_ = p_.epilogue.mean ? statistics.data() : nullptr;
    pack();
    parallel_for(tasks * blocks_, [&](int64_t unit) {
      walk(unit / blocks_, unit % blocks_);
      if (streamed_) finish_streaming();
    });
    if (statistics_)
      merge_statistics(
          statistics_, tasks, [&](int64_t task) { return rows_of(task) * s_.out_w; }, channels_, pitch_,
          p_.epilogue.mean, p_.epilogue.var);
  }

 private:
  int64_t first_row(int64_t chunk) const { return s_.out_h * chunk / chunks_; }
  int64_t rows_of(int64_t task) const { return first_row(task % chunks_ + 1) - first_row(task % chunks_); }

  // The weight, then the epilogue's scale and shift, all padded to the pitch.
  void pack() {
    pack_depthwise_weight(s_, p_.weight, 0, channels_, pitch_, vectors_);
    const ScaleShiftAct& a = p_.epilogue.affine;
    float *scale = vectors_ + s_.taps() * pitch_, *shift = scale + pitch_;
    for (int64_t c = 0; c < pitch_; ++c) {
      scale[c] = a.scale && c < channels_ ? a.scale[c] : 1.0f;
      shift[c] = a.shift && c < channels_ ? a.shift[c] : 0.0f;
    }
  }

  void walk(int64_t task, int64_t block) const {
    const int64_t image = task / chunks_, chunk = task % chunks_, c0 = block * block_;
    const int64_t count = channels_ - c0 < block_ ? channels_ - c0 : block_, c1 = round_up(count, kLanes);
    const float* rows[kMostKernelRows];
    RowRing ring(s_, block_, thread_scratch(RowRing::floats(s_, block_)));
    const auto fill = [&](int64_t h, float* row) {
      fill_row<T>(s_, p_.x, p_.prologue, image, h, c0, count, block_, row);
    };
    for (int64_t p = first_row(chunk); p < first_row(chunk + 1); ++p) {
      StencilRows in;
      if (direct_ && !reads_end(image, p)) {
        in = input_rows(image, p, c0, rows);
      } else {
        ring.advance(p, fill, rows);
        in = {rows, block_, 0, ring_width(s_), 0, s_.kernel_h};
      }
      in.ahead = ahead(image, p, c0);
      stencil_row(s_, in, vectors_ + c0, pitch_, 0, c1, sink(task, image, p, c0, count));
    }
  }

  // Whether whole vectors of row p's inputs would reach past the tensor's last channel. Elsewhere the lanes
  // past the channels read the next pixels (several, where channels are few), and are not stored.
  bool reads_end(int64_t image, int64_t p) const {
    const int64_t last = p * s_.stride_h - s_.pad_h + int64_t(s_.kernel_h - 1) * s_.dilation_h;
    const int64_t row = image * s_.in_h + (last < s_.in_h ? last : s_.in_h - 1), rows = s_.images * s_.in_h;
    return ((rows - 1 - row) * s_.in_w) * p_.x.ld + channels_ < round_up(channels_, kLanes);
  }

  // The input itself, where no prologue and no widening is in the way.
  StencilRows input_rows(int64_t image, int64_t p, int64_t c0, const float** rows) const {
    StencilRows in{rows, p_.x.ld, s_.pad_w, s_.pad_w + s_.in_w, s_.kernel_h, 0};
    for (int r = 0; r < s_.kernel_h; ++r) {
      const int64_t h = p * s_.stride_h - s_.pad_h + int64_t(r) * s_.dilation_h;
      if (h < 0 || h >= s_.in_h) continue;
      rows[r] =
          static_cast<const float*>(p_.x.data) + ((image * s_.in_h + h) * s_.in_w - s_.pad_w) * p_.x.ld + c0;
      if (r < in.first_tap) in.first_tap = r;
      in.last_tap = r + 1;
    }
    return in;
  }

  Ahead ahead(int64_t image, int64_t p, int64_t c0) const {
    const int64_t pixel = p_.x.ld * int64_t(sizeof(T)), row = s_.in_w * pixel;
    const int64_t h = p * s_.stride_h - s_.pad_h + int64_t(s_.kernel_h - 1) * s_.dilation_h + 1;
    if (h + s_.stride_h > s_.in_h) return {};
    return {static_cast<const char*>(p_.x.data) + (image * s_.in_h + h) * row + c0 * int64_t(sizeof(T)),
            pixel, row, sizeof(T), s_.stride_h};
  }

  EpilogueSink<T> sink(int64_t task, int64_t image, int64_t p, int64_t c0, int64_t count) const {
    const Epilogue& e = p_.epilogue;
    EpilogueSink<T> to{};
    if (e.affine.scale || e.affine.shift) {
      to.scale = vectors_ + s_.taps() * pitch_ + c0;
      to.shift = to.scale + pitch_;
    }
    if (statistics_) {
      float* unit = statistics_ + task * 3 * pitch_ + c0;
      to.statistics = {unit, unit + pitch_, unit + 2 * pitch_};
    }
    to.act = e.affine.act;
    to.act_last = e.act_last;
    to.first = p == first_row(task % chunks_);
    to.channels = count;
    const int64_t pixel = (image * s_.out_h + p) * s_.out_w;
    if (e.residual.data) to.residual = static_cast<const T*>(e.residual.data) + pixel * e.residual.ld + c0;
    to.residual_ld = e.residual.ld;
    to.out = static_cast<T*>(e.out) + pixel * e.out_ld + c0;
    to.out_ld = e.out_ld;
    to.streamed = streamed_;
    if (!streamed_ && p + 1 < first_row(task % chunks_ + 1)) to.next_row = s_.out_w * e.out_ld;
    return to;
  }

  const DepthwiseForward& p_;
  const DepthwiseShape& s_;
  const int64_t channels_;
  const bool direct_, streamed_;
  int64_t block_, blocks_, chunks_, pitch_;
  float *vectors_, *statistics_;
};

void depthwise_forward(const DepthwiseForward& p) {
  by_dtype(p.shape.dtype, &Kernels::depthwise_forward, p, [&](auto t) { Forward<decltype(t)>(p).run(); });
}

}  // namespace

namespace FASTCNN_ISA {
void register_depthwise_forward(Kernels& k) { k.depthwise_forward = depthwise_forward; }
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
