// Depthwise convolution backward: dx and dw in one pass over dy and x.
//
// A unit of work walks down input rows of one block of channels. For input position i = w + pad_w and tap s it pairs
// dy at column (i - s * dilation) / stride with a = act(scale * x + shift) at w:
//   dx[w] += dy * weight[s],   dw[s] += dy * a[w]
// so that one loaded dy column serves both, and every (output, tap) with an input inside the image is met once. Rows
// of dy (gradient prologue applied) lie in a cache of fp32 rows, zero outside the output. Strides above 1 that have no
// kernel of their own read a dy row with zeros put between its columns, and are stride 1 from there on.
#include "cpu/depthwise_rows.h"
#include "cpu/kernels.h"
#include "cpu/lanes.h"

namespace fastcnn {
namespace {

// Positions of the input that a block computes; rows are padded to whole blocks. 16 registers hold less than 32.
#if FASTCNN_ISA_LEVEL >= 2
constexpr int kPositions = 7, kParityPositions = 8, kRowsAtOnce = 3;
#else
constexpr int kPositions = 4, kParityPositions = 4, kRowsAtOnce = 1;
#endif

// One vector of channels of kRows kernel rows against one input row. dy[r] points at the column that position 0 pairs
// with tap kTaps - 1; weight[r] and dw[r] at the first of kTaps taps.
template <int kRows>
struct Taps {
  const float* dy[kRows];
  const float* weight[kRows];
  float* dw[kRows];
  int64_t step;  // floats between taps of weight and dw
};

// kStride 2: position 0 has the parity of tap 0, so which taps a position sees is known when compiling.
template <int kRows, int kTaps, int kStride, int kBlock>
[[gnu::noinline]] void backward_row(Taps<kRows> taps, int64_t pitch, const float* a, float* dx, int64_t positions,
                                    bool first) {
  V dw[kRows][kTaps];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < kTaps; ++s) dw[r][s] = load(taps.dw[r] + s * taps.step);
  for (int64_t i = 0; i < positions; i += kBlock, a += kBlock * pitch, dx += kBlock * pitch) {
    V acc[kBlock], av[kBlock];
#pragma GCC unroll 8
    for (int b = 0; b < kBlock; ++b) {
      av[b] = load(a + b * pitch);
      acc[b] = first ? zero() : load(dx + b * pitch);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float* w = taps.weight[r];
      const float* dy = taps.dy[r];
      asm("" : "+r"(w));  // else all rows' taps are hoisted out of the loop and spilled
      V tap[kTaps];
#pragma GCC unroll 8
      for (int s = 0; s < kTaps; ++s) tap[s] = load(w + s * taps.step);
#pragma GCC unroll 16
      for (int j = 0; j <= (kBlock - 1 + kTaps - 1) / kStride; ++j) {
        const V column = load(dy);
        dy += pitch;
        asm("" : "+r"(dy));
#pragma GCC unroll 8
        for (int b = 0; b < kBlock; ++b) {
          const int s = b - kStride * j + kTaps - 1;
          if (s < 0 || s >= kTaps) continue;
          acc[b] = fmadd(column, tap[s], acc[b]);
          dw[r][s] = fmadd(column, av[b], dw[r][s]);
        }
      }
      taps.dy[r] += kBlock / kStride * pitch;
    }
#pragma GCC unroll 8
    for (int b = 0; b < kBlock; ++b) store(dx + b * pitch, acc[b]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < kTaps; ++s) store(taps.dw[r] + s * taps.step, dw[r][s]);
}

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

  size_t floats(int64_t pitch) const { return RowCache::floats(slots, dy_width * pitch) + size_t(2 * positions * pitch); }
};

constexpr int64_t kBackwardFloats = 48 * 1024;           // what a unit's rows may take: a fifth of a 1 MB L2
constexpr int64_t kItemPixels = 4096;                    // input pixels that a unit takes at a time
constexpr int64_t kPartialFloats = 8 * 1024 * 1024;      // of dw over all tasks, where that leaves
constexpr int64_t kFewestTasks = 32;                     // this many

// dy of one row of outputs, kPixels at a time; dst is `step` floats from pixel to pixel.
template <class T, int kPixels, int kAct, class Lanes>
inline void gradient_vector(const GradientPrologue& g, int64_t channels, int64_t pixel, int64_t c, float* dst,
                            int64_t step, const Lanes& lanes) {
  const T* grad = static_cast<const T*>(g.grad.data) + pixel * g.grad.ld + c;
  const T* y = static_cast<const T*>(g.y.data) + pixel * g.y.ld + c;
  const V scale = kAct && g.affine.scale ? lanes.get(g.affine.scale + c) : set(1.0f);
  const V shift = kAct && g.affine.shift ? lanes.get(g.affine.shift + c) : zero();
  V coef[4] = {set(1.0f), zero(), zero(), zero()};
  for (int k = 0; g.coef && k < 4; ++k) coef[k] = lanes.get(g.coef + k * channels + c);
#pragma GCC unroll 4
  for (int i = 0; i < kPixels; ++i) {
    const V value = lanes.get(y + i * g.y.ld);
    V dy = lanes.get(grad + i * g.grad.ld);
    if (kAct) dy = activate_grad(kAct, fmadd(value, scale, shift), dy);
    if (g.coef) dy = fmadd(coef[0], dy, fmadd(coef[1], sub(value, coef[2]), coef[3]));
    store(dst + i * step, dy);
  }
}

template <class T>
void fill_gradient(const GradientPrologue& g, int64_t channels, int64_t pixel, int64_t columns, int64_t c0, int64_t count,
                   float* dst, int64_t step) {
  GradientPrologue plain = g;  // without y there is nothing to undo: read grad in its place
  if (!g.y.data) plain = {g.grad, g.grad, {}, nullptr};
  with_activation(plain.affine.act, [&](auto act) {
    for_pixels(columns, [&](int64_t i, auto pixels) {
      for_lanes(count, [&](int64_t c, auto lanes) {
        gradient_vector<T, pixels(), act()>(plain, channels, pixel + i, c0 + c, dst + i * step + c, step, lanes);
      });
    });
  });
}

// One row of dx: masked by the input's prologue, summed, stored. The sums are [2][sums_pitch] of the unit.
template <class T, int kPixels, int kAct, class Lanes>
inline void store_vector(const BackwardInput& input, const T* x, const float* dx, int64_t pitch, T* out, int64_t out_ld,
                         int64_t c, float* sums, int64_t sums_pitch, const Lanes& lanes) {
  const V scale = kAct && input.affine.scale ? lanes.get(input.affine.scale + c) : set(1.0f);
  const V shift = kAct && input.affine.shift ? lanes.get(input.affine.shift + c) : zero();
  const V mean = sums && input.mean ? lanes.get(input.mean + c) : zero();
  V s0 = sums ? load(sums) : zero(), s1 = sums ? load(sums + sums_pitch) : zero();
#pragma GCC unroll 4
  for (int i = 0; i < kPixels; ++i) {
    V v = load(dx + i * pitch);
    if (kAct || sums) {
      const V value = lanes.get(x + i * input.x.ld);
      if (kAct) v = activate_grad(kAct, fmadd(value, scale, shift), v);
      s0 = add(s0, v);
      s1 = fmadd(v, sub(value, mean), s1);
    }
    lanes.put(out + i * out_ld, v);
  }
  if (!sums) return;
  store(sums, s0);
  store(sums + sums_pitch, s1);
}

template <class T>
class Backward {
 public:
  explicit Backward(const DepthwiseBackward& p) : p_(p), s_(p.shape), plan_(p.shape), m_(p.shape.multiplier) {
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
    parallel_for(tasks_ * blocks_, [&](int64_t unit) { walk(unit / blocks_, unit % blocks_); });
    if (p_.output.dw) merge_weights();
    if (sums_) merge_sums(sums_, tasks_, s_.channels, blocks_ * block_, p_.output.sums);
  }

 private:
  struct Unit {
    int64_t k0, count;    // input channels
    int64_t pitch;        // floats between positions
    float *dy, *a, *dx;   // rows
    float *dw, *sums;
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

  void walk_rows(const Unit& u, int64_t image, int64_t chunk) const {
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
      if (rows == 0) std::memset(u.dx, 0, size_t(plan_.positions * pitch_) * sizeof(float));
      for (int64_t c = 0; c < round_up(u.count * m_, kLanes); c += kLanes) stencil(u, dy, taps, rows, c);
      if (p_.output.dx) store_dx(u, x, (image * s_.in_h + h) * s_.in_w);
    }
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
  void run_rows(const Unit& u, const float* const* dy, const int* taps, int count, int64_t c, bool first) const {
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
    backward_row<kRows, kTaps, kStride, kBlock>(t, pitch_, u.a + c, u.dx + c, plan_.positions, first);
    return kTaps;
  }

  void fill_dy(const Unit& u, int64_t image, int64_t p, float* row) const {
    const int64_t row_pixels = plan_.dy_width, spread = plan_.spread;
    // Outputs whose column q * spread - dy_origin lies in the row.
    const int64_t begin = plan_.dy_origin <= 0 ? 0 : ceil_div(plan_.dy_origin, spread);
    const int64_t limit = row_pixels + plan_.dy_origin <= 0 ? 0 : ceil_div(row_pixels + plan_.dy_origin, spread);
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
    fill_gradient<T>(p_.gradient, s_.out_channels(), pixel, end - begin, u.k0 * m_, u.count * m_, row + left * pitch_,
                     spread * pitch_);
  }

  void store_dx(const Unit& u, const T* x, int64_t pixel) const {
    float* dx = u.dx + (s_.pad_w - plan_.origin) * pitch_;
    if (m_ > 1) sum_over_multiplier(u, dx);
    T* out = static_cast<T*>(p_.output.dx) + pixel * p_.output.dx_ld + u.k0;
    with_activation(p_.input.affine.act, [&](auto act) {
      for_pixels(s_.in_w, [&](int64_t w, auto pixels) {
        for_lanes(u.count, [&](int64_t c, auto lanes) {
          store_vector<T, pixels(), act()>(p_.input, x + w * p_.input.x.ld + u.k0 + c, dx + w * pitch_ + c, pitch_,
                                           out + w * p_.output.dx_ld + c, p_.output.dx_ld, u.k0 + c,
                                           u.sums ? u.sums + c : nullptr, blocks_ * block_, lanes);
        });
      });
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
  float *weight_, *dw_, *sums_;
};

void depthwise_backward(const DepthwiseBackward& p) {
  if (p.shape.dtype == kFloat32)
    Backward<float>(p).run();
  else
    Backward<bf16>(p).run();
}

}  // namespace

namespace FASTCNN_ISA {
void register_depthwise_backward(Kernels& k) { k.depthwise_backward = depthwise_backward; }
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
