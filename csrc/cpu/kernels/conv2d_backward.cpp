// General convolution backward: dx as a product over the taps that reach each input pixel, with dy made on
// load, and dW reduced over pixels.
#include "cpu/by_dtype.h"
#include "cpu/conv_scatter.h"
#include "cpu/conv_slices.h"
#include "cpu/conv_stripes.h"
#include "cpu/conv_wgrad.h"
#include "cpu/dx_sink.h"
#include "cpu/group_stencil.h"
#include "cpu/kernels.h"
#include "cpu/patch_rows.h"
#include "cpu/product_forward.h"
#include "cpu/wgrad.h"

namespace fastcnn {
namespace {

// A block of AMX, or two microtiles of floats: the next results then find in L2 what they meet.
constexpr int64_t kRowsAhead = 32;

// A stride above 1 reads different taps for different input pixels. Pixels that read the same taps are a
// phase: the data gradient is one product per phase, over one stripe of dy for all of them.
template <class T, class Words>
class DataGradient {
 public:
  explicit DataGradient(const Conv2dBackward& p)
      : p_(p),
        s_(p.shape),
        phases_(s_.stride_h * s_.stride_w),
        shape_(dgrad_stripe(s_)),
        words_(reduction_words<Words>(s_.n)),
        stripe_(shape_, words_, shape_.columns),
        panels_(ceil_div(s_.channels, kLanes)),
        units_(LineUnits(shape_, stripe_.slot_floats() * 4, kStripeBytes).shared(least_units(panels_))),
        pitch_(panels_ * kLanes),
        packed_(size_t(s_.taps() * panels_ * words_ * kLanes) + 1),
        offsets_(size_t(s_.taps()) + 1) {
    stripe_.hold(units_.longest());
    int64_t tap = 0;
    for (int i = 0; i < phases_; ++i) {
      const DgradPhase phase = dgrad_phase(s_, i);
      pack(phase, packed_.data() + tap * panels_ * words_ * kLanes);
      for (int64_t t = 0; t < phase.taps(); ++t) {
        const int kh = phase.first_h + int(t / phase.taps_w) * phase.step_h;
        const int kw = phase.first_w + int(t % phase.taps_w) * phase.step_w;
        offsets_[size_t(tap++)] =
            stripe_.tap(dgrad_reach(phase.h, s_.pad_h, kh, s_.dilation_h, s_.stride_h) - shape_.low_h,
                        dgrad_reach(phase.w, s_.pad_w, kw, s_.dilation_w, s_.stride_w) - shape_.low_w);
      }
    }
  }

  void run() {
    const int64_t spans = units_.count * phases_, splits = column_splits(units_.count, panels_);
    AlignedBuffer<float> sums(p_.output.sums ? size_t(spans * 2 * pitch_) : 1);
    parallel_for(units_.count * splits, [&](int64_t task) {
      const int64_t unit = task / splits, split = task % splits;
      multiply(unit, panels_ * split / splits, panels_ * (split + 1) / splits,
               sums.data() + unit * phases_ * 2 * pitch_);
    });
    if (p_.output.sums) merge_sums(sums.data(), spans, s_.channels, pitch_, p_.output.sums);
  }

 private:
  void pack(const DgradPhase& phase, float* packed) const {
    const Conv2dWeight& w = p_.weight;
    MatrixSource m;
    m.k = s_.n;
    m.n = s_.channels;
    m.dtype = w.dtype;
    m.data = static_cast<const char*>(w.data) +
             (phase.first_h * w.stride_h + phase.first_w * w.stride_w) * bytes_of(w.dtype);
    m.stride_k = w.stride_n;
    m.stride_n = w.stride_c;
    m.taps_h = phase.taps_h;
    m.taps_w = phase.taps_w;
    m.stride_tap_h = phase.step_h * w.stride_h;
    m.stride_tap_w = phase.step_w * w.stride_w;
    if (phase.taps()) kernels().pack_matrix(m, Words::kPerWord == 1 ? kFloat32 : s_.dtype, packed);
  }

  void multiply(int64_t unit, int64_t first_panel, int64_t last_panel, float* sums) const {
    const int64_t first = units_.first(unit), last = units_.first(unit + 1);
    Stripe<Words> stripe = stripe_;
    float* memory = thread_scratch(size_t(stripe.floats(units_.longest())));
    with_gradient<T>(p_.gradient, s_.n, [&](const auto& gradient) {
      stripe.fill(memory, first, last, s_.n, [&](int64_t c) { return gradient.at(c); });
    });
    int64_t tap = 0;
    for (int i = 0; i < phases_; ++i) {
      const DgradPhase phase = dgrad_phase(s_, i);
      phase_product(phase, tap, first, last, first_panel, last_panel, stripe, sums + i * 2 * pitch_);
      tap += phase.taps();
    }
  }

  void phase_product(const DgradPhase& phase, int64_t first_tap, int64_t first, int64_t last,
                     int64_t first_panel, int64_t last_panel, const Stripe<Words>& stripe,
                     float* sums) const {
    if (p_.output.sums)
      for (int64_t half = 0; half < 2; ++half)
        for (int64_t c = first_panel * kLanes; c < last_panel * kLanes; ++c) sums[half * pitch_ + c] = 0;
    const DxTarget target = target_of(phase);
    const Taps taps{offsets_.data() + first_tap, phase.taps(), words_};
    const PackedView<Words> b(packed_.data() + first_tap * panels_ * words_ * kLanes,
                              phase.taps() * words_ * Words::kPerWord);
    const DxSink<T> sink =
        DxSink<T>(target, 0, pitch_, sums, false).fetching(kRowsAhead, first_panel * kLanes);
    for (int64_t panel = first_panel; panel < last_panel; panel += kMicroVectors) {
      const int64_t panels = last_panel - panel < kMicroVectors ? last_panel - panel : kMicroVectors;
      stripe.for_images(first, last, [&](int64_t line, int64_t count) {
        const int64_t image = line / shape_.lines, at = line % shape_.lines, rest = phase.lines - at;
        if (rest <= 0) return;
        const ImageLines lines{stripe.line(line), stripe.line_step(), count < rest ? count : rest,
                               phase.columns, (image * phase.lines + at) * phase.columns};
        multiply_lines(lines, stripe.column_step(), taps, b, panel, panels, sink);
      });
    }
  }

  DxTarget target_of(const DgradPhase& phase) const {
    DxTarget t{{s_.images, s_.in_h, s_.in_w, phase.lines, phase.columns, s_.stride_h, s_.stride_w},
               s_.channels,
               p_.input,
               p_.output};
    const int64_t pixel = int64_t(phase.h) * s_.in_w + phase.w;
    t.input.x = from_channel(t.input.x, pixel * t.input.x.ld, s_.dtype);
    t.output.dx = advanced(t.output.dx, pixel * t.output.dx_ld, s_.dtype);
    t.output.residual = from_channel(t.output.residual, pixel * t.output.residual.ld, s_.dtype);
    return t;
  }

  const Conv2dBackward& p_;
  const Conv2dShape& s_;
  const int phases_;
  const StripeShape shape_;
  const int64_t words_;
  Stripe<Words> stripe_;
  const int64_t panels_;
  const LineUnits units_;
  const int64_t pitch_;
  mutable AlignedBuffer<float> packed_;
  mutable AlignedBuffer<int64_t> offsets_;
};

constexpr int64_t kChunkPixels = 2048, kMostChunks = 64, kTilePixels = 112;

// dW where the input has few channels: whole patches are the columns of one product.
template <class T>
void weight_gradient_by_patches(const Conv2dBackward& p) {
  using Words = typename WordsOf<T>::type;
  const Conv2dShape& s = p.shape;
  const int64_t pixels = s.pixels(), k = s.taps() * s.channels, pitch = round_up(k, kMicroVectors * kLanes);
  // Fixed by the shape alone, so that any number of threads sums in one order.
  int64_t chunks = ceil_div(pixels, kChunkPixels);
  if (chunks > kMostChunks) chunks = kMostChunks;
  const int64_t chunk_rows = ceil_div(pixels, chunks);
  chunks = ceil_div(pixels, chunk_rows);
  AlignedBuffer<float> dw(size_t(chunks * s.n * pitch)), dense(size_t(s.n * k));
  parallel_for(chunks, [&](int64_t chunk) {
    const int64_t begin = chunk * chunk_rows, end = begin + chunk_rows < pixels ? begin + chunk_rows : pixels;
    const int64_t patch = patch_elements(s);
    AlignedBuffer<T> patches(size_t(kTilePixels * patch));
    PatchRows<T> rows(s, p.input.x, p.input.affine, padded_patch(s));
    for (int64_t first = begin; first < end; first += kTilePixels) {
      const int64_t count = end - first < kTilePixels ? end - first : kTilePixels;
      rows.write(first, count, patches.data(), patch);
      const WgradTile<Words> dy(thread_scratch(wgrad_floats<Words>(kTilePixels, s.n, k)), count, s.n);
      const WgradTile<Words> a(dy.end(), count, k);
      with_gradient<T>(p.gradient, s.n, [&](const auto& gradient) {
        dy.fill([&](int64_t row) { return first + row; }, [&](int64_t c) { return gradient.at(c); });
      });
      a.fill([&](int64_t row) { return row * patch; },
             [&](int64_t c) {
               return stored_column([at = patches.data() + c](int64_t row) { return load(at + row); });
             });
      accumulate_weight_gradient(dy, a, dw.data() + chunk * s.n * pitch, pitch, first > begin);
    }
  });
  merge_weight_gradients(dw.data(), chunks, s.n, k, pitch, dense.data());
  ConvSlices(s).scatter(dense.data(), 0, p.output.dw, p.dw_layout);
}

template <class T, class Words>
void data_gradient(const Conv2dBackward& p) {
  if (scatters_gradient<Words>(p.shape)) return ScatteredDataGradient<T, Words>(p).run();
  DataGradient<T, Words>(p).run();
}

template <class T>
void backward_dense(const Conv2dBackward& p) {
  // Few channels leave most of a vector idle whatever the words, and their two sums have few terms in which a
  // dy rounded to bf16 could average out.
  if (p.output.dx && p.shape.channels < kPatchChannels)
    data_gradient<T, FloatWords>(p);
  else if (p.output.dx)
    data_gradient<T, typename WordsOf<T>::type>(p);
  if (!p.output.dw) return;
  if (takes_patches(p.shape)) return weight_gradient_by_patches<T>(p);
  ConvWeightGradient<T>(p).run();
}

void backward_dense_of(const Conv2dBackward& p) {
  by_dtype(p.shape.dtype, &Kernels::conv2d_backward, p, [&](auto t) { backward_dense<decltype(t)>(p); });
}

// One slice of a grouped convolution; `weight`, `dw` and `sums` have room for it.
void backward_slice(const Conv2dBackward& p, const ConvSlices& slices, int64_t slice, float* weight,
                    float* dw, float* sums) {
  const Dtype dtype = p.shape.dtype;
  const int64_t c = slices.first_channel(slice), n = slices.first_output(slice),
                channels = slices.shape().channels;
  Conv2dBackward own = p;
  own.shape = slices.shape();
  own.gradient.grad = from_channel(p.gradient.grad, n, dtype);
  own.gradient.y = from_channel(p.gradient.y, n, dtype);
  own.gradient.affine = from_channel(p.gradient.affine, n);
  own.gradient.coef = advanced(p.gradient.coef, n);
  own.gradient.coef_ld = p.shape.n;
  own.input.x = from_channel(p.input.x, c, dtype);
  own.input.affine = from_channel(p.input.affine, c);
  own.input.mean = advanced(p.input.mean, c);
  own.output.dx = advanced(p.output.dx, c, dtype);
  own.output.residual = from_channel(p.output.residual, c, dtype);
  if (p.output.sums) own.output.sums = sums;
  if (p.output.dx) own.weight = slices.weight(p.weight, slice, weight);
  if (p.output.dw && slices.is_merged()) {
    own.output.dw = dw;
    own.dw_layout = slices.layout(nullptr);
  } else if (p.output.dw) {
    own.output.dw = p.output.dw + n * p.dw_layout.stride_n;
  }
  backward_dense_of(own);
  if (p.output.dw && slices.is_merged()) slices.scatter(dw, slice, p.output.dw, p.dw_layout);
  if (!p.output.sums) return;
  for (int64_t half = 0; half < 2; ++half)
    std::memcpy(p.output.sums + half * p.shape.channels + c, sums + half * channels,
                size_t(channels) * sizeof(float));
}

void backward_by_slices(const Conv2dBackward& p) {
  const ConvSlices slices(p.shape);
  AlignedBuffer<float> weight(size_t(slices.weight_floats())), dw(size_t(slices.weight_floats()));
  AlignedBuffer<float> sums(size_t(2 * slices.shape().channels));
  for (int64_t slice = 0; slice < slices.count(); ++slice)
    backward_slice(p, slices, slice, weight.data(), dw.data(), sums.data());
}

void conv2d_backward(const Conv2dBackward& p) {
  if (p.shape.groups == 1) return backward_dense_of(p);
  if (!takes_group_stencil(p.shape)) return backward_by_slices(p);
  if (p.output.dw) kernels().group_weight_gradient(p);
  if (!p.output.dx) return;
  if (p.shape.stride_h == 1 && p.shape.stride_w == 1) return kernels().group_data_gradient(p);
  Conv2dBackward dx = p;
  dx.output.dw = nullptr;
  backward_by_slices(dx);
}

}  // namespace

namespace FASTCNN_ISA {
void register_conv2d_backward(Kernels& k) { k.conv2d_backward = conv2d_backward; }
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
