// The weight gradient of a dense k x k convolution, reduced over pixels line by line: dW[n, tap, c] += dy^T
// x, with x addressed in stripes and never copied per tap.
#pragma once

#include "cpu/conv_stripes.h"
#include "cpu/prologue.h"

namespace fastcnn {
namespace {

// A unit of work owns dW for kUnitOutputs output channels and as many input channels as keep it in a third of
// L2.
constexpr int64_t kUnitOutputs = 64, kUnitGradientBytes = 300 * 1024, kMostUnitChannels = 128;
constexpr int64_t kBandBytes = 384 * 1024;
// Enough units for many threads; fixed, so that sums do not depend on how many there are.
constexpr int64_t kLeastUnits = 16;

#if FASTCNN_ISA_LEVEL >= 4
constexpr int64_t kReductionStep = kTileWords;
// Configuring the tiles waits for the products before it, 0.1 to 0.5 us: once per unit of work.
template <class Words>
using SessionOf = std::conditional_t<kHasTiles<Words>, TileSession, int>;
#else
constexpr int64_t kReductionStep = 1;
template <class Words>
using SessionOf = int;
#endif

// The output lines of a band as words of the reduction: each by itself, in bf16 also the line after it,
// unless the band or the image ends there.
template <class Words>
class WordLines {
 public:
  WordLines(int64_t first, int64_t last, int64_t image_lines)
      : firsts_(size_t(last - first)), image_lines_(image_lines), last_(last) {
    for (int64_t line = first; line < last; line += paired(line) ? 2 : 1) firsts_[size_t(count_++)] = line;
  }

  int64_t count() const { return count_; }
  int64_t first(int64_t word) const { return firsts_[size_t(word)]; }
  bool paired(int64_t line) const {
    return Words::kPerWord == 2 && line + 1 < last_ && line % image_lines_ != image_lines_ - 1;
  }

 private:
  mutable AlignedBuffer<int64_t> firsts_;
  int64_t image_lines_, last_, count_ = 0;
};

// Pixels of dy as words of the reduction: [panel][word line][column], channels [n0, n0 + count). A panel
// holds the channels of a microtile, which then reads it in order; for AMX each 16 columns of a panel lie
// channel by channel, as its A tiles want them.
template <class Words>
class DyTile {
 public:
#if FASTCNN_ISA_LEVEL >= 4
  static constexpr bool kTiles = kHasTiles<Words>;
  static constexpr int64_t kPanelRows = kTiles ? kAmxBlock : kMicroRows, kPitch = kTiles ? kAmxBlock : 16;
#else
  static constexpr bool kTiles = false;
  // kPitch: words between the pixels of a panel.
  static constexpr int64_t kPanelRows = kMicroRows, kPitch = (kMicroRows + 7) / 8 * 8;
#endif

  // AMX reduces over kReductionStep pixels at a time: a line is padded with zeros to whole steps.
  explicit DyTile(int64_t columns)
      : columns_(columns), line_(kTiles ? round_up(columns, kReductionStep) : columns) {}

  // At most: no line may find a partner.
  int64_t floats(int64_t lines) const {
    return ceil_div(kUnitOutputs, kPanelRows) * lines * line_ * kPitch + kLanes;
  }
  int64_t line_pixels() const { return line_; }
  // The panel of channels [n, n + kPanelRows).
  const float* line(int64_t word, int64_t n) const {
    return data_ + (n / kPanelRows * lines_ + word) * line_ * kPitch;
  }

  template <class Column>
  void fill(float* data, const WordLines<Words>& lines, int64_t count, const Column& column) {
    data_ = data;
    lines_ = lines.count();
    alignas(64) float pixels[kStep][kRun];
    for (int64_t word = 0; word < lines_; ++word) {
      const int64_t line = lines.first(word);
      const bool paired = lines.paired(line);
      for (int64_t q = 0; q < line_; q += kStep) {
        const int64_t present = columns_ - q < kStep ? columns_ - q : kStep;
        for_rows(present, [&](int64_t first, auto group) {
          for_vectors(count, [&](int64_t c, auto whole) {
            const auto value = column(c);
            for (int64_t i = first; i < first + group; ++i) {
              const int64_t pixel = line * columns_ + q + i;
              put(pixels[i] + c, value(pixel, whole), paired ? value(pixel + columns_, whole) : zero());
            }
          });
        });
        deal(pixels, present, count, word, q);
      }
    }
  }

 private:
  static constexpr int64_t kStep = 16, kRun = kUnitOutputs + 2 * kLanes;

  static void put(float* at, V low, [[maybe_unused]] V high) {
    if constexpr (Words::kPerWord == 1) store(at, low);
#if FASTCNN_ISA_LEVEL >= 3
    else
      store_pairs(at, low, high);
#endif
  }

  // A step's pixels to their panels.
  void deal(const float (*pixels)[kRun], int64_t present, int64_t count, int64_t word, int64_t q) {
    for (int64_t n = 0; n < count; n += kPanelRows) {
      float* to = data_ + ((n / kPanelRows * lines_ + word) * line_ + q) * kPitch;
      if constexpr (kTiles) {
        for (int64_t c = 0; c < kPanelRows && n + c < count; c += kLanes) {
          V rows[kLanes];
          for (int64_t i = 0; i < kLanes; ++i) rows[i] = i < present ? load(pixels[i] + n + c) : zero();
          transpose(rows);
          for (int64_t i = 0; i < kLanes; ++i) store(to + (c + i) * kStep, rows[i]);
        }
      } else {
        // By whole vectors: what follows overwrites the rest.
        for (int64_t i = 0; i < present; ++i)
          for (int64_t c = 0; c < kPanelRows; c += kLanes)
            store(to + i * kPitch + c, load(pixels[i] + n + c));
      }
    }
  }

  int64_t columns_, line_, lines_ = 0;
  float* data_ = nullptr;
};

template <class Words, int kRows, int kVectors>
void wgrad_microtile(int rows, const float* const* a, const float* const* b, int64_t lines, int64_t pixels,
                     int64_t b_step, float* dw, int64_t pitch, bool accumulate) {
  if constexpr (kRows > 1)
    if (rows < kRows)
      return wgrad_microtile<Words, kRows - 1, kVectors>(rows, a, b, lines, pixels, b_step, dw, pitch,
                                                         accumulate);
  V acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = accumulate ? load(dw + r * pitch + v * kLanes) : zero();
  for (int64_t line = 0; line < lines; ++line)
    accumulate_products<Words, kRows, kVectors, 1, DyTile<Words>::kPitch>(acc, a[line], b[line], b_step,
                                                                          kLanes, pixels);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(dw + r * pitch + v * kLanes, acc[r][v]);
}

template <class T>
class ConvWeightGradient {
 public:
  using Words = typename WordsOf<T>::type;

  explicit ConvWeightGradient(const Conv2dBackward& p)
      : p_(p),
        s_(p.shape),
        shape_(forward_stripe(s_)),
        channels_(unit_channels()),
        c_blocks_(ceil_div(s_.channels, channels_)),
        n_blocks_(ceil_div(s_.n, kUnitOutputs)),
        pitch_(round_up(s_.channels, kLanes)),
        chunks_(chunks_of(n_blocks_ * c_blocks_)),
        dy_(s_.out_w),
        stripe_(shape_, channels_, dy_.line_pixels()) {}

  void run() {
    AlignedBuffer<float> dw(size_t(chunks_ * s_.n * s_.taps() * pitch_));
    dw_ = dw.data();
    const int64_t blocks = n_blocks_ * c_blocks_;
    parallel_for(chunks_ * blocks, [&](int64_t unit) {
      const int64_t block = unit % blocks;
      walk(unit / blocks, block / c_blocks_, block % c_blocks_);
    });
    merge();
  }

 private:
  int64_t unit_channels() const {
    constexpr int64_t kStep = kMicroVectors * kLanes;
    const int64_t fit = kUnitGradientBytes / 4 / (kUnitOutputs * s_.taps()) / kStep * kStep;
    int64_t most = fit < kStep ? kStep : fit > kMostUnitChannels ? kMostUnitChannels : fit;
    while (most > kStep && traffic(most / 2) < traffic(most)) most = round_up(most / 2, kStep);
    return near_equal(most);
  }
  int64_t near_equal(int64_t most) const {
    return round_up(ceil_div(s_.channels, ceil_div(s_.channels, most)), kLanes);
  }
  int64_t chunks_of(int64_t blocks) const {
    const int64_t wanted = ceil_div(kLeastUnits, blocks), lines = shape_.total_lines();
    return wanted < lines ? wanted : lines;
  }
  // Words that units of so many channels write: operands, again for every block that reads them, and one dW
  // per chunk, which is read again when they are merged.
  int64_t traffic(int64_t channels) const {
    const int64_t n_blocks = ceil_div(s_.n, kUnitOutputs),
                  c_blocks = ceil_div(s_.channels, near_equal(channels));
    return s_.pixels() * (s_.channels * n_blocks + s_.n * c_blocks) / Words::kPerWord +
           2 * chunks_of(n_blocks * c_blocks) * s_.n * s_.taps() * s_.channels;
  }

  // dW of one block over one chunk of lines.
  void walk(int64_t chunk, int64_t n_block, int64_t c_block) const {
    const int64_t lines = shape_.total_lines(), begin = lines * chunk / chunks_,
                  end = lines * (chunk + 1) / chunks_;
    const int64_t n0 = s_.n * n_block / n_blocks_, n1 = s_.n * (n_block + 1) / n_blocks_;
    const int64_t c0 = c_block * channels_,
                  count = s_.channels - c0 < channels_ ? s_.channels - c0 : channels_;
    const LineUnits bands(shape_, stripe_.slot_floats() * 4, kBandBytes, begin, end);
    Stripe<Words> stripe = stripe_;
    DyTile<Words> dy = dy_;
    stripe.hold(bands.longest());
    const size_t stripe_floats = size_t(round_up(stripe.floats(bands.longest()), 16));
    float* memory = thread_scratch(stripe_floats + size_t(dy.floats(bands.longest())));
    [[maybe_unused]] const SessionOf<Words> session{};
    for (int64_t band = 0; band < bands.count; ++band) {
      const int64_t first = bands.first(band), last = bands.first(band + 1);
      const WordLines<Words> lines(first, last, s_.out_h);
      with_prologue(p_.input.affine, [&](const auto& pre) {
        stripe.fill_reduction(memory, first, last, count, [&](int64_t c) {
          return input_column<T>(p_.input.x, pre, c0 + c, s_.channels);
        });
      });
      with_gradient<T>(p_.gradient, s_.n, [&](const auto& gradient) {
        dy.fill(memory + stripe_floats, lines, n1 - n0, [&](int64_t c) { return gradient.at(n0 + c); });
      });
      accumulate(lines, n1 - n0, count, stripe, dy, gradient_at(chunk, n0, 0, c0), band > 0);
    }
  }

  // dw (+)= the band's share of outputs x taps x channels.
  void accumulate(const WordLines<Words>& lines, int64_t outputs, int64_t channels,
                  const Stripe<Words>& stripe, const DyTile<Words>& dy, float* dw, bool add) const {
    AlignedBuffer<const float*> a(size_t(lines.count())), b(size_t(lines.count()));
    for (int kh = 0; kh < s_.kernel_h; ++kh)
      for (int kw = 0; kw < s_.kernel_w; ++kw, dw += pitch_) {
        const int64_t tap = stripe.tap(int64_t(kh) * s_.dilation_h, int64_t(kw) * s_.dilation_w);
        for (int64_t c = 0; c < channels; c += kMicroVectors * kLanes) {
          for (int64_t word = 0; word < lines.count(); ++word)
            b[size_t(word)] = stripe.line(lines.first(word)) + tap + c;
          for (int64_t n = 0; n < outputs; n += kPieceRows) {
            for (int64_t word = 0; word < lines.count(); ++word) a[size_t(word)] = dy.line(word, n);
            multiply(outputs - n < kPieceRows ? outputs - n : kPieceRows, channels - c > kLanes, a.data(),
                     b.data(), lines.count(), dy.line_pixels(), stripe.column_step(),
                     dw + n * row_floats() + c, add);
          }
        }
      }
  }

  static constexpr int64_t kPieceRows = DyTile<Words>::kPanelRows;

  void multiply(int64_t rows, bool both, const float* const* a, const float* const* b, int64_t lines,
                int64_t pixels, int64_t b_step, float* dw, bool add) const {
#if FASTCNN_ISA_LEVEL >= 4
    if constexpr (Words::kPerWord == 2) return amx_multiply(rows, both, a, b, lines, pixels, b_step, dw, add);
#endif
    if (both)
      wgrad_microtile<Words, kMicroRows, kMicroVectors>(int(rows), a, b, lines, pixels, b_step, dw,
                                                        row_floats(), add);
    else
      wgrad_microtile<Words, kMicroRows, 1>(int(rows), a, b, lines, pixels, b_step, dw, row_floats(), add);
  }

#if FASTCNN_ISA_LEVEL >= 4
  void amx_multiply(int64_t rows, bool both, const float* const* a, const float* const* b, int64_t lines,
                    int64_t pixels, int64_t b_step, float* dw, bool add) const {
    with_block_shape(rows, both ? 2 : 1, [&](auto row_tiles, auto panel_tiles) {
      accumulate_block<row_tiles, panel_tiles>(rows, dw, row_floats(), add, [&] {
        for (int64_t line = 0; line < lines; ++line)
          for (int64_t q = 0; q < pixels; q += kTileWords)
            block_step<row_tiles, panel_tiles>(a[line] + q * kAmxBlock, kTileWords * 4, b[line] + q * b_step,
                                               b_step, kLanes);
      });
    });
  }
#endif

  int64_t row_floats() const { return s_.taps() * pitch_; }
  float* gradient_at(int64_t chunk, int64_t n, int64_t tap, int64_t c) const {
    return dw_ + (chunk * s_.n + n) * row_floats() + tap * pitch_ + c;
  }

  // The chunks' sums in their order, into the weight's own memory format.
  void merge() const {
    const Conv2dWeight& to = p_.dw_layout;
    parallel_for(s_.n, [&](int64_t n) {
      for (int kh = 0; kh < s_.kernel_h; ++kh)
        for (int kw = 0; kw < s_.kernel_w; ++kw) {
          float* out = p_.output.dw + n * to.stride_n + kh * to.stride_h + kw * to.stride_w;
          for (int64_t c = 0; c < s_.channels; c += kLanes) {
            V total = zero();
            for (int64_t chunk = 0; chunk < chunks_; ++chunk)
              total = add(total, load(gradient_at(chunk, n, kh * s_.kernel_w + kw, c)));
            if (to.stride_c == 1) {
              store_upto(out + c, total, s_.channels - c);
              continue;
            }
            alignas(64) float lanes[kLanes];
            store(lanes, total);
            for (int64_t i = 0; i < kLanes && c + i < s_.channels; ++i) out[(c + i) * to.stride_c] = lanes[i];
          }
        }
    });
  }

  const Conv2dBackward& p_;
  const Conv2dShape& s_;
  const StripeShape shape_;
  const int64_t channels_, c_blocks_, n_blocks_, pitch_, chunks_;
  const DyTile<Words> dy_;
  const Stripe<Words> stripe_;
  float* dw_ = nullptr;
};

}  // namespace
}  // namespace fastcnn
