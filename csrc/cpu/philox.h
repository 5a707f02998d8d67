// Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), several counters at
// once.
#pragma once

#include "cpu/vec.h"

namespace fastcnn {
namespace {

constexpr int kDrawsPerBlock = 32;

class Philox {
 public:
  Philox(uint64_t seed, uint64_t offset)
      : offset_low_(uint32_t(offset)), offset_high_(uint32_t(offset >> 32)) {
    uint32_t low = uint32_t(seed), upper = uint32_t(seed >> 32);
    for (int i = 0; i < kRounds; ++i, low += 0x9E3779B9u, upper += 0xBB67AE85u)
      keys_[i][0] = low, keys_[i][1] = upper;
  }

  // Bit i of out[j]: whether draw kDrawsPerBlock * (block + j) + i is at least `threshold`; kBlocks of them.
  void at_least(int64_t block, uint32_t threshold, uint32_t* out) const {
    constexpr int64_t kGroup = kDrawsPerBlock / 4;  // counters of a block
    for (int j = 0; j < kBlocks; ++j) out[j] = 0;
    for (int i = 0; i < kGroup; i += kCounters) {
      U c[kBlocks][4];
      for (int j = 0; j < kBlocks; ++j) {
        c[j][0] = counters(uint64_t(block + j) * kGroup + i);
        c[j][1] = high(c[j][0]);
        c[j][2] = words(offset_low_);
        c[j][3] = words(offset_high_);
      }
      scramble(c);
      for (int j = 0; j < kBlocks; ++j) out[j] |= fastcnn::at_least(c[j], threshold) << 4 * i;
    }
  }

  // A block's rounds wait for one another and fill the processor's scheduler while they do: hence several
  // side by side, as many as fit the registers with four words each.
#if FASTCNN_ISA_LEVEL >= 2
  static constexpr int kBlocks = 4;
#else
  static constexpr int kBlocks = 2;
#endif

 private:
  static constexpr int kRounds = 10;

  void scramble(U (&c)[kBlocks][4]) const {
    const U m0 = words(0xD2511F53u), m1 = words(0xCD9E8D57u);
#pragma GCC unroll 10
    for (int i = 0; i < kRounds; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kBlocks; ++j) {
        const U p0 = multiply(c[j][0], m0), p1 = multiply(c[j][2], m1);
        c[j][0] = exclusive_or(high(p1), c[j][1], words(keys_[i][0]));
        c[j][1] = p1;
        c[j][2] = exclusive_or(high(p0), c[j][3], words(keys_[i][1]));
        c[j][3] = p0;
      }
  }

  uint64_t offset_low_, offset_high_, keys_[kRounds][2];  // 32 bits each, as the vectors broadcast them
};

}  // namespace
}  // namespace fastcnn
