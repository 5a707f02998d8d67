// Packs a weight matrix into panels of one vector of columns.
#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace fastcnn {
namespace {

inline void put_word(FloatWords, float* at, float low, float) { *at = low; }
#if FASTCNN_ISA_LEVEL >= 3
inline void put_word(PairWords, float* at, float low, float high) {
  const bf16 pair[2] = {to_bf16(low), to_bf16(high)};
  std::memcpy(at, pair, 4);
}
#endif

// One panel's rows of one tap, from the tap's first element on.
template <class Words, class T>
void pack_elements(const MatrixSource& s, const T* data, int64_t columns, float* out) {
  const int64_t words = reduction_words<Words>(s.k);
  const auto element = [&](int64_t k, int64_t j) {
    return j < columns && k < s.k ? to_float(data[k * s.stride_k + j * s.stride_n]) : 0.0f;
  };
  // Blocks of kLanes words: both orders of the source then stay within a few cache lines.
  for (int64_t base = 0; base < words; base += kLanes) {
    const int64_t end = base + kLanes < words ? base + kLanes : words;
    for (int64_t j = 0; j < kLanes; ++j)
      for (int64_t w = base; w < end; ++w) {
        const int64_t k = w * Words::kPerWord;
        put_word(Words{}, out + w * kLanes + j, element(k, j),
                 Words::kPerWord == 2 ? element(k + 1, j) : 0.0f);
      }
  }
}

// The same with row(k) as a vector of the panel's columns.
template <class Words, class Row>
void pack_rows(const MatrixSource& s, float* out, const Row& row) {
  const auto at = [&](int64_t k) { return k < s.k ? row(k) : zero(); };
  for (int64_t w = 0; w < reduction_words<Words>(s.k); ++w) {
    if constexpr (Words::kPerWord == 1) store(out + w * kLanes, at(w));
#if FASTCNN_ISA_LEVEL >= 3
    else
      store_pairs(out + w * kLanes, at(2 * w), at(2 * w + 1));
#endif
  }
}

template <class Words, class T>
void pack_tap(const MatrixSource& s, const T* data, int64_t columns, float* out) {
  if (s.stride_n == 1)  // a dgrad's weight: rows of B lie contiguous in memory
    return pack_rows<Words>(s, out, [&](int64_t k) {
      const T* p = data + k * s.stride_k;
      return columns >= kLanes ? load(p) : load(p, int(columns));
    });
#if FASTCNN_ISA_LEVEL >= 2
  if constexpr (std::is_same_v<T, float>) {
    if (s.stride_n < INT32_MAX / kLanes) {
      const __mmask16 mask = lane_mask(int(columns < kLanes ? columns : kLanes));
      const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i offsets = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int(s.stride_n)));
      return pack_rows<Words>(s, out, [&](int64_t k) {
        return _mm512_mask_i32gather_ps(zero(), mask, offsets, data + k * s.stride_k, 4);
      });
    }
  }
#endif
  pack_elements<Words>(s, data, columns, out);
}

template <class Words, class T>
void pack(const MatrixSource& s, void* packed) {
  const int64_t tap_floats = reduction_words<Words>(s.k) * kLanes, taps = s.taps_h * s.taps_w;
  parallel_for(ceil_div(s.n, kLanes), [&](int64_t panel) {
    const int64_t first = panel * kLanes, columns = s.n - first < kLanes ? s.n - first : kLanes;
    float* out = static_cast<float*>(packed) + panel * taps * tap_floats;
    for (int64_t tap = 0; tap < taps; ++tap, out += tap_floats) {
      const int64_t at = tap / s.taps_w * s.stride_tap_h + tap % s.taps_w * s.stride_tap_w;
      pack_tap<Words>(s, static_cast<const T*>(s.data) + at + first * s.stride_n, columns, out);
    }
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
