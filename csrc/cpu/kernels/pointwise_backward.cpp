// Pointwise convolution backward: dx = dy W and dW = dy^T a, with dy and a made on load from raw outputs.
//
// Where dW fits the cache, a unit of work walks a chunk of pixels and makes both from one read of its
// operands. Elsewhere the data gradient takes tiles of pixels, and the weight gradient takes blocks of dW
// (wgrad.h).
#include "cpu/by_dtype.h"
#include "cpu/dx_sink.h"
#include "cpu/kernels.h"
#include "cpu/product_forward.h"
#include "cpu/wgrad.h"

namespace fastcnn {
namespace {

// Bytes of dW that a unit may sweep: a quarter of a 1 MB L2, or of the 2 MB that every CPU with AMX has, with
// tiles of operands that are half as large.
#if FASTCNN_ISA_LEVEL >= 4
constexpr int64_t kCachedWeightGradient = 512 * 1024;
#else
constexpr int64_t kCachedWeightGradient = 256 * 1024;
#endif
constexpr int64_t kChunkPixels = 384, kMostChunks = 64, kMostHalfChunks = 1536;

template <class T>
class Backward {
 public:
  using Words = typename WordsOf<T>::type;

  explicit Backward(const PointwiseBackward& p)
      : p_(p),
        target_{p.grid, p.k, p.input, p.output},
        pixels_(p.grid.pixels()),
        dy_words_(reduction_words<Words>(p.n)),
        together_(p.output.dw && p.n * whole_panels(p.k) * 4 <= kCachedWeightGradient),
        k_pitch_(together_ ? odd_lines(whole_panels(p.k)) : whole_panels(p.k)),
        rows_(together_ ? walked_rows() : tile_rows<Words>(dy_words_, pixels_)),
        chunks_(chunk_count()),
        chunk_rows_(ceil_div(pixels_, chunks_)) {}

  void run() {
    const int64_t spans = together_ ? chunks_ : ceil_div(pixels_, rows_);
    AlignedBuffer<float> sums(p_.output.sums ? size_t(spans * 2 * k_pitch_) : 1);
    const bool in_place = !together_ && p_.k == k_pitch_;
    AlignedBuffer<float> chunks(p_.output.dw && !in_place ? size_t(chunks_ * p_.n * k_pitch_) : 1);
    float* dw = in_place ? p_.output.dw : chunks.data();
    if (p_.output.dx && !p_.grid.is_dense()) initialise_dx();
    if (together_) {
      parallel_for(chunks_, [&](int64_t chunk) {
        walk(chunk, p_.output.dx ? sums.data() + chunk * 2 * k_pitch_ : nullptr,
             dw + chunk * p_.n * k_pitch_);
      });
    } else {
      if (p_.output.dx)
        parallel_for(spans, [&](int64_t tile) {
          const int64_t first = tile * rows_, count = pixels_ - first < rows_ ? pixels_ - first : rows_;
          data_gradient(first, count, sums.data() + tile * 2 * k_pitch_, true);
        });
      if (p_.output.dw)
        weight_gradient_by_blocks<Words>(pixels_, p_.n, p_.k, dw, k_pitch_,
                                         [&](int64_t pixel, int64_t begin, int64_t end, const auto& dy,
                                             const auto& a) { fill_operands(pixel, begin, end, dy, a); });
    }
    if (p_.output.dx && p_.output.sums) merge_sums(sums.data(), spans, p_.k, k_pitch_, p_.output.sums);
    if (p_.output.dw && !in_place) merge_weight_gradients(dw, chunks_, p_.n, p_.k, k_pitch_, p_.output.dw);
  }

 private:
  static int64_t whole_panels(int64_t k) { return round_up(k, kMicroVectors * kLanes); }

  // Rows of a tile of both operands.
  int64_t walked_rows() const {
    const int64_t words = round_up(p_.n, kBlockWords) + round_up(p_.k, kBlockWords);
    const int64_t fit = 384 * 1024 / (words * 4) / kMicroRows;
    int64_t rows = (fit < 2 ? 2 : fit > 8 ? 8 : fit) * kMicroRows;
#if FASTCNN_ISA_LEVEL >= 4
    // A block of dW is loaded and stored once per tile, as dear as four steps: half a chunk where the tiles
    // fit the 2 MB of L2.
    if (Words::kPerWord == 2) rows = p_.n + p_.k <= kMostHalfChunks ? kChunkPixels / 2 : fit > 4 ? 128 : 64;
#endif
    return rows < pixels_ ? rows : pixels_;
  }

  // Fixed by the shape alone, so that any number of threads sums in one order.
  int64_t chunk_count() const {
    int64_t count = ceil_div(pixels_, kChunkPixels);
    if (count > 1) count = round_up(count, 2);  // an odd one leaves a thread idle
    return !together_ ? 1 : count > kMostChunks ? kMostChunks : count;
  }
  int64_t chunk_end(int64_t begin) const {
    return begin + chunk_rows_ < pixels_ ? begin + chunk_rows_ : pixels_;
  }

  // One chunk's pixels: the weight gradient, and with sums the data gradient too.
  void walk(int64_t chunk, float* sums, float* dw) {
    const int64_t begin = chunk * chunk_rows_, end = chunk_end(begin);
    if (begin >= end) {
      std::memset(dw, 0, size_t(p_.n * k_pitch_) * sizeof(float));
      if (p_.output.sums) std::memset(sums, 0, size_t(2 * k_pitch_) * sizeof(float));
      return;
    }
    for (int64_t first = begin; first < end; first += rows_) {
      const int64_t count = end - first < rows_ ? end - first : rows_;
      if (sums)
        both_gradients(first, count, sums, dw, first == begin);
      else
        weight_gradient(first, count, dw, first > begin);
    }
  }

  void data_gradient(int64_t first, int64_t count, float* sums, bool first_of_unit) {
    const TileWriter<Words> dy{thread_scratch(tile_floats<Words>(rows_, dy_words_)), count};
    fill_dy(first, count, dy);
    multiply_tile(dy, count, PackedView<Words>(p_.packed_weight, p_.n), 0, ceil_div(p_.k, kLanes),
                  DxSink<T>(target_, first, k_pitch_, sums, first_of_unit));
  }

  void weight_gradient(int64_t first, int64_t count, float* dw, bool accumulate) {
    const WgradTile<Words> dy(thread_scratch(size_t(wgrad_floats<Words>(count, p_.n, p_.k))), count, p_.n);
    const WgradTile<Words> a(dy.end(), count, p_.k);
    fill_operands(first, 0, dy.rows(), dy, a);
    accumulate_weight_gradient(dy, a, dw, k_pitch_, accumulate);
  }

  // Rows [begin, end) of tiles whose first pixel is `first`.
  void fill_operands(int64_t first, int64_t begin, int64_t end, const WgradTile<Words>& dy,
                     const WgradTile<Words>& a) const {
    with_gradient<T>(p_.gradient, p_.n, [&](const auto& gradient) {
      dy.fill_rows(
          begin, end, [&](int64_t row) { return first + row; }, [&](int64_t c) { return gradient.at(c); });
    });
    fill_input(first, begin, end, a);
  }

  // dy is made once, for the data gradient. Words of one pixel lie alike for both products; a pair's are
  // rearranged.
  void both_gradients(int64_t first, int64_t count, float* sums, float* dw, bool first_of_unit) {
    const int64_t tile = tile_floats<Words>(rows_, dy_words_), own = Words::kPerWord == 1 ? 0 : p_.n;
    float* scratch = thread_scratch(size_t(tile + wgrad_floats<Words>(rows_, own, p_.k)));
    const TileWriter<Words> dy{scratch, count};
    fill_dy(first, count, dy);
    const WgradTile<Words> columns(Words::kPerWord == 1 ? scratch : scratch + tile, count, p_.n);
    if constexpr (Words::kPerWord == 2)
      columns.fill([](int64_t row) { return row; },
                   [&](int64_t c) {
                     return stored_column([&, c](int64_t row) {
                       return load(reinterpret_cast<const bf16*>(dy.at(row, c / 2)));
                     });
                   });
    const WgradTile<Words> a(Words::kPerWord == 1 ? scratch + tile : columns.end(), count, p_.k);
    fill_input(first, 0, a.rows(), a);
    accumulate_weight_gradient(columns, a, dw, k_pitch_, !first_of_unit);
    multiply_tile(dy, count, PackedView<Words>(p_.packed_weight, p_.n), 0, ceil_div(p_.k, kLanes),
                  DxSink<T>(target_, first, k_pitch_, sums, first_of_unit));
  }

  void fill_dy(int64_t first, int64_t count, const TileWriter<Words>& dy) const {
    const DxSink<T> sink(target_, first, 0, nullptr, false);
    with_gradient<T>(p_.gradient, p_.n, [&](const auto& gradient) {
      fill_tile(
          dy, count, p_.n,
          [&](int64_t row) {
            // What the product's results meet in memory: the sink visits it in pieces that no hardware
            // foresees.
            if (p_.output.dx) sink.prefetch(row);
            return first + row;
          },
          [&](int64_t c) { return gradient.at(c); });
    });
  }

  void fill_input(int64_t first, int64_t begin, int64_t end, const WgradTile<Words>& a) const {
    with_prologue(p_.input.affine, [&](const auto& pre) {
      a.fill_rows(
          begin, end, [&](int64_t row) { return input_pixel(p_.grid, first + row); },
          [&](int64_t c) { return input_column<T>(p_.input.x, pre, c, p_.k); });
    });
  }

  // A strided forward leaves pixels unread: their gradient is the residual.
  void initialise_dx() {
    const int64_t total = p_.grid.images * p_.grid.in_h * p_.grid.in_w;
    T* dx = static_cast<T*>(p_.output.dx);
    parallel_for(ceil_div(total, 1024), [&](int64_t block) {
      for (int64_t i = block * 1024; i < total && i < (block + 1) * 1024; ++i)
        if (const T* residual = static_cast<const T*>(p_.output.residual.data))
          std::memcpy(static_cast<void*>(dx + i * p_.output.dx_ld), residual + i * p_.output.residual.ld,
                      size_t(p_.k) * sizeof(T));
        else
          std::memset(static_cast<void*>(dx + i * p_.output.dx_ld), 0, size_t(p_.k) * sizeof(T));
    });
  }

  const PointwiseBackward& p_;
  const DxTarget target_;
  const int64_t pixels_, dy_words_;
  const bool together_;
  const int64_t k_pitch_, rows_, chunks_, chunk_rows_;
};

void pointwise_backward(const PointwiseBackward& p) {
  by_dtype(p.dtype, &Kernels::pointwise_backward, p, [&](auto t) { Backward<decltype(t)>(p).run(); });
}

}  // namespace

namespace FASTCNN_ISA {
void register_pointwise_backward(Kernels& k) { k.pointwise_backward = pointwise_backward; }
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
