// Packs a weight matrix into panels of one vector of columns.
#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace fastcnn {
namespace {

template <class T>
float element(const MatrixSource& s, int64_t k, int64_t n) {
  const float value = to_float(static_cast<const T*>(s.data)[k * s.stride_k + n * s.stride_n]);
  return s.scale ? value * s.scale[n] : value;
}

inline void put_word(FloatWords, float* at, float low, float) { *at = low; }
#if FASTCNN_ISA_LEVEL >= 3
inline void put_word(PairWords, float* at, float low, float high) {
  const bf16 pair[2] = {to_bf16(low), to_bf16(high)};
  std::memcpy(at, pair, 4);
}
#endif

template <class Words, class T>
void pack_panel(const MatrixSource& s, int64_t panel, float* out) {
  const int64_t words = reduction_words<Words>(s.k), first = panel * kLanes;
  const int64_t columns = s.n - first < kLanes ? s.n - first : kLanes;
  // Blocks of kLanes words: both orders of the source then stay within a few cache lines.
  for (int64_t base = 0; base < words; base += kLanes) {
    const int64_t end = base + kLanes < words ? base + kLanes : words;
    for (int64_t j = 0; j < kLanes; ++j) {
      for (int64_t w = base; w < end; ++w) {
        const int64_t k = w * Words::kPerWord;
        const float low = j < columns && k < s.k ? element<T>(s, k, first + j) : 0.0f;
        const float high =
            Words::kPerWord == 2 && j < columns && k + 1 < s.k ? element<T>(s, k + 1, first + j) : 0.0f;
        put_word(Words{}, out + w * kLanes + j, low, high);
      }
    }
  }
}

// Rows of B that are contiguous in memory (a dgrad's weight) are copied a vector at a time.
template <class Words, class T>
void pack_panel_rows(const MatrixSource& s, int64_t panel, float* out) {
  const int64_t words = reduction_words<Words>(s.k), first = panel * kLanes, columns = s.n - first;
  const T* data = static_cast<const T*>(s.data) + first;
  const auto row = [&](int64_t k) {
    if (k >= s.k) return zero();
    const T* p = data + k * s.stride_k;
    return columns >= kLanes ? load(p) : load(p, int(columns));
  };
  for (int64_t w = 0; w < words; ++w) {
    if constexpr (Words::kPerWord == 1) store(out + w * kLanes, row(w));
#if FASTCNN_ISA_LEVEL >= 3
    else
      store_pairs(out + w * kLanes, row(2 * w), row(2 * w + 1));
#endif
  }
}

#if FASTCNN_ISA_LEVEL >= 2
// Columns of B whose reductions are contiguous in memory (a forward's float weight): a gather takes one word
// of each.
template <class Words>
void pack_panel_columns(const MatrixSource& s, int64_t panel, float* out) {
  const int64_t words = reduction_words<Words>(s.k), first = panel * kLanes, columns = s.n - first;
  const __mmask16 mask = lane_mask(int(columns < kLanes ? columns : kLanes));
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i offsets = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int(s.stride_n)));
  const float* data = static_cast<const float*>(s.data) + first * s.stride_n;
  const V scale = s.scale ? _mm512_maskz_loadu_ps(mask, s.scale + first) : set(1.0f);
  const auto column = [&](int64_t k) {
    return k < s.k ? mul(scale, _mm512_mask_i32gather_ps(zero(), mask, offsets, data + k, 4)) : zero();
  };
  for (int64_t w = 0; w < words; ++w) {
    if constexpr (Words::kPerWord == 1) store(out + w * kLanes, column(w));
#if FASTCNN_ISA_LEVEL >= 3
    else
      store_pairs(out + w * kLanes, column(2 * w), column(2 * w + 1));
#endif
  }
}
#endif

template <class Words, class T>
void pack(const MatrixSource& s, void* packed) {
  const int64_t stride = reduction_words<Words>(s.k) * kLanes;
  parallel_for(ceil_div(s.n, kLanes), [&](int64_t panel) {
    float* out = static_cast<float*>(packed) + panel * stride;
    if (s.stride_n == 1 && !s.scale) return pack_panel_rows<Words, T>(s, panel, out);
#if FASTCNN_ISA_LEVEL >= 2
    if constexpr (std::is_same_v<T, float>)
      if (s.stride_k == 1 && s.stride_n < INT32_MAX / kLanes) return pack_panel_columns<Words>(s, panel, out);
#endif
    pack_panel<Words, T>(s, panel, out);
  });
}

template <class Words>
void pack_from(const MatrixSource& s, void* packed) {
  if (s.dtype == kFloat32)
    pack<Words, float>(s, packed);
  else
    pack<Words, bf16>(s, packed);
}

void pack_matrix(const MatrixSource& s, Dtype compute, void* packed) {
  if (compute == kFloat32)
    pack_from<FloatWords>(s, packed);
  else
    pack_from<WordsOf<bf16>::type>(s, packed);
}

int64_t packed_bytes(int64_t k, int64_t n, Dtype compute) {
  const int64_t words =
      compute == kFloat32 ? reduction_words<FloatWords>(k) : reduction_words<WordsOf<bf16>::type>(k);
  return ceil_div(n, kLanes) * words * kLanes * 4;
}

}  // namespace

namespace FASTCNN_ISA {
void register_gemm_pack(Kernels& k) {
  k.pack_matrix = pack_matrix;
  k.packed_bytes = packed_bytes;
}
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
