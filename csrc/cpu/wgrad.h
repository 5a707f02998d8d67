// The weight gradient's product dW [n, k] += dy^T a, reduced over pixels.
//
// Both operands lie as [channel / kBlockWords][pixel words][kRowWords]: a word is one pixel's float, or two
// neighbouring pixels' bf16, of one channel. The microtile of the forward then serves with its strides
// exchanged.
#pragma once

#include "cpu/epilogue.h"
#include "cpu/gemm.h"
#include "cpu/statistics.h"

namespace fastcnn {
namespace {

template <class Words>
int64_t wgrad_rows(int64_t pixels) {
  const int64_t rows = ceil_div(pixels, Words::kPerWord);
#if FASTCNN_ISA_LEVEL >= 4
  if (Words::kPerWord == 2)
    return round_up(rows, kTileWords);  // AMX reduces over 16 at a time; the rest are zero
#endif
  return rows;
}

template <class Words>
int64_t wgrad_floats(int64_t pixels, int64_t n, int64_t k) {
  return wgrad_rows<Words>(pixels) * (ceil_div(n, kBlockWords) + ceil_div(k, kBlockWords)) * kRowWords;
}

template <class Words>
class WgradTile {
 public:
  WgradTile(float* data, int64_t pixels, int64_t channels)
      : data_(data), pixels_(pixels), channels_(channels), rows_(wgrad_rows<Words>(pixels)) {}

  int64_t channels() const { return channels_; }
  int64_t rows() const { return rows_; }
  float* end() const { return data_ + ceil_div(channels_, kBlockWords) * rows_ * kRowWords; }
  float* at(int64_t row, int64_t channel) const {
    return data_ + (channel / kBlockWords * rows_ + row) * kRowWords + channel % kBlockWords;
  }

  // column(c) makes a function of index(pixel), whose value is the pixel's vector from channel c on.
  template <class Index, class Column>
  void fill(const Index& index, const Column& column) const {
    constexpr int kPerWord = Words::kPerWord;
    const int64_t whole = pixels_ / kPerWord;
    for_rows(whole, [&](int64_t row, auto group) {
      int64_t at[group * kPerWord];
      for (int i = 0; i < group * kPerWord; ++i) at[i] = index(row * kPerWord + i);
      for (int64_t c = 0; c < channels_; c += kLanes) {
        const auto value = column(c);
        for (int i = 0; i < group; ++i)
          put(row + i, c, value(at[i * kPerWord]), value(at[i * kPerWord + kPerWord - 1]));
      }
    });
    // A last pixel without a partner, and rows that only the reduction's step asks for.
    for (int64_t row = whole; row < rows_; ++row)
      for (int64_t c = 0; c < channels_; c += kLanes) {
        const int64_t pixel = row * kPerWord;
        put(row, c, pixel < pixels_ ? column(c)(index(pixel)) : zero(), zero());
      }
  }

 private:
  void put(int64_t row, int64_t c, V low, [[maybe_unused]] V high) const {
    if constexpr (Words::kPerWord == 1) store(at(row, c), low);
#if FASTCNN_ISA_LEVEL >= 3
    else
      store_pairs(at(row, c), low, high);
#endif
  }

  float* data_;
  int64_t pixels_, channels_, rows_;
};

// dw [n][pitch] (+)= dy^T a
template <class Words>
void accumulate_weight_gradient(const WgradTile<Words>& dy, const WgradTile<Words>& a, float* dw,
                                int64_t pitch, bool accumulate) {
#if FASTCNN_ISA_LEVEL >= 4
  if constexpr (Words::kPerWord == 2) return amx_accumulate_weight_gradient(dy, a, dw, pitch, accumulate);
#endif
  constexpr int kColumns = kMicroVectors * kLanes;
  for (int64_t k = 0; k < a.channels(); k += kColumns) {
    const int vectors = a.channels() - k > kLanes ? 2 : 1;
    for (int64_t block = 0; block < dy.channels(); block += kBlockWords) {
      const int64_t in_block = dy.channels() - block < kBlockWords ? dy.channels() - block : kBlockWords;
      for_each_piece(in_block, kMicroRows, [&](int64_t first, int64_t count) {
        const auto run = [&](auto tile) {
          tile(int(count), dy.at(0, block + first), a.at(0, k), kRowWords, kLanes, a.rows(),
               dw + (block + first) * pitch + k, pitch, accumulate);
        };
        if (vectors == 2)
          run(microtile_of_rows<Words, kMicroRows, 2, 1, kRowWords>);
        else
          run(microtile_of_rows<Words, kMicroRows, 1, 1, kRowWords>);
      });
    }
  }
}

// dw [n, k] over chunks' [n][pitch], in the chunks' order.
inline void merge_weight_gradients(const float* chunks, int64_t count, int64_t n, int64_t k, int64_t pitch,
                                   float* dw) {
  parallel_for(n, [&](int64_t row) {
    for (int64_t c = 0; c < k; c += kLanes) {
      V total = load(chunks + row * pitch + c);
      for (int64_t chunk = 1; chunk < count; ++chunk)
        total = add(total, load(chunks + (chunk * n + row) * pitch + c));
      store_upto(dw + row * k + c, total, k - c);
    }
  });
}

}  // namespace
}  // namespace fastcnn
