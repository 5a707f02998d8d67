// The products' tile loops on AMX: 32 x 32 results in four tiles, two loads per two dot products.
#pragma once

#include <type_traits>

#include "cpu/amx_tiles.h"

namespace fastcnn {
namespace {

constexpr int64_t kAmxBlock = 32;

// Rows of products that lie one after the other: of every `pitch` the first `length` are results, the others
// are dropped. Result i of the run is the sink's row `first` + i.
struct RowRun {
  int64_t first, length, pitch;
};

// Blocks of results on their way to a sink that takes a few rows between two steps of the next block's
// product: tiles and vectors then work at the same time, where a sink after each block leaves the tiles idle.
template <class Sink>
class OverlappedSink {
 public:
  // `steps` that a block's product has, if any.
  OverlappedSink(const Sink& sink, int64_t steps)
      : sink_(sink),
        interval_(steps < kPieces ? 1 : steps / kPieces),
        piece_(steps < kPieces ? ceil_div(kAmxBlock, steps + (steps == 0)) : kAmxBlock / kPieces) {}

  // Where the next block is stored.
  float* block() { return blocks_[current_]; }
  // What block() holds: `count` rows of the run from `row` on.
  void put(const RowRun& run, int64_t row, int64_t count, int64_t column, int64_t columns) {
    c_ = blocks_[current_];
    current_ ^= 1;
    run_ = run;
    row_ = row, count_ = count, column_ = column, columns_ = columns;
    done_ = 0, wait_ = interval_;
  }
  // Between two steps.
  void advance() {
    if (done_ < count_ && --wait_ == 0) take(piece_);
  }
  void finish() {
    if (done_ < count_) take(count_ - done_);
  }

 private:
  static constexpr int64_t kPieces = 4;

  [[gnu::noinline]] void take(int64_t rows) {
    const int64_t end = count_ - done_ < rows ? count_ : done_ + rows;
    while (done_ < end) {
      const int64_t line = (row_ + done_) / run_.pitch, at = (row_ + done_) % run_.pitch;
      if (at >= run_.length) {
        done_ += run_.pitch - at;
        continue;
      }
      const int64_t rest = run_.length - at, n = end - done_ < rest ? end - done_ : rest;
      sink_(c_ + done_ * kAmxBlock, kAmxBlock, run_.first + line * run_.length + at, n, column_, columns_);
      done_ += n;
    }
    wait_ = interval_;
  }

  const Sink& sink_;
  const int64_t interval_, piece_;
  RowRun run_{0, 1, 1};
  int64_t row_ = 0, count_ = 0, column_ = 0, columns_ = 0, done_ = 0, wait_ = 0;
  int current_ = 0;
  float* c_ = nullptr;
  alignas(64) float blocks_[2][kAmxBlock * kAmxBlock];
};

// As multiply_tile. Rows of the last block beyond the tile's are computed from whatever the scratch holds,
// and dropped.
template <class Rows, class Sink>
void amx_multiply_tile(const Rows& a, int64_t rows, const PackedView<PairWords>& b, int64_t first,
                       int64_t last, const Sink& sink) {
  OverlappedSink<Sink> results(sink, b.words / kTileWords);
  const RowRun run{0, rows, rows};
  [[maybe_unused]] const TileSession session;
  for (int64_t panel = first; panel < last; panel += 2) {
    const int64_t panels = last - panel < 2 ? 1 : 2;
    for (int64_t row = 0; row < rows; row += kAmxBlock) {
      const int64_t count = rows - row < kAmxBlock ? rows - row : kAmxBlock;
      with_block_shape(count, panels, [&](auto row_tiles, auto panel_tiles) {
        block_zero();
        for (int64_t word = 0; word < b.words; word += kTileWords) {
          block_step<row_tiles, panel_tiles>(a.at(row, word), a.row_words() * 4,
                                             b.panel(panel) + word * kLanes, kLanes, b.panel_stride());
          results.advance();
        }
        results.finish();
        block_store<row_tiles, panel_tiles>(results.block(), kAmxBlock);
      });
      results.put(run, row, count, panel * kLanes, panels * kLanes);
    }
  }
  results.finish();
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
        block_step<row_tiles, panel_tiles>(a.at(row, word), kTileWords * 4, b + word * kLanes, kLanes,
                                           b_panel);
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
            block_step<row_tiles, panel_tiles>(transposed.data() + row, dy.rows() * 4, a.at(row, k),
                                               kTileWords, a.block_floats());
        });
      });
    }
  }
}

}  // namespace
}  // namespace fastcnn
