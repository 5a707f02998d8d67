// General convolution forward on the matrix-product core: rows are addressed in stripes of the input; where
// it has few channels, in its lines or copied as patches.
#include "cpu/by_dtype.h"
#include "cpu/conv_slices.h"
#include "cpu/conv_stripes.h"
#include "cpu/epilogue.h"
#include "cpu/group_stencil.h"
#include "cpu/kernels.h"
#include "cpu/merged_taps.h"
#include "cpu/patch_rows.h"
#include "cpu/product_forward.h"

namespace fastcnn {
namespace {

// Patches are written where a product reads them, or copied there where its words are wider or lie in blocks.
template <class T>
void forward_by_patches(const Conv2dForward& p) {
  using Words = typename WordsOf<T>::type;
  const int64_t k = p.shape.taps() * p.shape.channels;
#if FASTCNN_ISA_LEVEL >= 4
  if constexpr (Words::kPerWord == 2) {
    product_forward<T, WholeRows>(
        p.shape.pixels(), k, p.shape.n, p.packed_weight, p.epilogue,
        [&](int64_t first, int64_t count, const WholeRows& a) {
          PatchRows<T> patches(p.shape, p.x, p.prologue, reduction_words<Words>(k) * 2);
          patches.write(first, count, reinterpret_cast<T*>(a.at(0, 0)), a.row_words() * 2);
        });
  } else
#endif
  {
    constexpr bool kSameWords = sizeof(T) * Words::kPerWord == sizeof(float);
    product_forward<T>(p.shape.pixels(), k, p.shape.n, p.packed_weight, p.epilogue,
                       [&](int64_t first, int64_t count, const TileWriter<Words>& a) {
                         PatchRows<T> patches(p.shape, p.x, p.prologue, padded_patch(p.shape));
                         if (kSameWords && k <= kBlockWords * Words::kPerWord)
                           return patches.write(first, count, reinterpret_cast<T*>(a.tile),
                                                kRowWords * Words::kPerWord);
                         AlignedBuffer<T> patch(size_t(patch_elements(p.shape)));
                         for (int64_t row = 0; row < count; ++row) {
                           patches.write(first + row, 1, patch.data(), 0);
                           for (int64_t c = 0; c < k; c += kLanes) a.put(row, c, load(patch.data() + c));
                         }
                       });
  }
}

template <class T>
class ForwardByLines {
 public:
  using Words = typename WordsOf<T>::type;

  explicit ForwardByLines(const Conv2dForward& p)
      : p_(p),
        s_(p.shape),
        shape_(forward_stripe(s_)),
        words_(reduction_words<Words>(s_.channels)),
        stripe_(shape_, words_, s_.out_w),
        panels_(ceil_div(s_.n, kLanes)),
        units_(LineUnits(shape_, stripe_.slot_floats() * 4, stripe_bytes()).shared(least_units(panels_))),
        b_(p.packed_weight, s_.taps() * words_ * Words::kPerWord),
        offsets_(size_t(s_.taps())) {
    stripe_.hold(units_.longest());
    for (int kh = 0; kh < s_.kernel_h; ++kh)
      for (int kw = 0; kw < s_.kernel_w; ++kw)
        offsets_[size_t(kh * s_.kernel_w + kw)] =
            stripe_.tap(int64_t(kh) * s_.dilation_h, int64_t(kw) * s_.dilation_w);
  }

  void run() {
    for_units(
        units_.count, [&](int64_t unit) { return units_.lines(unit) * s_.out_w; }, s_.n, p_.epilogue,
        [&](int64_t unit, int64_t first_panel, int64_t last_panel, const StatisticsUnit* sums) {
          multiply(unit, first_panel, last_panel, sums);
        });
  }

 private:
  void multiply(int64_t unit, int64_t first_panel, int64_t last_panel, const StatisticsUnit* sums) const {
    const int64_t first = units_.first(unit), last = units_.first(unit + 1);
    Stripe<Words> stripe = stripe_;
    float* memory = thread_scratch(size_t(stripe.floats(units_.longest()) + block_floats()));
    with_prologue(p_.prologue, [&](const auto& pre) {
      stripe.fill(memory, first, last, s_.channels,
                  [&](int64_t c) { return input_column<T>(p_.x, pre, c, s_.channels); });
    });
    const StoreSink<T> sink(p_.epilogue, s_.n, first * s_.out_w, sums, true);
    const Taps taps{offsets_.data(), s_.taps(), words_};
#if FASTCNN_ISA_LEVEL >= 4
    if constexpr (kHasTiles<Words>)
      if (in_blocks())
        return multiply_gathered(stripe, first, last, first_panel, last_panel,
                                 memory + stripe.floats(units_.longest()), sink);
#endif
    for (int64_t panel = first_panel; panel < last_panel; panel += kMicroVectors) {
      const int64_t panels = last_panel - panel < kMicroVectors ? last_panel - panel : kMicroVectors;
      if (in_blocks()) {
        multiply_in_blocks(stripe, first, last, panel, panels, memory + stripe.floats(units_.longest()),
                           sink);
        continue;
      }
      stripe.for_images(first, last, [&](int64_t line, int64_t count) {
        const ImageLines lines{stripe.line(line), stripe.line_step(), count, s_.out_w,
                               (line - first) * s_.out_w};
        multiply_lines(lines, stripe.column_step(), taps, b_, panel, panels, sink);
      });
    }
  }

  bool in_blocks() const { return kHasTiles<Words> ? gathers_rows(s_, words_) : blocks_taps(s_, words_); }
  int64_t stripe_bytes() const { return in_blocks() ? kLongStripeBytes : kStripeBytes; }
  int64_t block_floats() const {
    if (!in_blocks()) return 0;
    const int64_t rows = units_.longest() * s_.out_w, columns = kMicroVectors * kLanes;
    if (!kHasTiles<Words>) return rows * columns;
    return tile_floats<Words>(rows, block_of_taps() * words_) +
           ceil_div(panels_, kMicroVectors) * round_up(rows, 32) * columns;
  }
  int64_t block_of_taps() const { return words_ < kBlockOfTapsWords ? kBlockOfTapsWords / words_ : 1; }

  // All lines take a block of taps before the next one, with their sums in c.
  void multiply_in_blocks(const Stripe<Words>& stripe, int64_t first, int64_t last, int64_t panel,
                          int64_t panels, float* c, const StoreSink<T>& sink) const {
    constexpr int64_t kLd = kMicroVectors * kLanes;
    const int64_t block = block_of_taps();
    for (int64_t tap = 0; tap < s_.taps(); tap += block) {
      const Taps taps{offsets_.data() + tap, s_.taps() - tap < block ? s_.taps() - tap : block, words_};
      for (int64_t line = first; line < last; ++line)
        accumulate_line<Words>(stripe.line(line), stripe.column_step(), taps, s_.out_w,
                               b_.panel(panel) + tap * words_ * kLanes, b_.panel_stride(), panels,
                               c + (line - first) * s_.out_w * kLd, kLd, tap > 0);
    }
    for (int64_t line = 0; line < last - first; ++line)
      sink(c + line * s_.out_w * kLd, kLd, line * s_.out_w, s_.out_w, panel * kLanes, panels * kLanes);
  }

#if FASTCNN_ISA_LEVEL >= 4
  // The rows of all lines are gathered into an A tile, a block of taps at a time, with every panel's sums in
  // memory.
  void multiply_gathered(const Stripe<Words>& stripe, int64_t first, int64_t last, int64_t first_panel,
                         int64_t last_panel, float* memory, const StoreSink<T>& sink) const {
    const int64_t rows = (last - first) * s_.out_w, block = block_of_taps();
    const TileWriter<Words> a{memory, rows};
    float* sums = memory + tile_floats<Words>(rows, block * words_);
    const int64_t pair_floats = round_up(rows, kAmxBlock) * kAmxBlock;
    for (int64_t tap = 0; tap < s_.taps(); tap += block) {
      const Taps taps{offsets_.data() + tap, s_.taps() - tap < block ? s_.taps() - tap : block, words_};
      for (int64_t line = first; line < last; ++line)
        gather_line(stripe.line(line), stripe.column_step(), taps, s_.out_w, a, (line - first) * s_.out_w);
      float* c = sums;
      for (int64_t panel = first_panel; panel < last_panel; panel += kMicroVectors, c += pair_floats)
        amx_accumulate_tile(a, rows, b_.panel(panel) + tap * words_ * kLanes, b_.panel_stride(),
                            last_panel - panel < kMicroVectors ? 1 : kMicroVectors, taps.count * words_, c,
                            tap > 0);
    }
    for (int64_t panel = first_panel; panel < last_panel; panel += kMicroVectors, sums += pair_floats) {
      const int64_t panels = last_panel - panel < kMicroVectors ? 1 : kMicroVectors;
      for (int64_t row = 0; row < rows; row += kAmxBlock)
        sink(sums + row * kAmxBlock, kAmxBlock, row, rows - row < kAmxBlock ? rows - row : kAmxBlock,
             panel * kLanes, panels * kLanes);
    }
  }
#endif

  const Conv2dForward& p_;
  const Conv2dShape& s_;
  const StripeShape shape_;
  const int64_t words_;
  Stripe<Words> stripe_;
  const int64_t panels_;
  const LineUnits units_;
  const PackedView<Words> b_;
  mutable AlignedBuffer<int64_t> offsets_;
};

void forward_dense(const Conv2dForward& p) {
  by_dtype(p.shape.dtype, &Kernels::conv2d_forward, p, [&](auto t) {
#if FASTCNN_ISA_LEVEL >= 4
    if (merges_taps(p.shape)) return ForwardByMergedTaps(p).run();
#endif
    takes_patches(p.shape) ? forward_by_patches<decltype(t)>(p) : ForwardByLines<decltype(t)>(p).run();
  });
}

// Where patches are copied the reduction is dense: one tap of taps x channels, or one per kernel row.
MatrixSource packing(const Conv2dShape& s, const Conv2dWeight& w) {
  MatrixSource m;
  m.n = s.n;
  m.dtype = w.dtype;
  m.data = w.data;
  m.stride_n = w.stride_n;
  m.stride_k = w.stride_c;
  m.k = merges_taps(s) ? s.kernel_w * s.channels : takes_patches(s) ? s.taps() * s.channels : s.channels;
  if (takes_patches(s) && !merges_taps(s)) return m;
  m.taps_h = s.kernel_h;
  m.stride_tap_h = w.stride_h;
  if (merges_taps(s)) return m;
  m.taps_w = s.kernel_w;
  m.stride_tap_w = w.stride_w;
  return m;
}

int64_t dense_packed_bytes(const Conv2dShape& s) {
  if (merges_taps(s)) return kernels().packed_bytes(s.kernel_w * s.channels, s.n, s.dtype) * s.kernel_h;
  if (takes_patches(s)) return kernels().packed_bytes(s.taps() * s.channels, s.n, s.dtype);
  return kernels().packed_bytes(s.channels, s.n, s.dtype) * s.taps();
}

int64_t packed_bytes(const Conv2dShape& s) {
  if (takes_group_stencil(s)) return group_weight_floats(s) * 4;
  const ConvSlices slices(s);
  return dense_packed_bytes(slices.shape()) * slices.count();
}

void pack(const Conv2dShape& s, const Conv2dWeight& weight, void* packed) {
  if (takes_group_stencil(s)) return kernels().group_pack(s, weight, packed);
  const ConvSlices slices(s);
  const Conv2dShape& own = slices.shape();
  const bool dense = takes_patches(own);
  AlignedBuffer<float> buffer(dense || slices.is_merged() ? size_t(slices.weight_floats()) : 1);
  for (int64_t slice = 0; slice < slices.count(); ++slice) {
    const Conv2dWeight w = dense ? slices.dense_weight(weight, slice, buffer.data())
                                 : slices.weight(weight, slice, buffer.data());
    kernels().pack_matrix(packing(own, w), s.dtype,
                          static_cast<char*>(packed) + slice * dense_packed_bytes(own));
  }
}

void conv2d_forward(const Conv2dForward& p) {
  if (takes_group_stencil(p.shape)) return kernels().group_forward(p);
  const ConvSlices slices(p.shape);
  if (slices.count() == 1 && !slices.is_merged()) return forward_dense(p);
  const Dtype dtype = p.shape.dtype;
  for (int64_t slice = 0; slice < slices.count(); ++slice) {
    const int64_t c = slices.first_channel(slice), n = slices.first_output(slice);
    Conv2dForward own = p;
    own.shape = slices.shape();
    own.x = from_channel(p.x, c, dtype);
    own.prologue = from_channel(p.prologue, c);
    own.packed_weight = static_cast<const char*>(p.packed_weight) + slice * dense_packed_bytes(own.shape);
    own.epilogue.affine = from_channel(p.epilogue.affine, n);
    own.epilogue.residual = from_channel(p.epilogue.residual, n, dtype);
    own.epilogue.out = advanced(p.epilogue.out, n, dtype);
    own.epilogue.mean = advanced(p.epilogue.mean, n);
    own.epilogue.var = advanced(p.epilogue.var, n);
    forward_dense(own);
  }
}

}  // namespace

namespace FASTCNN_ISA {
void register_conv2d(Kernels& k) {
  k.conv2d_packed_bytes = packed_bytes;
  k.conv2d_pack = pack;
  k.conv2d_forward = conv2d_forward;
}
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
