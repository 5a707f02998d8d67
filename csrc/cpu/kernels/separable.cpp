// Depthwise then pointwise: depthwise output goes tile by tile into the product's A tile and nowhere else.
#include "cpu/by_dtype.h"
#include "cpu/depthwise_strip.h"
#include "cpu/kernels.h"
#include "cpu/product_forward.h"

namespace fastcnn {
namespace {

// Ring and A tile share a 1 MB L2 with the panels of B.
constexpr int64_t kRingFloats = 80 * 1024;
// Units of work per call, fixed by the shape so that statistics do not depend on the number of threads.
constexpr int64_t kUnits = 8;
template <class T>
class Separable {
 public:
  using Words = typename WordsOf<T>::type;

  explicit Separable(const SeparableForward& p)
      : p_(p),
        s_(p.depthwise),
        hidden_(s_.out_channels()),
        b_(p.packed_pointwise, hidden_),
        plan_(plan_strips(s_, tile_rows<Words>(b_.words, s_.out_h * s_.out_w), kRingFloats, kUnits)),
        pitch_(round_up(p.n, kLanes)),
        weight_(size_t(s_.taps() * round_up(hidden_, kLanes))) {
    pack_depthwise_weight(s_, p.dw_weight, 0, hidden_, round_up(hidden_, kLanes), weight_.data());
  }

  int64_t units() const { return s_.images * plan_.per_image; }

  void run() {
    const int64_t units = this->units();
    AlignedBuffer<float> statistics(p_.epilogue.mean ? size_t(units * 3 * pitch_) : 1);
    parallel_for(units, [&](int64_t unit) { strip(unit, statistics.data() + unit * 3 * pitch_); });
    if (!p_.epilogue.mean) return;
    const auto count = [&](int64_t unit) { return (last_row(unit) - first_row(unit)) * s_.out_w; };
    merge_statistics(statistics.data(), units, count, p_.n, pitch_, p_.epilogue.mean, p_.epilogue.var);
  }

 private:
  int64_t first_row(int64_t unit) const { return unit % plan_.per_image * plan_.rows; }
  int64_t last_row(int64_t unit) const {
    const int64_t end = first_row(unit) + plan_.rows;
    return end < s_.out_h ? end : s_.out_h;
  }

  void strip(int64_t unit, float* unit_sums) const {
    const int64_t image = unit / plan_.per_image, begin = first_row(unit), end = last_row(unit);
    const int64_t ring = round_up(DepthwiseStrip::floats(s_, plan_.per_tile), 16);
    const int64_t tile_pixels = plan_.per_tile * s_.out_w;
    float* memory = thread_scratch(ring + tile_floats<Words>(tile_pixels, b_.words));
    DepthwiseStrip strip(s_, plan_.per_tile, weight_.data(), memory);
    const StatisticsUnit sums{unit_sums, unit_sums + pitch_, unit_sums + 2 * pitch_};
    for (int64_t p0 = begin; p0 < end; p0 += plan_.per_tile) {
      const int64_t p1 = p0 + plan_.per_tile < end ? p0 + plan_.per_tile : end;
      strip.prepare(p0, p1, [&](int64_t h0, int64_t h1) {
        for (int64_t h = h0; h < h1; ++h)
          fill_row<T>(s_, p_.x, p_.prologue, image, h, 0, hidden_, strip.pitch(), strip.row(h));
      });
      const TileWriter<Words> a{memory + ring, (p1 - p0) * s_.out_w};
      for (int64_t p = p0; p < p1; ++p) {
        TileSink<Words> sink{p_.middle, a, (p - p0) * s_.out_w, hidden_};
        strip.output_row(p, sink);
      }
      for (int64_t row = 0; row < a.rows; ++row) a.pad(row, hidden_);
      const int64_t pixel = (image * s_.out_h + p0) * s_.out_w;
      multiply_tile(a, a.rows, b_, 0, ceil_div(p_.n, kLanes),
                    StoreSink<T>(p_.epilogue, p_.n, pixel, p_.epilogue.mean ? &sums : nullptr, p0 == begin));
    }
  }

  const SeparableForward& p_;
  const DepthwiseShape& s_;
  const int64_t hidden_;
  const PackedView<Words> b_;
  const StripPlan plan_;
  const int64_t pitch_;
  mutable AlignedBuffer<float> weight_;
};

// The two kernels one after the other, through a buffer: for a few small images.
void through_memory(const SeparableForward& p) {
  const DepthwiseShape& s = p.depthwise;
  const int64_t pixels = s.images * s.out_h * s.out_w, channels = s.out_channels();
  AlignedBuffer<char> middle(size_t(pixels * channels * bytes_of(s.dtype)) + 64);
  DepthwiseForward depthwise{s, p.x, p.prologue, p.dw_weight, {}};
  depthwise.epilogue.affine = p.middle;
  depthwise.epilogue.out = middle.data();
  depthwise.epilogue.out_ld = channels;
  kernels().depthwise_forward(depthwise);
  PointwiseForward pointwise;
  pointwise.grid = {s.images, s.out_h, s.out_w, s.out_h, s.out_w, 1, 1};
  pointwise.k = channels;
  pointwise.n = p.n;
  pointwise.dtype = s.dtype;
  pointwise.x = {middle.data(), channels};
  pointwise.packed_weight = p.packed_pointwise;
  pointwise.epilogue = p.epilogue;
  kernels().pointwise_forward(pointwise);
}

template <class T>
void forward(const SeparableForward& p) {
  Separable<T> fused(p);
  // Statistics must not depend on the number of threads, so neither may the choice where they are taken.
  const int64_t occupied = p.epilogue.mean ? kUnits / 2 : omp_get_max_threads();
  if (fused.units() < occupied) return through_memory(p);
  fused.run();
}

void separable_forward(const SeparableForward& p) {
  by_dtype(p.depthwise.dtype, &Kernels::separable_forward, p, [&](auto t) { forward<decltype(t)>(p); });
}

}  // namespace

namespace FASTCNN_ISA {
void register_separable(Kernels& k) { k.separable_forward = separable_forward; }
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
