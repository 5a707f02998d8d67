// Depthwise convolution backward: dx and dw in one pass over dy and x.
//
// A unit of work walks down input rows of one block of channels. For input position i = w + pad_w and tap s
// it pairs dy at column (i - s * dilation) / stride with a = act(scale * x + shift) at w:
//   dx[w] += dy * weight[s],   dw[s] += dy * a[w]
// so that one loaded dy column serves both, and every (output, tap) with an input inside the image is met
// once. Rows of dy (gradient prologue applied) lie in a cache of fp32 rows, zero outside the output. Strides
// above 1 that have no kernel of their own read a dy row with zeros put between its columns, and are stride 1
// from there on.
#include "cpu/by_dtype.h"
#include "cpu/depthwise_gradient.h"
#include "cpu/depthwise_ring.h"
#include "cpu/kernels.h"

namespace fastcnn {
namespace {

// Where the rows of a unit lie.
struct BackwardPlan {
  explicit BackwardPlan(const DepthwiseShape& s) {
    parity = s.stride_w == 2 && s.dilation_w == 1 && (s.kernel_w == 3 || s.kernel_w == 5 || s.kernel_w == 7);
    block = parity ? kParityPositions : kPositions;
    origin = parity ? s.pad_w / 2 * 2 : s.pad_w;
    positions = round_up(s.pad_w - origin + s.in_w, block);
    margin = parity ? (s.kernel_w - 1) / 2 : int64_t(s.kernel_w - 1) * s.dilation_w;
    spread = parity ? 1 : s.stride_w;
    dy_width = (parity ? positions / 2 : positions) + margin;
    dy_origin = (parity ? origin / 2 : origin) - margin;
    const int64_t span = int64_t(s.kernel_h - 1) * s.dilation_h / s.stride_h + 1;
    slots = span < s.out_h ? span : s.out_h;
  }

  bool parity;
  int block;
  int64_t origin;     // i of position 0
  int64_t positions;  // of an input row
  int64_t margin;     // dy columns before the one that position 0 pairs with tap 0
  int64_t spread;     // dy columns from one output to the next
  int64_t dy_width;   // columns of a dy row; output q lies in column q * spread - dy_origin
  int64_t dy_origin;
  int64_t slots;

  size_t floats(int64_t pitch) const {
    return RowCache::floats(slots, dy_width * pitch) + size_t(2 * positions * pitch);
  }
};

constexpr int64_t kBackwardFloats = 48 * 1024;       // what a unit's rows may take: a fifth of a 1 MB L2
constexpr int64_t kItemPixels = 4096;                // input pixels that a unit takes at a time
constexpr int64_t kPartialFloats = 8 * 1024 * 1024;  // of dw over all tasks, where that leaves
constexpr int64_t kFewestTasks = 32;                 // this many

template <class T>
class Backward {
 public:
  explicit Backward(const DepthwiseBackward& p) : p_(p), s_(p.shape), plan_(p.shape), m_(p.shape.multiplier) {
    streamed_ = can_stream(static_cast<const T*>(p.output.dx), p.output.dx_ld,
                           s_.images * s_.in_h * s_.in_w * s_.channels * int64_t(sizeof(T)));
    const int64_t per_channel = int64_t(plan_.floats(1)) * m_;
    const int64_t most = kBackwardFloats / per_channel / 16 * 16;
    block_ = round_up(ceil_div(s_.channels, ceil_div(s_.channels, most < 16 ? 16 : most)), 16);
    blocks_ = ceil_div(s_.channels, block_);
    pitch_ = block_ * m_;
    wide_ = blocks_ * pitch_;
    const int64_t rows = kItemPixels / s_.in_w;
    chunks_ = ceil_div(s_.in_h, rows < 1 ? 1 : rows);
    const int64_t items = s_.images * chunks_, fit = kPartialFloats / (s_.taps() * wide_);
    const int64_t most_tasks = fit > kFewestTasks ? fit : kFewestTasks;
    tasks_ = items < most_tasks ? items : most_tasks;
  }

  void run() {
    AlignedBuffer<float> weight(size_t(s_.taps() * wide_));
    AlignedBuffer<float> dw(size_t(tasks_ * s_.taps() * wide_));
    AlignedBuffer<float> sums(p_.output.sums ? size_t(tasks_ * 2 * blocks_ * block_) : 1);
    weight_ = weight.data();
    dw_ = dw.data();
    sums_ = p_.output.sums ? sums.data() : nullptr;
    pack_depthwise_weight(s_, p_.weight, 0, s_.out_channels(), wide_, weight_);
    parallel_for(tasks_ * blocks_, [&](int64_t unit) {
      walk(unit / blocks_, unit % blocks_);
      if (streamed_) finish_streaming();
    });
    if (p_.output.dw) merge_weights();
    if (sums_) merge_sums(sums_, tasks_, s_.channels, blocks_ * block_, p_.output.sums);
  }

 private:
  struct Unit {
    int64_t k0, count;   // input channels
    int64_t pitch;       // floats between positions
    float *dy, *a, *dx;  // rows
    float *dw, *sums;
    NextRows next;  // at the unit's first channel
  };

  void walk(int64_t task, int64_t block) const {
    Unit u;
    u.k0 = block * block_;
    u.count = s_.channels - u.k0 < block_ ? s_.channels - u.k0 : block_;
    u.pitch = pitch_;
    u.a = thread_scratch(plan_.floats(pitch_));
    u.dx = u.a + plan_.positions * pitch_;
    u.dy = u.dx + plan_.positions * pitch_;
    u.dw = dw_ + task * s_.taps() * wide_ + block * pitch_;
    u.sums = sums_ ? sums_ + task * 2 * blocks_ * block_ + u.k0 : nullptr;
    for (int t = 0; t < s_.taps(); ++t) std::memset(u.dw + t * wide_, 0, size_t(pitch_) * sizeof(float));
    for (int half = 0; u.sums && half < 2; ++half)
      std::memset(u.sums + half * blocks_ * block_, 0, size_t(block_) * sizeof(float));
    std::memset(u.a, 0, size_t(plan_.positions * pitch_) * sizeof(float));
    const int64_t items = s_.images * chunks_;
    for (int64_t item = items * task / tasks_; item < items * (task + 1) / tasks_; ++item)
      walk_rows(u, item / chunks_, item % chunks_);
  }

  void walk_rows(Unit u, int64_t image, int64_t chunk) const {
    RowCache cache(plan_.slots, plan_.dy_width * pitch_, u.dy);
    const auto fill = [&](int64_t p, float* row) { fill_dy(u, image, p, row); };
    for (int64_t h = s_.in_h * chunk / chunks_; h < s_.in_h * (chunk + 1) / chunks_; ++h) {
      const T* x = static_cast<const T*>(p_.input.x.data) + (image * s_.in_h + h) * s_.in_w * p_.input.x.ld;
      if (p_.output.dw)
        fill_span(m_, x, p_.input.x.ld, s_.in_w, p_.input.affine, u.k0 * m_, u.count * m_, pitch_,
                  u.a + (s_.pad_w - plan_.origin) * pitch_);
      const float* dy[kMostKernelRows];
      int taps[kMostKernelRows], rows = 0;
      for (int r = 0; r < s_.kernel_h; ++r) {
        const int64_t at = h + s_.pad_h - int64_t(r) * s_.dilation_h;
        if (at < 0 || at % s_.stride_h || at / s_.stride_h >= s_.out_h) continue;
        dy[rows] = cache.row(at / s_.stride_h, fill);
        taps[rows++] = r;
      }
      u.next = after(u, image, h);
      if (rows == 0) std::memset(u.dx, 0, size_t(plan_.positions * pitch_) * sizeof(float));
      for (int64_t c = 0; c < round_up(u.count * m_, kLanes); c += kLanes) stencil(u, dy, taps, rows, c);
      if (p_.output.dx) store_dx(u, x, (image * s_.in_h + h) * s_.in_w);
    }
  }

  NextRows after(const Unit& u, int64_t image, int64_t h) const {
    NextRows next{};
    if (m_ > 1 || h + 1 >= s_.in_h) return next;
    const auto at = [&](const void* data, int64_t ld, int64_t pixel) {
      return data ? static_cast<const char*>(data) + (pixel * ld + u.k0) * int64_t(sizeof(T)) : nullptr;
    };
    const int64_t pixel = (image * s_.in_h + h + 1) * s_.in_w, p = h + 1 + s_.pad_h;
    next.x = at(p_.input.x.data, p_.input.x.ld, pixel);
    if (!streamed_) next.dx = at(p_.output.dx, p_.output.dx_ld, pixel);
    next.x_step = p_.input.x.ld * int64_t(sizeof(T));
    next.dx_step = p_.output.dx_ld * int64_t(sizeof(T));
    if (p % s_.stride_h || p / s_.stride_h >= s_.out_h) return next;
    const int64_t out_pixel = (image * s_.out_h + p / s_.stride_h) * s_.out_w;
    next.grad = at(p_.gradient.grad.data, p_.gradient.grad.ld, out_pixel);
    next.y = at(p_.gradient.y.data, p_.gradient.y.ld, out_pixel);
    next.grad_step = p_.gradient.grad.ld * int64_t(sizeof(T));
    next.y_step = p_.gradient.y.ld * int64_t(sizeof(T));
    return next;
  }

  NextRows next_rows(const Unit& u, int64_t c) const {
    NextRows next = u.next;
    const auto advance = [&](const char*& p) {
      if (p) p += c * int64_t(sizeof(T));
    };
    advance(next.x);
    advance(next.dx);
    advance(next.grad);
    advance(next.y);
    return next;
  }

  // All taps of one input row for channels [c, c + kLanes).
  void stencil(const Unit& u, const float* const* dy, const int* taps, int rows, int64_t c) const {
    if (s_.kernel_w == 3 && s_.dilation_w == 1) {
      for (int r = 0; r < rows; r += kRowsAtOnce)
        run_rows(u, dy + r, taps + r, rows - r < kRowsAtOnce ? rows - r : kRowsAtOnce, c, r == 0);
      return;
    }
    for (int r = 0; r < rows; ++r) {
      if (plan_.parity && s_.kernel_w == 5)
        run<1, 5, 2, kParityPositions>(u, dy + r, taps + r, 0, c, r == 0);
      else if (plan_.parity)
        run<1, 7, 2, kParityPositions>(u, dy + r, taps + r, 0, c, r == 0);
      else
        for (int s = 0; s < s_.kernel_w;) s += run_chunk(u, dy + r, taps + r, s, c, r == 0 && s == 0);
    }
  }

  // Kernels three wide: several rows at once share the loads of a and the traffic of dx.
  void run_rows(const Unit& u, const float* const* dy, const int* taps, int count, int64_t c,
                bool first) const {
    const auto run_count = [&](auto rows) {
      if (plan_.parity)
        run<rows(), 3, 2, kParityPositions>(u, dy, taps, 0, c, first);
      else
        run<rows(), 3, 1, kPositions>(u, dy, taps, 0, c, first);
    };
    if (count == 1) run_count(std::integral_constant<int, 1>());
    if (count == 2) run_count(std::integral_constant<int, 2>());
    if (count == 3) run_count(std::integral_constant<int, 3>());
  }

  // As many taps of a wide or dilated kernel row as one pass takes, from tap s on; returns how many.
  int run_chunk(const Unit& u, const float* const* dy, const int* taps, int s, int64_t c, bool first) const {
    const int left = s_.dilation_w == 1 ? s_.kernel_w - s : 1;
    if (left >= 7) return run<1, 7, 1, kPositions>(u, dy, taps, s, c, first);
    if (left >= 5) return run<1, 5, 1, kPositions>(u, dy, taps, s, c, first);
    if (left >= 3) return run<1, 3, 1, kPositions>(u, dy, taps, s, c, first);
    return run<1, 1, 1, kPositions>(u, dy, taps, s, c, first);
  }

  template <int kRows, int kTaps, int kStride, int kBlock>
  int run(const Unit& u, const float* const* dy, const int* taps, int s, int64_t c, bool first) const {
    Taps<kRows> t;
    t.step = wide_;
    const int64_t column = kStride == 2 ? 0 : plan_.margin - int64_t(s + kTaps - 1) * s_.dilation_w;
    for (int r = 0; r < kRows; ++r) {
      const int64_t tap = int64_t(taps[r]) * s_.kernel_w + s;
      t.dy[r] = dy[r] + column * pitch_ + c;
      t.weight[r] = weight_ + tap * wide_ + (u.dw - dw_) % wide_ + c;
      t.dw[r] = u.dw + tap * wide_ + c;
    }
    NextRows next{};
    if (first) next = next_rows(u, c);
    backward_row<kRows, kTaps, kStride, kBlock>(t, next, pitch_, u.a + c, u.dx + c, plan_.positions, first);
    return kTaps;
  }

  void fill_dy(const Unit& u, int64_t image, int64_t p, float* row) const {
    const int64_t row_pixels = plan_.dy_width, spread = plan_.spread;
    // Outputs whose column q * spread - dy_origin lies in the row.
    const int64_t begin = plan_.dy_origin <= 0 ? 0 : ceil_div(plan_.dy_origin, spread);
    const int64_t limit =
        row_pixels + plan_.dy_origin <= 0 ? 0 : ceil_div(row_pixels + plan_.dy_origin, spread);
    const int64_t end = limit < s_.out_w ? limit : s_.out_w;
    const int64_t left = begin * spread - plan_.dy_origin, right = left + (end - begin);
    if (spread > 1 || end <= begin) {
      std::memset(row, 0, size_t(row_pixels * pitch_) * sizeof(float));
      if (end <= begin) return;
    } else {
      std::memset(row, 0, size_t(left * pitch_) * sizeof(float));
      std::memset(row + right * pitch_, 0, size_t((row_pixels - right) * pitch_) * sizeof(float));
    }
    const int64_t pixel = (image * s_.out_h + p) * s_.out_w + begin;
    const GradientPrologue& g = p_.gradient;
    with_activation(g.y.data ? g.affine.act : kNone, [&](auto act) {
      const auto fill = g.y.data && g.coef ? fill_gradient<T, act(), true> : fill_gradient<T, act(), false>;
      fill(g, s_.out_channels(), pixel, end - begin, u.k0 * m_, u.count * m_, row + left * pitch_,
           spread * pitch_);
    });
  }

  void store_dx(const Unit& u, const T* x, int64_t pixel) const {
    float* dx = u.dx + (s_.pad_w - plan_.origin) * pitch_;
    if (m_ > 1) sum_over_multiplier(u, dx);
    T* out = static_cast<T*>(p_.output.dx) + pixel * p_.output.dx_ld + u.k0;
    with_activation(p_.input.affine.act, [&](auto act) {
      const auto put =
          u.sums
              ? (streamed_ ? store_gradient<T, act(), true, true> : store_gradient<T, act(), true, false>)
              : (streamed_ ? store_gradient<T, act(), false, true> : store_gradient<T, act(), false, false>);
      put(p_.input, x, dx, pitch_, out, p_.output.dx_ld, s_.in_w, u.k0, u.count, u.sums, blocks_ * block_);
    });
  }

  // In place: input channel k is read by output channels [k * m, (k + 1) * m).
  void sum_over_multiplier(const Unit& u, float* dx) const {
    for (int64_t w = 0; w < s_.in_w; ++w, dx += pitch_)
      for (int64_t k = 0; k < u.count; ++k) {
        float total = dx[k * m_];
        for (int64_t j = 1; j < m_; ++j) total += dx[k * m_ + j];
        dx[k] = total;
      }
  }

  // [task][tap][wide] to [channel][tap], in double and in the tasks' order.
  void merge_weights() const {
    const int64_t taps = s_.taps(), channels = s_.out_channels();
    parallel_for(taps, [&](int64_t t) {
      AlignedBuffer<double> total{size_t(channels)};
      for (int64_t c = 0; c < channels; ++c) total[c] = 0;
      for (int64_t task = 0; task < tasks_; ++task) {
        const float* part = dw_ + (task * taps + t) * wide_;
        for (int64_t c = 0; c < channels; ++c) total[c] += part[c];
      }
      for (int64_t c = 0; c < channels; ++c) p_.output.dw[c * taps + t] = float(total[c]);
    });
  }

  const DepthwiseBackward& p_;
  const DepthwiseShape& s_;
  const BackwardPlan plan_;
  const int64_t m_;
  int64_t block_, blocks_, pitch_, wide_, chunks_, tasks_;
  bool streamed_;
  float *weight_, *dw_, *sums_;
};

void depthwise_backward(const DepthwiseBackward& p) {
  by_dtype(p.shape.dtype, &Kernels::depthwise_backward, p, [&](auto t) { Backward<decltype(t)>(p).run(); });
}

}  // namespace

namespace FASTCNN_ISA {
void register_depthwise_backward(Kernels& k) { k.depthwise_backward = depthwise_backward; }
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
