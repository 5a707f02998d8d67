// Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a counter to four
// words. The same draws as fastcnn/ops/dropout.py and csrc/cpu/philox.h make.
#pragma once

#include <cstdint>

#include "platform.cuh"

namespace fastcnn::cuda {

class Philox {
 public:
  // seed: the key, and the offset that is the counter's upper half. They are read where the kernel runs, so
  // that every replay of a CUDA graph finds the ones that were drawn for it.
  FASTCNN_DEVICE explicit Philox(const uint64_t* seed)
      : key_low_(uint32_t(seed[0])),
        key_high_(uint32_t(seed[0] >> 32)),
        offset_low_(uint32_t(seed[1])),
        offset_high_(uint32_t(seed[1] >> 32)) {}

  FASTCNN_DEVICE uint4 operator()(uint64_t counter) const {
    uint32_t a = uint32_t(counter), b = uint32_t(counter >> 32), c = offset_low_, d = offset_high_;
    uint32_t low = key_low_, high = key_high_;
#pragma unroll
    for (int i = 0; i < 10; ++i) {
      // Whole products: one instruction each, where the two halves would be two.
      const uint64_t from_a = uint64_t(a) * 0xD2511F53u, from_c = uint64_t(c) * 0xCD9E8D57u;
      a = uint32_t(from_c >> 32) ^ b ^ low;
      b = uint32_t(from_c);
      c = uint32_t(from_a >> 32) ^ d ^ high;
      d = uint32_t(from_a);
      low += 0x9E3779B9u;
      high += 0xBB67AE85u;
    }
    return make_uint4(a, b, c, d);
  }

 private:
  uint32_t key_low_, key_high_, offset_low_, offset_high_;
};

}  // namespace fastcnn::cuda
