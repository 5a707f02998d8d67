// The weight gradient's product dW [n, k] += dy^T a, reduced over pixels.
//
// Both operands lie as [channel / kBlock][pixel words][kPitch] (RowLayout): a word is one pixel's float, or
// two neighbouring pixels' bf16, of one channel. The microtile of the forward then serves with its strides
// exchanged.
#pragma once

#include "cpu/gemm.h"
#include "cpu/prologue.h"
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
  using Layout = RowLayout<Words>;
  return Layout::distance(wgrad_rows<Words>(pixels)) *
         (ceil_div(n, Layout::kBlock) + ceil_div(k, Layout::kBlock)) * Layout::kPitch;
}

template <class Words>
class WgradTile {
  using Layout = RowLayout<Words>;

 public:
  WgradTile(float* data, int64_t pixels, int64_t channels)
      : data_(data), pixels_(pixels), channels_(channels), rows_(wgrad_rows<Words>(pixels)) {}

  int64_t pixels() const { return pixels_; }
  int64_t channels() const { return channels_; }
  int64_t rows() const { return rows_; }
  // `count` channels from `first` on; not across a block of kBlockWords, and from the first of a block of the
  // layout.
  WgradTile slice(int64_t first, int64_t count) const { return {at(0, first), pixels_, count}; }
  // Between a block of channels and the next.
  int64_t block_floats() const { return Layout::distance(rows_) * Layout::kPitch; }
  float* end() const { return data_ + ceil_div(channels_, Layout::kBlock) * block_floats(); }
  float* at(int64_t row, int64_t channel) const {
    return data_ + channel / Layout::kBlock * block_floats() + row * Layout::kPitch +
           channel % Layout::kBlock;
  }

  // column(c) makes a function of index(pixel), whose value is the pixel's vector from channel c on.
  template <class Index, class Column>
  void fill(const Index& index, const Column& column) const {
    fill_rows(0, rows_, index, column);
  }
  template <class Index, class Column>
  void fill_rows(int64_t first, int64_t last, const Index& index, const Column& column) const {
    constexpr int kPerWord = Words::kPerWord;
    const int64_t whole = pixels_ / kPerWord < last ? pixels_ / kPerWord : last;
    for_rows(whole - first, [&](int64_t from, auto group) {
      const int64_t row = first + from;
      int64_t at[group * kPerWord];
      for (int i = 0; i < group * kPerWord; ++i) at[i] = index(row * kPerWord + i);
      for_vectors(channels_, [&](int64_t c, auto whole) {
        const auto value = column(c);
        for (int i = 0; i < group; ++i)
          put(row + i, c, value(at[i * kPerWord], whole), value(at[i * kPerWord + kPerWord - 1], whole));
      });
    });
    // A last pixel without a partner, and rows that only the reduction's step asks for.
    for (int64_t row = whole > first ? whole : first; row < last; ++row)
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

// A block of dW and the tiles of its two operands take a third of a 1 MB L2 together; a tile of 112 words per
// channel loads and stores the block once per 112 products.
constexpr int64_t kBlockChannels = 128, kBlockRowWords = 112;
constexpr int64_t kFillWords = 28;                     // that one unit of work packs
constexpr int64_t kPackedBandBytes = 8 * 1024 * 1024;  // of both operands, for all blocks: of a shared cache

// dw [n][pitch] = dy^T a where dw fits no cache: both operands are packed once per band of pixels, whole
// pixels at a time, and then read by every block of dw. fill(pixel, first, last, dy, a) packs rows [first,
// last) of the tiles whose first pixel is `pixel`.
template <class Words, class Fill>
void weight_gradient_by_blocks(int64_t pixels, int64_t n, int64_t k, float* dw, int64_t pitch,
                               const Fill& fill) {
  constexpr int64_t kPixels = kBlockRowWords * Words::kPerWord;
  const int64_t tiles = ceil_div(pixels, kPixels), tile_floats = wgrad_floats<Words>(kPixels, n, k);
  const int64_t fit = kPackedBandBytes / 4 / tile_floats, most = fit < 1 ? 1 : fit;
  const int64_t bands = ceil_div(tiles, most), band_tiles = ceil_div(tiles, bands);
  const int64_t n_blocks = ceil_div(n, kBlockChannels), k_blocks = ceil_div(k, kBlockChannels);
  AlignedBuffer<float> packed(size_t(band_tiles * tile_floats));
  const auto dy_tile = [&](int64_t tile) {
    const int64_t left = pixels - tile * kPixels;
    return WgradTile<Words>(packed.data() + tile % band_tiles * tile_floats, left < kPixels ? left : kPixels,
                            n);
  };
  const auto a_tile = [&](const WgradTile<Words>& dy) { return WgradTile<Words>(dy.end(), dy.pixels(), k); };
  for (int64_t first = 0; first < tiles; first += band_tiles) {
    const int64_t last = first + band_tiles < tiles ? first + band_tiles : tiles;
    constexpr int64_t kFills = kBlockRowWords / kFillWords;
    parallel_for((last - first) * kFills, [&](int64_t unit) {
      const int64_t tile = first + unit / kFills, row = unit % kFills * kFillWords;
      const auto dy = dy_tile(tile);
      const int64_t end = row + kFillWords < dy.rows() ? row + kFillWords : dy.rows();
      if (row < end) fill(tile * kPixels, row, end, dy, a_tile(dy));
    });
    parallel_for(n_blocks * k_blocks, [&](int64_t block) {
      const int64_t n0 = block / k_blocks * kBlockChannels, k0 = block % k_blocks * kBlockChannels;
      const int64_t n_count = n - n0 < kBlockChannels ? n - n0 : kBlockChannels;
      const int64_t k_count = k - k0 < kBlockChannels ? k - k0 : kBlockChannels;
      for (int64_t tile = first; tile < last; ++tile) {
        const auto dy = dy_tile(tile);
        accumulate_weight_gradient(dy.slice(n0, n_count), a_tile(dy).slice(k0, k_count), dw + n0 * pitch + k0,
                                   pitch, tile > 0);
      }
    });
  }
}

}  // namespace
}  // namespace fastcnn
