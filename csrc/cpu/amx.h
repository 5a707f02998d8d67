// The products' tile loops on AMX: 32 x 32 results in four tiles, two loads per two dot products.
#pragma once

#include <type_traits>

#include "cpu/amx_tiles.h"

namespace fastcnn {
namespace {

constexpr int64_t kAmxBlock = 32;

// As multiply_tile. Rows of the last block beyond the tile's are computed from whatever the scratch holds,
// and dropped.
template <class Sink>
void amx_multiply_tile(const TileWriter<PairWords>& a, int64_t rows, const PackedView<PairWords>& b,
                       int64_t first, int64_t last, const Sink& sink) {
  alignas(64) float c[kAmxBlock * kAmxBlock];
  [[maybe_unused]] const TileSession session;
  for (int64_t panel = first; panel < last; panel += 2) {
    const int64_t panels = last - panel < 2 ? 1 : 2;
    for (int64_t row = 0; row < rows; row += kAmxBlock) {
      const int64_t count = rows - row < kAmxBlock ? rows - row : kAmxBlock;
      with_block_shape(count, panels, [&](auto row_tiles, auto panel_tiles) {
        block_zero();
        for (int64_t word = 0; word < b.words; word += kTileWords)
          block_step<row_tiles, panel_tiles>(a.at(row, word), kRowWords, b.panel(panel) + word * kLanes,
                                             kLanes, b.panel_stride());
        block_store<row_tiles, panel_tiles>(c, kAmxBlock);
      });
      sink(c, kAmxBlock, row, count, panel * kLanes, panels * kLanes);
    }
  }
}

// c [rows][32] (+)= rows of an A tile times `panels` panels of B over `words` of the reduction; c holds whole
// blocks of rows. As above, what lies beyond `rows` is computed too.
inline void amx_accumulate_tile(const TileWriter<PairWords>& a, int64_t rows, const float* b, int64_t b_panel,
                                int64_t panels, int64_t words, float* c, bool accumulate) {
  [[maybe_unused]] const TileSession session;
  for (int64_t row = 0; row < rows; row += kAmxBlock)
    with_block_shape(rows - row, panels, [&](auto row_tiles, auto panel_tiles) {
      float* block = c + row * kAmxBlock;
      if (accumulate)
        block_load<row_tiles, panel_tiles>(block, kAmxBlock);
      else
        block_zero();
      for (int64_t word = 0; word < words; word += kTileWords)
        block_step<row_tiles, panel_tiles>(a.at(row, word), kRowWords, b + word * kLanes, kLanes, b_panel);
      block_store<row_tiles, panel_tiles>(block, kAmxBlock);
    });
}

// dw [n][pitch] (+)= dy^T a: A tiles want a channel's pixels side by side, so dy's words are transposed on
// the way.
template <class Tile>
void amx_accumulate_weight_gradient(const Tile& dy, const Tile& a, float* dw, int64_t pitch,
                                    bool accumulate) {
  alignas(64) float c[kAmxBlock * kAmxBlock];
  AlignedBuffer<float> transposed(size_t(kAmxBlock * dy.rows()));
  [[maybe_unused]] const TileSession session;
  for (int64_t n = 0; n < dy.channels(); n += kAmxBlock) {
    const int64_t count = dy.channels() - n < kAmxBlock ? dy.channels() - n : kAmxBlock;
    for (int64_t j = 0; j < count; j += kLanes)
      for (int64_t row = 0; row < dy.rows(); row += kTileWords) {
        V words[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) words[i] = load(dy.at(row + i, n + j));
        transpose(words);
        for (int64_t i = 0; i < kLanes; ++i) store(transposed.data() + (j + i) * dy.rows() + row, words[i]);
      }
    for (int64_t k = 0; k < a.channels(); k += kAmxBlock) {
      const int64_t columns = a.channels() - k > kTileWords ? kAmxBlock : kTileWords;
      with_block_shape(count, columns / kTileWords, [&](auto row_tiles, auto panel_tiles) {
        block_zero();
        for (int64_t row = 0; row < dy.rows(); row += kTileWords)
          block_step<row_tiles, panel_tiles>(transposed.data() + row, dy.rows(), a.at(row, k), kRowWords,
                                             kTileWords);
        block_store<row_tiles, panel_tiles>(c, kAmxBlock);
      });
      for (int64_t j = 0; j < count; ++j)
        for (int64_t v = 0; v < columns; v += kLanes) {
          float* out = dw + (n + j) * pitch + k + v;
          const V sum = load(c + j * kAmxBlock + v);
          store(out, accumulate ? add(load(out), sum) : sum);
        }
    }
  }
}

}  // namespace
}  // namespace fastcnn
