// MobileNet-v2's block in its inference form: expand, depthwise, project, add, with the hidden channels in
// cache only.
#include "cpu/by_dtype.h"
#include "cpu/depthwise_strip.h"
#include "cpu/kernels.h"
#include "cpu/pixel_rows.h"
#include "cpu/product_forward.h"

namespace fastcnn {
namespace {

// Ring of hidden rows: half of a 1 MB L2, the rest is for the A tiles and the panels of B.
constexpr int64_t kRingFloats = 128 * 1024;

// Expanded pixels on their way into the ring: tile pixel `row` goes to pixels[row], null where no output
// reads it.
struct HiddenSink : RegisterSink {
  float* const* pixels;
  const ScaleShiftAct& affine;
  int64_t channels;
  Bounds bounds;

  HiddenSink(float* const* pixels, const ScaleShiftAct& affine, int64_t channels)
      : pixels(pixels), affine(affine), channels(channels), bounds(affine.act) {}

  bool takes(int64_t, int64_t) const { return bounds.simple; }

  void operator()(const float* c, int64_t ldc, int64_t row, int64_t rows, int64_t column,
                  int64_t columns) const {
    for (int64_t r = 0; r < rows; ++r) {
      float* out = pixels[row + r];
      for (int64_t v = 0; out && v < columns; v += kLanes)
        store(out + column + v, apply(affine, load(c + r * ldc + v), column + v, channels - column - v));
    }
  }

  template <int kRows, int kVectors>
  void tile(V (&acc)[kRows][kVectors], int64_t row, int64_t column) const {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = column + v * kLanes, n = channels - at;
      const V scale = affine.scale ? load_upto(affine.scale + at, n) : set(1.0f);
      const V shift = affine.shift ? load_upto(affine.shift + at, n) : zero();
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
        if (float* out = pixels[row + r]) store(out + at, bounds.clamp(fmadd(acc[r][v], scale, shift)));
    }
  }
};

template <class T>
class InvertedResidual {
 public:
  using Words = typename WordsOf<T>::type;

  InvertedResidual(const InvertedResidualForward& p, int64_t units)
      : p_(p),
        s_(p.depthwise),
        hidden_(s_.channels),
        expand_(p.packed_expand, p.k),
        project_(p.packed_project, hidden_),
        plan_(plan_strips(s_, tile_rows<Words>(project_.words, s_.out_h * s_.out_w), kRingFloats, units)),
        weight_(size_t(s_.taps() * round_up(hidden_, kLanes))) {
    pack_depthwise_weight(s_, p.dw_weight, 0, hidden_, round_up(hidden_, kLanes), weight_.data());
  }

  void run() {
    parallel_for(s_.images * plan_.per_image, [&](int64_t unit) { strip(unit); });
  }

 private:
  void strip(int64_t unit) const {
    const int64_t image = unit / plan_.per_image, begin = unit % plan_.per_image * plan_.rows;
    const int64_t end = begin + plan_.rows < s_.out_h ? begin + plan_.rows : s_.out_h;
    const int64_t ring = round_up(DepthwiseStrip::floats(s_, plan_.per_tile), 16);
    const int64_t in_tile = tile_rows<Words>(expand_.words, s_.in_h * s_.in_w);
    const int64_t in_floats = tile_floats<Words>(in_tile, expand_.words);
    const int64_t row_floats =
        s_.out_w * round_up(hidden_, kLanes);  // a depthwise row that is itself the result
    const int64_t out_floats =
        p_.packed_project ? tile_floats<Words>(plan_.per_tile * s_.out_w, project_.words) : row_floats;
    float* memory = thread_scratch(ring + in_floats + out_floats);
    DepthwiseStrip strip(s_, plan_.per_tile, weight_.data(), memory);
    const TileWriter<Words> input{memory + ring, in_tile};
    for (int64_t p0 = begin; p0 < end; p0 += plan_.per_tile) {
      const int64_t p1 = p0 + plan_.per_tile < end ? p0 + plan_.per_tile : end;
      strip.prepare(p0, p1, [&](int64_t h0, int64_t h1) { make_hidden(strip, image, h0, h1, input); });
      const TileWriter<Words> a{memory + ring + in_floats, (p1 - p0) * s_.out_w};
      if (p_.packed_project)
        project(strip, image, p0, p1, a);
      else
        store_rows(strip, image, p0, p1, a.tile);
    }
  }

  // Hidden rows [h0, h1) of an image into the ring: a product over their pixels, some rows of an A tile at a
  // time.
  void make_hidden(const DepthwiseStrip& strip, int64_t image, int64_t h0, int64_t h1,
                   const TileWriter<Words>& input) const {
    const PixelGrid dense{s_.images, s_.in_h, s_.in_w, s_.in_h, s_.in_w, 1, 1};
    for (int64_t h = h0; h < h1; ++h) strip.clear_padding(h);
    for_each_piece((h1 - h0) * s_.in_w, input.rows, [&](int64_t first, int64_t count) {
      const int64_t pixel = (image * s_.in_h + h0) * s_.in_w + first;
      fill_rows<T>(dense, p_.x, p_.prologue, p_.k, pixel, count, input);
      float* pixels[kMostTileRows];
      place_in_ring(strip, h0 * s_.in_w + first, count, pixels);
      multiply_tile(input, count, expand_, 0, ceil_div(hidden_, kLanes),
                    HiddenSink(pixels, p_.expand, hidden_));
    });
  }

  // Where pixels [first, first + count) of the image lie in the ring; null for columns that no output reads,
  // which have no room there.
  void place_in_ring(const DepthwiseStrip& strip, int64_t first, int64_t count, float** pixels) const {
    const int64_t width = ring_width(s_), pitch = strip.pitch();
    int64_t h = first / s_.in_w, w = first % s_.in_w;
    float* line = strip.row(h);
    for (int64_t i = 0; i < count; ++i) {
      pixels[i] = w + s_.pad_w < width ? line + (w + s_.pad_w) * pitch : nullptr;
      if (++w < s_.in_w) continue;
      w = 0;
      line = strip.row(++h);
    }
  }

  void project(const DepthwiseStrip& strip, int64_t image, int64_t p0, int64_t p1,
               const TileWriter<Words>& a) const {
    for (int64_t p = p0; p < p1; ++p) {
      TileSink<Words> sink{p_.middle, a, (p - p0) * s_.out_w, hidden_};
      strip.output_row(p, sink);
    }
    for (int64_t row = 0; row < a.rows; ++row) a.pad(row, hidden_);
    const int64_t pixel = (image * s_.out_h + p0) * s_.out_w;
    multiply_tile(a, a.rows, project_, 0, ceil_div(p_.n, kLanes),
                  StoreSink<T>(p_.epilogue, p_.n, pixel, nullptr, false));
  }

  // Without a projection the depthwise rows are the result.
  void store_rows(const DepthwiseStrip& strip, int64_t image, int64_t p0, int64_t p1, float* row) const {
    Epilogue e = p_.epilogue;
    e.affine = p_.middle;
    for (int64_t p = p0; p < p1; ++p) {
      RawSink sink{row, strip.pitch()};
      strip.output_row(p, sink);
      store_block<T>(e, hidden_, row, strip.pitch(), (image * s_.out_h + p) * s_.out_w, s_.out_w, 0,
                     strip.pitch());
    }
  }

  const InvertedResidualForward& p_;
  const DepthwiseShape& s_;
  const int64_t hidden_;
  const PackedView<Words> expand_, project_;
  const StripPlan plan_;
  mutable AlignedBuffer<float> weight_;
};

// Expand through memory, then the separable kernel: where images are too small and too few to be shared by
// rows.
void through_memory(const InvertedResidualForward& p) {
  const DepthwiseShape& s = p.depthwise;
  AlignedBuffer<char> hidden(size_t(s.images * s.in_h * s.in_w * s.channels * bytes_of(s.dtype)) + 64);
  PointwiseForward expand;
  expand.grid = {s.images, s.in_h, s.in_w, s.in_h, s.in_w, 1, 1};
  expand.k = p.k;
  expand.n = s.channels;
  expand.dtype = s.dtype;
  expand.x = p.x;
  expand.prologue = p.prologue;
  expand.packed_weight = p.packed_expand;
  expand.epilogue.affine = p.expand;
  expand.epilogue.out = hidden.data();
  expand.epilogue.out_ld = s.channels;
  kernels().pointwise_forward(expand);
  const Activations x{hidden.data(), s.channels};
  if (p.packed_project)
    return kernels().separable_forward({s, x, {}, p.dw_weight, p.middle, p.n, p.packed_project, p.epilogue});
  DepthwiseForward depthwise{s, x, {}, p.dw_weight, p.epilogue};
  depthwise.epilogue.affine = p.middle;
  kernels().depthwise_forward(depthwise);
}

void inverted_residual_forward(const InvertedResidualForward& p) {
  const int64_t threads = omp_get_max_threads(), units = threads == 1 ? 1 : 2 * threads;
  if (p.depthwise.images < threads && p.depthwise.out_h < 8 * threads) return through_memory(p);
  by_dtype(p.depthwise.dtype, &Kernels::inverted_residual_forward, p,
           [&](auto t) { InvertedResidual<decltype(t)>(p, units).run(); });
}

}  // namespace

namespace FASTCNN_ISA {
void register_inverted_residual(Kernels& k) { k.inverted_residual_forward = inverted_residual_forward; }
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
