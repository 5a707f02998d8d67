// Packs a weight matrix into panels of one vector of columns.
#include "cpu/kernels.h"
#include "cpu/prologue.h"

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

// `words` words of each column; row(i) is the vector of the panel's columns for the i-th element of the
// reduction.
template <class Words, class Row>
void pack_rows(int64_t words, float* out, const Row& row) {
  for (int64_t w = 0; w < words; ++w) {
    if constexpr (Words::kPerWord == 1) store(out + w * kLanes, row(w));
#if FASTCNN_ISA_LEVEL >= 3
    else
      store_pairs(out + w * kLanes, row(2 * w), row(2 * w + 1));
#endif
  }
}

// out[i * kLanes + column] = data[column * stride + i] for i < length, zero in the columns that are not
// there.
template <class T>
void transpose_runs(const T* data, int64_t stride, int64_t columns, int64_t length, float* out) {
  for (int64_t i = 0; i < length; i += kLanes) {
    V rows[kLanes];
    for (int64_t j = 0; j < kLanes; ++j)
      rows[j] = j < columns ? load_upto(data + j * stride + i, length - i) : zero();
    transpose(rows);
    for (int64_t j = 0; j < kLanes; ++j) store(out + (i + j) * kLanes, rows[j]);
  }
}

constexpr int64_t kRunElements = 32;  // of the reduction at a time: with nine taps 18 KB, in L1

// A panel whose columns are runs in memory, over the reduction and within it over `taps`: a gather of 16
// lines per vector becomes whole lines, read once.
template <class Words, class T>
void pack_runs(const MatrixSource& s, const T* data, int64_t columns, int64_t taps, int64_t tap_step,
               float* out) {
  const int64_t words = reduction_words<Words>(s.k);
  float* turned = thread_scratch(size_t(round_up(kRunElements * taps, kLanes) * kLanes));
  for (int64_t first = 0; first < words * Words::kPerWord; first += kRunElements) {
    const int64_t left = s.k - first, count = left < kRunElements ? left : kRunElements;
    const int64_t word = first / Words::kPerWord, most = kRunElements / Words::kPerWord;
    transpose_runs(data + first * taps, s.stride_n, columns, count * taps, turned);
    for (int64_t tap = 0; tap < taps; ++tap)
      pack_rows<Words>(
          words - word < most ? words - word : most, out + tap * tap_step + word * kLanes,
          [&](int64_t i) { return i < count ? load(turned + (i * taps + tap) * kLanes) : zero(); });
  }
}

// A panel whose columns are runs over `taps`, as those of a data gradient's contiguous weight: every line of
// memory is read once, for all taps.
template <class Words, class T>
void pack_column_runs(const MatrixSource& s, const T* data, int64_t columns, int64_t taps, int64_t tap_step,
                      float* out) {
  const int64_t words = reduction_words<Words>(s.k), turned_floats = round_up(taps, kLanes) * kLanes;
  float* turned = thread_scratch(size_t(turned_floats * Words::kPerWord));
  for (int64_t w = 0; w < words; ++w) {
    for (int64_t i = 0; i < Words::kPerWord; ++i) {
      const int64_t k = w * Words::kPerWord + i;
      transpose_runs(data + k * s.stride_k, s.stride_n, k < s.k ? columns : 0, taps,
                     turned + i * turned_floats);
    }
    for (int64_t tap = 0; tap < taps; ++tap)
      pack_rows<Words>(1, out + tap * tap_step + w * kLanes,
                       [&](int64_t i) { return load(turned + i * turned_floats + tap * kLanes); });
  }
}

template <class Words, class T>
void pack_tap(const MatrixSource& s, const T* data, int64_t columns, float* out) {
  if (s.stride_k == 1) return pack_runs<Words>(s, data, columns, 1, 0, out);
  const auto pack = [&](const auto& row) {
    pack_rows<Words>(reduction_words<Words>(s.k), out,
                     [&](int64_t k) { return k < s.k ? row(data + k * s.stride_k) : zero(); });
  };
  if (s.stride_n == 1)  // a dgrad's weight: rows of B lie contiguous in memory
    return pack([&](const T* p) { return load_upto(p, columns); });
#if FASTCNN_ISA_LEVEL >= 2
  if constexpr (std::is_same_v<T, float>) {
    if (s.stride_n < INT32_MAX / kLanes) {
      const __mmask16 mask = lane_mask(int(columns < kLanes ? columns : kLanes));
      const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i offsets = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int(s.stride_n)));
      return pack([&](const T* p) { return _mm512_mask_i32gather_ps(zero(), mask, offsets, p, 4); });
    }
  }
#endif
  pack_elements<Words>(s, data, columns, out);
}

// The taps of one element are neighbours, and so are elements `stride` apart: a contiguous weight's.
bool taps_are_runs(const MatrixSource& s, int64_t stride) {
  return stride == s.taps_h * s.taps_w && (s.taps_w == 1 || s.stride_tap_w == 1) &&
         (s.taps_h == 1 || s.stride_tap_h == s.taps_w);
}

template <class Words, class T>
void pack(const MatrixSource& s, void* packed) {
  const int64_t tap_floats = reduction_words<Words>(s.k) * kLanes, taps = s.taps_h * s.taps_w;
  const int64_t panels = ceil_div(s.n, kLanes), tap_step = s.tap_major ? panels * tap_floats : tap_floats;
  parallel_for(panels, [&](int64_t panel) {
    const int64_t first = panel * kLanes, columns = s.n - first < kLanes ? s.n - first : kLanes;
    const T* data = static_cast<const T*>(s.data) + first * s.stride_n;
    float* out = static_cast<float*>(packed) + panel * (s.tap_major ? tap_floats : taps * tap_floats);
    if (taps_are_runs(s, s.stride_k)) return pack_runs<Words>(s, data, columns, taps, tap_step, out);
    if (taps > 1 && taps_are_runs(s, s.stride_n))
      return pack_column_runs<Words>(s, data, columns, taps, tap_step, out);
    for (int64_t tap = 0; tap < taps; ++tap, out += tap_step) {
      const int64_t at = tap / s.taps_w * s.stride_tap_h + tap % s.taps_w * s.stride_tap_w;
      pack_tap<Words>(s, data + at, columns, out);
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
