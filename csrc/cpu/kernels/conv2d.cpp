// General convolution on the matrix-product core: forward and weight gradient, patches gathered tile by tile.
#include "cpu/kernels.h"
#include "cpu/patch_rows.h"
#include "cpu/product_forward.h"
#include "cpu/wgrad.h"

namespace fastcnn {
namespace {

constexpr int64_t kChunkPixels = 2048, kMostChunks = 64, kTilePixels = 112;

template <class T>
void forward(const Conv2dForward& p) {
  using Words = typename WordsOf<T>::type;
  // A row of an A tile is a patch as it lies in memory, unless its words are wider or it has a second block.
  constexpr bool kSameWords = sizeof(T) * Words::kPerWord == sizeof(float);
  const int64_t k = p.shape.reduction();
  const bool direct = kSameWords && k <= kBlockWords * Words::kPerWord;
  product_forward<T>(p.shape.pixels(), k, p.shape.n, p.packed_weight, p.epilogue,
                     [&](int64_t first, int64_t count, const auto& a) {
                       PatchRows<T> patches(p.shape, p.x, p.prologue, first);
                       AlignedBuffer<T> patch(size_t(direct ? 1 : patch_elements(p.shape)));
                       for (int64_t row = 0; row < count; ++row) {
                         if (direct) {
                           patches.next(reinterpret_cast<T*>(a.at(row, 0)));
                         } else {
                           patches.next(patch.data());
                           for (int64_t c = 0; c < k; c += kLanes) a.put(row, c, load(patch.data() + c));
                         }
                         a.pad(row, k);
                       }
                     });
}

template <class T>
void weight_gradient(const Conv2dWeightGradient& p) {
  using Words = typename WordsOf<T>::type;
  const Conv2dShape& s = p.shape;
  const int64_t pixels = s.pixels(), k = s.reduction(), pitch = round_up(k, kMicroVectors * kLanes);
  // Fixed by the shape alone, so that any number of threads sums in one order.
  int64_t chunks = ceil_div(pixels, kChunkPixels);
  if (chunks > kMostChunks) chunks = kMostChunks;
  const int64_t chunk_rows = ceil_div(pixels, chunks);
  chunks = ceil_div(pixels, chunk_rows);
  AlignedBuffer<float> dw(size_t(chunks * s.n * pitch));
  parallel_for(chunks, [&](int64_t chunk) {
    const int64_t begin = chunk * chunk_rows, end = begin + chunk_rows < pixels ? begin + chunk_rows : pixels;
    const int64_t patch = patch_elements(s);
    AlignedBuffer<T> patches(size_t(kTilePixels * patch));
    PatchRows<T> rows(s, p.x, p.prologue, begin);
    for (int64_t first = begin; first < end; first += kTilePixels) {
      const int64_t count = end - first < kTilePixels ? end - first : kTilePixels;
      for (int64_t row = 0; row < count; ++row) rows.next(patches.data() + row * patch);
      const WgradTile<Words> dy(thread_scratch(wgrad_floats<Words>(kTilePixels, s.n, k)), count, s.n);
      const WgradTile<Words> a(dy.end(), count, k);
      with_gradient<T>(p.gradient, s.n, [&](const auto& gradient) {
        dy.fill([&](int64_t row, int64_t c) { return gradient(first + row, c); });
      });
      a.fill([&](int64_t row, int64_t c) { return load(patches.data() + row * patch + c); });
      accumulate_weight_gradient(dy, a, dw.data() + chunk * s.n * pitch, pitch, first > begin);
    }
  });
  merge_weight_gradients(dw.data(), chunks, s.n, k, pitch, p.dw);
}

void conv2d_forward(const Conv2dForward& p) {
  p.shape.dtype == kFloat32 ? forward<float>(p) : forward<bf16>(p);
}

void conv2d_weight_gradient(const Conv2dWeightGradient& p) {
  p.shape.dtype == kFloat32 ? weight_gradient<float>(p) : weight_gradient<bf16>(p);
}

}  // namespace

namespace FASTCNN_ISA {
void register_conv2d(Kernels& k) {
  k.conv2d_forward = conv2d_forward;
  k.conv2d_weight_gradient = conv2d_weight_gradient;
}
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
