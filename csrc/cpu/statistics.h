// Statistics and sums in two stages: floats per unit of work, then a merge in double in the order of the
// units, so that the bits do not depend on the number of threads.
#pragma once

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace fastcnn {
namespace {

constexpr int64_t kUnitPixels = 1024;  // bounds the error of a unit's float sums

// Sum and sum of squares of v - shift per channel, where shift is the unit's first value: |mean| >> std
// survives.
struct StatisticsUnit {
  float* shift;
  float* sum;
  float* square;

  void add_rows(const float* c, int64_t ldc, int64_t rows, int64_t channel, bool first) const {
    const V base = first ? load(c) : load(shift + channel);
    V s = zero(), q = zero();
    for (int64_t r = 0; r < rows; ++r) {
      const V d = sub(load(c + r * ldc), base);
      s = add(s, d);
      q = fmadd(d, d, q);
    }
    put(channel, base, s, q, first);
  }

  // Adds the sums of a few rows. Summed by themselves first, they cost the total one rounding, not one each.
  void put(int64_t channel, V base, V s, V q, bool first) const {
    if (first) store(shift + channel, base);
    store(sum + channel, first ? s : add(load(sum + channel), s));
    store(square + channel, first ? q : add(load(square + channel), q));
  }
};

// Merges units' shifted sums ([unit][shift, sum, square][pitch], count(unit) values each) into means and
// biased variances, in double and in the order of the units (Chan, Golub & LeVeque 1979).
template <class Count>
void merge_statistics(const float* units, int64_t unit_count, const Count& count, int64_t channels,
                      int64_t pitch, float* mean, float* var) {
  AlignedBuffer<double> merged(size_t(2 * channels));
  double *m = merged.data(), *m2 = m + channels;
  for (int64_t c = 0; c < channels; ++c) m[c] = m2[c] = 0;
  double total = 0;
  for (int64_t u = 0; u < unit_count; ++u) {
    const float *shift = units + u * 3 * pitch, *sum = shift + pitch, *square = sum + pitch;
    const double n = double(count(u));
    if (n == 0) continue;
    const double share = n / (total + n), cross = total * share;
    for (int64_t c = 0; c < channels; ++c) {
      const double average = double(sum[c]) / n, delta = shift[c] + average - m[c];
      m[c] += delta * share;
      m2[c] += square[c] - double(sum[c]) * average + delta * delta * cross;
    }
    total += n;
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = float(m[c]);
    var[c] = float(m2[c] < 0 ? 0 : m2[c] / total);
  }
}

// sum [channels] over units' vectors, `step` floats apart, in double and in the units' order.
inline void merge_sum(const float* units, int64_t unit_count, int64_t channels, int64_t step, float* sum) {
  AlignedBuffer<double> total(size_t(channels) + 1);
  for (int64_t c = 0; c < channels; ++c) total[c] = 0;
  for (int64_t u = 0; u < unit_count; ++u)
    for (int64_t c = 0; c < channels; ++c) total[c] += units[u * step + c];
  for (int64_t c = 0; c < channels; ++c) sum[c] = float(total[c]);
}

// sums [2, channels] over units' [2][pitch].
inline void merge_sums(const float* units, int64_t unit_count, int64_t channels, int64_t pitch, float* sums) {
  for (int64_t half = 0; half < 2; ++half)
    merge_sum(units + half * pitch, unit_count, channels, 2 * pitch, sums + half * channels);
}

}  // namespace
}  // namespace fastcnn
