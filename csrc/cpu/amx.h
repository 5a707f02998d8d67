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

// c [count][ldc] (+)= what `steps` adds to the block: in the tiles themselves where their rows are whole.
template <int kRowTiles, int kPanels, class Steps>
void accumulate_block(int64_t count, float* c, int64_t ldc, bool accumulate, const Steps& steps) {
  const bool direct = count == kRowTiles * kTileRows;
  if (direct && accumulate)
    block_load<kRowTiles, kPanels>(c, ldc);
  else
    block_zero();
  steps();
  if (direct) return block_store<kRowTiles, kPanels>(c, ldc);
  alignas(64) float block[kAmxBlock * kAmxBlock];
  block_store<kRowTiles, kPanels>(block, kAmxBlock);
  for (int64_t j = 0; j < count; ++j)
    for (int64_t v = 0; v < kPanels * kLanes; v += kLanes) {
      const V sum = load(block + j * kAmxBlock + v);
      store(c + j * ldc + v, accumulate ? add(load(c + j * ldc + v), sum) : sum);
    }
}

// dw [n][pitch] (+)= dy^T a: A tiles want a channel's pixels side by side, so dy's words are transposed on
// the way.
template <class Tile>
void amx_accumulate_weight_gradient(const Tile& dy, const Tile& a, float* dw, int64_t pitch,
                                    bool accumulate) {
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
        accumulate_block<row_tiles, panel_tiles>(count, dw + n * pitch + k, pitch, accumulate, [&] {
          for (int64_t row = 0; row < dy.rows(); row += kTileWords)
            block_step<row_tiles, panel_tiles>(transposed.data() + row, dy.rows(), a.at(row, k), kRowWords,
                                               kTileWords);
        });
      });
    }
  }
}

}  // namespace
}  // namespace fastcnn
