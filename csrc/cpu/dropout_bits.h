// Which elements a dropout keeps, drawn where they are needed.
#pragma once

#include "cpu/philox.h"
#include "cpu/prologue.h"
#include "ops/dropout.h"

namespace fastcnn {
namespace {

constexpr int64_t kStretch = 8192;
// Draws are made in short pieces: the processor fetches the next lines of x while it draws.
constexpr int64_t kPiece = 512;

// Which elements of a stretch stay.
class KeptBits {
 public:
  // Elements are drawn `piece` at a time: a whole number of Philox's blocks.
  explicit KeptBits(const DropoutMask& mask, int64_t piece = kPiece)
      : m_(mask), philox_(mask.seed, mask.offset), piece_(piece) {}

  // For elements of `row` from channel c on, `count` of them or fewer; returns how many.
  int64_t draw(int64_t row, int64_t c, int64_t count) {
    const bool sample = m_.unit == kDropSample, element = m_.unit == kDropElement;
    const int64_t first = m_.first_draw(row) + (sample ? 0 : c), wanted = element || sample ? 1 : count;
    // The rows of a sample share their draws, and short rows a piece.
    if (first < first_ || first + wanted > end_) make(first, element ? piece_ - first % piece_ : wanted);
    if (sample) all_ = bits_[0] >> first % kDrawsPerBlock & 1 ? ~0u : 0u;
    bit_ = first - first_ / kDrawsPerBlock * kDrawsPerBlock;
    return element && end_ - first < count ? end_ - first : count;
  }

  // Bits of the elements from the i-th of the stretch on.
  uint32_t from(int64_t i) const {
    if (m_.unit == kDropSample) return all_;
    const uint32_t* at = bits_ + (bit_ + i) / kDrawsPerBlock;
    return uint32_t((uint64_t(at[1]) << 32 | at[0]) >> (bit_ + i) % kDrawsPerBlock);
  }

 private:
  void make(int64_t first, int64_t draws) {
    first_ = first;
    end_ = first + draws;
    const int64_t begin = first / kDrawsPerBlock, last = (end_ - 1) / kDrawsPerBlock;
    const bool none = m_.threshold >> 32;
    for (int64_t block = begin; block <= last; block += Philox::kBlocks)
      if (none)
        std::memset(bits_ + (block - begin), 0, Philox::kBlocks * sizeof(uint32_t));
      else
        philox_.at_least(block, uint32_t(m_.threshold), bits_ + (block - begin));
  }

  const DropoutMask& m_;
  const Philox philox_;
  const int64_t piece_;
  int64_t first_ = 0, end_ = 0;  // draws whose bits are here
  int64_t bit_ = 0;              // of the stretch's first element
  uint32_t all_ = 0;
  uint32_t bits_[kStretch / kDrawsPerBlock + 1 + Philox::kBlocks];
};

// Applies an elementwise mask to results c [rows][ldc] of pixels from `pixel` and channels from `channel` on.
inline void drop(const DropoutMask& mask, float* c, int64_t ldc, int64_t pixel, int64_t rows, int64_t channel,
                 int64_t columns) {
  KeptBits kept(mask, Philox::kBlocks * kDrawsPerBlock);  // a block of results is drawn without a rest
  const V scale = set(mask.scale);
  const int64_t rest = mask.channels - channel, real = columns < rest ? columns : rest;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t at = 0; at < real;) {
      const int64_t count = kept.draw(pixel + r, channel + at, real - at);
      for (int64_t i = 0; i < count; i += kLanes) {
        float* value = c + r * ldc + at + i;
        store_upto(value, keep(mul(load_upto(value, count - i), scale), kept.from(i)), count - i);
      }
      at += count;
    }
}

}  // namespace
}  // namespace fastcnn
