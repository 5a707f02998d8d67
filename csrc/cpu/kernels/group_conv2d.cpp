// Convolution in groups of four or eight channels, forward and backward.
#include "cpu/by_dtype.h"
#include "cpu/conv_slices.h"
#include "cpu/conv_stripes.h"
#include "cpu/dx_sink.h"
#include "cpu/epilogue.h"
#include "cpu/group_stencil.h"
#include "cpu/kernels.h"

namespace fastcnn {
namespace {

constexpr int64_t kBlockChannels = 128;  // of a unit of work: whole cache lines of an NHWC input
constexpr int kMostOutputs = 14;         // divides the widths of most networks (112, 56, 28, 14)
constexpr int64_t kLeastUnits = 16;      // of the weight gradient, for any number of threads

// Packs the weight; transposed: of the data gradient, whose taps come in reverse.
void pack(const Conv2dShape& s, const Conv2dWeight& w, bool transposed, float* out) {
  const int64_t width = s.channels / s.groups;
  for (int64_t first = 0; first < s.channels; first += kLanes)
    for (int kh = 0; kh < s.kernel_h; ++kh)
      for (int64_t j = 0; j < width; ++j)
        for (int kw = 0; kw < s.kernel_w; ++kw, out += kLanes)
          for (int64_t i = 0; i < kLanes; ++i) {
            const int64_t own = first + i, other = own / width * width + j;
            const int64_t n = transposed ? other : own, c = (transposed ? own : other) % width;
            const int64_t h = transposed ? s.kernel_h - 1 - kh : kh,
                          v = transposed ? s.kernel_w - 1 - kw : kw;
            out[i] = own < s.channels ? weight_at(w, n, c, h, v) : 0.0f;
          }
}

void group_pack(const Conv2dShape& s, const Conv2dWeight& w, void* packed) {
  pack(s, w, false, static_cast<float*>(packed));
}

// A stencil over stripes of blocks of channels: units of lines times blocks.
class GroupStencil {
 public:
  using Lines = Stripe<FloatWords>;

  GroupStencil(const Conv2dShape& s, const StripeShape& shape, const float* weight)
      : s_(s),
        shape_(shape),
        weight_(weight),
        width_(s.channels / s.groups),
        block_(s.channels < kBlockChannels ? round_up(s.channels, kLanes) : kBlockChannels),
        blocks_(ceil_div(s.channels, block_)),
        stripe_(shape_, block_, shape.columns),
        units_(LineUnits(shape_, stripe_.slot_floats() * 4, kStripeBytes).shared()),
        lines_(size_t(s_.kernel_h)) {
    stripe_.hold(units_.longest());
    for (int kh = 0; kh < s_.kernel_h; ++kh) lines_[size_t(kh)] = stripe_.tap(int64_t(kh) * s_.dilation_h, 0);
  }

  int64_t units() const { return units_.count; }
  int64_t pitch() const { return blocks_ * block_; }
  int64_t first_pixel(int64_t unit) const { return units_.first(unit) * shape_.columns; }

  // column(c) reads the source; sink(unit) takes results from row 0, the unit's first pixel, on.
  template <class Column, class MakeSink>
  void run(const Column& column, const MakeSink& make_sink) const {
    parallel_for(units_.count * blocks_, [&](int64_t task) {
      const int64_t unit = task / blocks_, c0 = task % blocks_ * block_;
      const int64_t first = units_.first(unit), last = units_.first(unit + 1);
      const int64_t channels = s_.channels - c0 < block_ ? s_.channels - c0 : block_;
      Lines stripe = stripe_;
      stripe.fill(thread_scratch(size_t(stripe.floats(units_.longest()))), first, last, channels,
                  [&](int64_t c) { return column(c0 + c); });
      const auto sink = make_sink(unit);
      for (int64_t line = first; line < last; ++line)
        multiply_line(stripe, line, c0, channels, (line - first) * shape_.columns, sink);
    });
  }

 private:
  template <class Sink>
  void multiply_line(const Lines& stripe, int64_t line, int64_t c0, int64_t channels, int64_t row,
                     const Sink& sink) const {
    int64_t q = 0;
    const auto run = [&](auto outputs) {
      alignas(64) float c[decltype(outputs)::value * kBlockChannels];
      for (; q + outputs <= shape_.columns; q += outputs) {
        const float* x = stripe.line(line) + q * stripe.column_step();
        for (int64_t v = 0; v < channels; v += kLanes) multiply<outputs>(stripe, x + v, c0 + v, c + v);
        sink(c, kBlockChannels, row + q, outputs, c0, round_up(channels, kLanes));
      }
    };
    run(std::integral_constant<int, kMostOutputs>());
    run(std::integral_constant<int, kMostOutputs / 2>());
    run(std::integral_constant<int, 1>());
  }

  template <int kOutputs>
  void multiply(const Lines& stripe, const float* x, int64_t channel, float* c) const {
    const int64_t pitch = stripe.tap(0, 1);
    const float* weight = weight_ + channel / kLanes * s_.taps() * width_ * kLanes;
    if (shape_.stride_w == 1)
      group_outputs<1, kOutputs>(x, lines_.data(), pitch, s_.kernel_h, int(width_), weight, c,
                                 kBlockChannels);
    else
      group_outputs<2, kOutputs>(x, lines_.data(), pitch, s_.kernel_h, int(width_), weight, c,
                                 kBlockChannels);
  }

  const Conv2dShape& s_;
  const StripeShape& shape_;
  const float* weight_;
  const int64_t width_, block_, blocks_;
  Lines stripe_;
  const LineUnits units_;
  AlignedBuffer<int64_t> lines_;  // of the kernel's rows, in floats
};

template <class T>
void forward(const Conv2dForward& p) {
  const Conv2dShape& s = p.shape;
  const StripeShape shape = forward_stripe(s);
  const GroupStencil stencil(s, shape, static_cast<const float*>(p.packed_weight));
  const Epilogue& e = p.epilogue;
  const int64_t pitch = stencil.pitch();
  AlignedBuffer<float> statistics(e.mean ? size_t(stencil.units() * 3 * pitch) : 1);
  AlignedBuffer<StatisticsUnit> units(size_t(stencil.units()));
  for (int64_t unit = 0; unit < stencil.units(); ++unit) {
    float* sums = statistics.data() + (e.mean ? unit * 3 * pitch : 0);
    units[size_t(unit)] = {sums, sums + pitch, sums + 2 * pitch};
  }
  with_prologue(p.prologue, [&](const auto& pre) {
    stencil.run([&](int64_t c) { return input_column<T>(p.x, pre, c, s.channels); },
                [&](int64_t unit) {
                  return StoreSink<T>(e, s.n, stencil.first_pixel(unit),
                                      e.mean ? &units[size_t(unit)] : nullptr, true);
                });
  });
  const auto count = [&](int64_t unit) { return stencil.first_pixel(unit + 1) - stencil.first_pixel(unit); };
  if (e.mean) merge_statistics(statistics.data(), stencil.units(), count, s.n, pitch, e.mean, e.var);
}

template <class T>
void data_gradient(const Conv2dBackward& p) {
  const Conv2dShape& s = p.shape;
  const StripeShape shape = dgrad_stripe(s);
  AlignedBuffer<float> weight(size_t(group_weight_floats(s)));
  pack(s, p.weight, true, weight.data());
  const GroupStencil stencil(s, shape, weight.data());
  const int64_t pitch = stencil.pitch();
  AlignedBuffer<float> sums(p.output.sums ? size_t(stencil.units() * 2 * pitch) : 1);
  const DxTarget target{{s.images, s.in_h, s.in_w, s.in_h, s.in_w, 1, 1}, s.channels, p.input, p.output};
  with_gradient<T>(p.gradient, s.n, [&](const auto& gradient) {
    stencil.run([&](int64_t c) { return gradient.at(c); },
                [&](int64_t unit) {
                  return DxSink<T>(target, stencil.first_pixel(unit), pitch, sums.data() + unit * 2 * pitch,
                                   true);
                });
  });
  if (p.output.sums) merge_sums(sums.data(), stencil.units(), s.channels, pitch, p.output.sums);
}

template <class F>
void with_group(int64_t width, const F& f) {
  if constexpr (kLanes >= 8)
    if (width == 8) return f(std::integral_constant<int, 8>());
  f(std::integral_constant<int, 4>());
}

// dW of a block of channels over a chunk of lines, in bands that fit the cache.
template <class T>
class GroupWeightGradient {
 public:
  explicit GroupWeightGradient(const Conv2dBackward& p)
      : p_(p),
        s_(p.shape),
        shape_(forward_stripe(s_)),
        width_(s_.channels / s_.groups),
        block_(s_.channels < kBlockChannels ? round_up(s_.channels, kLanes) : kBlockChannels),
        blocks_(ceil_div(s_.channels, block_)),
        chunks_(chunk_count()),
        vector_floats_(s_.taps() * width_ * kLanes),
        stripe_(shape_, block_, s_.out_w),
        dy_shape_(dy_stripe()),
        dy_(dy_shape_, block_, s_.out_w) {}

  void run() {
    const int64_t total = group_weight_floats(s_);
    AlignedBuffer<float> parts(size_t(chunks_ * total));
    parallel_for(chunks_ * blocks_, [&](int64_t task) {
      walk(task / blocks_, task % blocks_ * block_, parts.data() + task / blocks_ * total);
    });
    merge(parts.data(), total);
  }

 private:
  int64_t chunk_count() const {
    const int64_t wanted = ceil_div(kLeastUnits, blocks_), lines = shape_.total_lines();
    return wanted < lines ? wanted : lines;
  }
  // The output's gradient, line by line, in floats.
  StripeShape dy_stripe() const {
    StripeShape t;
    t.images = s_.images;
    t.lines = t.source_h = s_.out_h;
    t.columns = t.source_w = s_.out_w;
    return t;
  }

  void walk(int64_t chunk, int64_t c0, float* part) const {
    const int64_t lines = shape_.total_lines(), begin = lines * chunk / chunks_,
                  end = lines * (chunk + 1) / chunks_;
    const int64_t channels = s_.channels - c0 < block_ ? s_.channels - c0 : block_;
    float* dw = part + c0 / kLanes * vector_floats_;
    std::memset(dw, 0, size_t(ceil_div(channels, kLanes) * vector_floats_) * sizeof(float));
    const LineUnits bands(shape_, (stripe_.slot_floats() + dy_.slot_floats()) * 4, kStripeBytes, begin, end);
    Stripe<FloatWords> stripe = stripe_, dy = dy_;
    stripe.hold(bands.longest());
    dy.hold(bands.longest());
    const size_t stripe_floats = size_t(stripe.floats(bands.longest()));
    float* memory = thread_scratch(stripe_floats + size_t(dy.floats(bands.longest())));
    for (int64_t band = 0; band < bands.count; ++band) {
      const int64_t first = bands.first(band), last = bands.first(band + 1);
      fill(first, last, c0, channels, stripe, memory, dy, memory + stripe_floats);
      for (int64_t v = 0; v < channels; v += kLanes)
        accumulate(first, last, v, stripe, dy, dw + v * vector_floats_ / kLanes);
    }
  }

  void fill(int64_t first, int64_t last, int64_t c0, int64_t channels, Stripe<FloatWords>& stripe,
            float* x_memory, Stripe<FloatWords>& dy, float* dy_memory) const {
    with_prologue(p_.input.affine, [&](const auto& pre) {
      stripe.fill(x_memory, first, last, channels,
                  [&](int64_t c) { return input_column<T>(p_.input.x, pre, c0 + c, s_.channels); });
    });
    with_gradient<T>(p_.gradient, s_.n, [&](const auto& gradient) {
      dy.fill(dy_memory, first, last, channels, [&](int64_t c) { return gradient.at(c0 + c); });
    });
  }

  void accumulate(int64_t first, int64_t last, int64_t channel, const Stripe<FloatWords>& stripe,
                  const Stripe<FloatWords>& dy, float* dw) const {
    for (int kh = 0; kh < s_.kernel_h; ++kh)
      for (int64_t line = first; line < last; ++line)
        with_group(width_, [&](auto group) {
          group_weight_row<group>(dy.line(line) + channel, dy.column_step(),
                                  stripe.line(line) + stripe.tap(int64_t(kh) * s_.dilation_h, 0) + channel,
                                  stripe.column_step(), stripe.tap(0, 1), s_.out_w,
                                  dw + kh * kGroupTaps * width_ * kLanes);
        });
  }

  // The chunks' sums in their order, into the weight's own memory format.
  void merge(const float* parts, int64_t total) const {
    const Conv2dWeight& to = p_.dw_layout;
    for (int64_t at = 0; at < total; ++at) {
      const int64_t n = at / vector_floats_ * kLanes + at % kLanes, rest = at % vector_floats_ / kLanes;
      if (n >= s_.n) continue;
      float sum = parts[at];
      for (int64_t chunk = 1; chunk < chunks_; ++chunk) sum += parts[chunk * total + at];
      const int64_t c = rest % width_, kw = rest / width_ % s_.kernel_w, kh = rest / width_ / s_.kernel_w;
      p_.output.dw[n * to.stride_n + c * to.stride_c + kh * to.stride_h + kw * to.stride_w] = sum;
    }
  }

  const Conv2dBackward& p_;
  const Conv2dShape& s_;
  const StripeShape shape_;
  const int64_t width_, block_, blocks_, chunks_, vector_floats_;
  const Stripe<FloatWords> stripe_;
  const StripeShape dy_shape_;
  const Stripe<FloatWords> dy_;
};

void group_forward(const Conv2dForward& p) {
  by_dtype(p.shape.dtype, &Kernels::group_forward, p, [&](auto t) { forward<decltype(t)>(p); });
}

void group_data_gradient(const Conv2dBackward& p) {
  by_dtype(p.shape.dtype, &Kernels::group_data_gradient, p, [&](auto t) { data_gradient<decltype(t)>(p); });
}

void group_weight_gradient(const Conv2dBackward& p) {
  by_dtype(p.shape.dtype, &Kernels::group_weight_gradient, p,
           [&](auto t) { GroupWeightGradient<decltype(t)>(p).run(); });
}

}  // namespace

namespace FASTCNN_ISA {
void register_group_conv2d(Kernels& k) {
  k.group_pack = group_pack;
  k.group_forward = group_forward;
  k.group_data_gradient = group_data_gradient;
  k.group_weight_gradient = group_weight_gradient;
}
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
