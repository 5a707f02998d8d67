// Stripes: the source lines that a few output lines of a convolution read, prologue applied once, zeros
// around them. A product then addresses its rows in the stripe itself, tap by tap: there is no im2col buffer,
// and no patch is copied.
#pragma once

#include "cpu/prologue.h"
#include "cpu/statistics.h"
#include "ops/conv2d.h"

namespace fastcnn {
namespace {

// Output pixel (line, column) reads source pixels from (line * stride_h + low_h, column * stride_w + low_w)
// on.
struct StripeShape {
  int64_t images = 0, lines = 0, columns = 0;  // of the output, lines per image
  int64_t source_h = 0, source_w = 0;
  int64_t stride_h = 1, stride_w = 1;
  int64_t low_h = 0, low_w = 0;
  int64_t span_h = 1, span_w = 1;  // how far one output pixel reaches

  int64_t total_lines() const { return images * lines; }
  // Source columns and lines that neighbouring output columns, or lines of one image, read.
  int64_t source_columns(int64_t count) const { return (count - 1) * stride_w + span_w; }
  int64_t source_lines(int64_t count) const { return (count - 1) * stride_h + span_h; }
  // Source columns before the image and, of `count`, after it: zeros.
  int64_t columns_before(int64_t count) const { return low_w < 0 ? (-low_w < count ? -low_w : count) : 0; }
  int64_t columns_after(int64_t count) const {
    const int64_t inside = source_w - low_w, before = columns_before(count);
    return count - (inside < before ? before : inside < count ? inside : count);
  }
  // From a source line to the next, whole strides: the zeros after a line are those before the next one, as
  // far as the kernel reaches. With more in common two lines' results would be the same rows.
  int64_t line_pitch(int64_t count) const {
    const int64_t before = columns_before(count), after = columns_after(count), reach = span_w - 1;
    const int64_t shared = before < after ? before : after;
    return round_up(count - (shared < reach ? shared : reach), stride_w);
  }
  // f(first, count) for output lines [first, last), image by image.
  template <class F>
  void for_images(int64_t first, int64_t last, const F& f) const {
    for (int64_t line = first; line < last;) {
      const int64_t rest = lines - line % lines, count = last - line < rest ? last - line : rest;
      f(line, count);
      line += count;
    }
  }
  // Places for the source lines behind `count` output lines of an image, whole strides of them.
  int64_t image_slots(int64_t count) const { return round_up(source_lines(count), stride_h); }
  // The same of several images; a line of another image shares none with its neighbour.
  int64_t slots(int64_t count) const {
    const int64_t breaks = (count + lines - 2) / lines;
    return count * stride_h + (breaks + 1) * (image_slots(1) - stride_h);
  }
};

// Units of work of near-equal numbers of output lines, whose stripes take at most `bytes`. They depend on the
// shape alone, so that any number of threads sums in one order.
struct LineUnits {
  int64_t total, count;

  LineUnits(const StripeShape& s, int64_t slot_bytes, int64_t bytes, int64_t begin = 0, int64_t end = -1,
            int64_t most_pixels = kUnitPixels)
      : total(end < 0 ? s.total_lines() : end - begin), begin_(begin) {
    int64_t most = 1;
    while (most < total && (most + 1) * s.columns <= most_pixels && s.slots(most + 1) * slot_bytes <= bytes)
      ++most;
    count = ceil_div(total, most);
  }
  // For threads to share: no fewer than `least` if there are so many lines, and an even number, or a thread
  // waits for the last one.
  LineUnits shared(int64_t least = 1) const {
    LineUnits units = *this;
    if (units.count < least) units.count = least < total ? least : total;
    if (units.count > 1 && units.count < total) units.count = round_up(units.count, 2);
    return units;
  }
  int64_t first(int64_t unit) const { return begin_ + total * unit / count; }
  int64_t lines(int64_t unit) const { return first(unit + 1) - first(unit); }
  int64_t longest() const { return ceil_div(total, count); }

 private:
  int64_t begin_;
};

// Source lines lie close, so that the rows of several output lines are one run with little between them: the
// zeros after a line are those before the next one, a line's pixels are whole strides, and the lines that a
// tap reads, every stride_h-th, follow each other.
template <class Words>
class Stripe {
 public:
  // `columns` is the least number of output columns that a line must hold.
  Stripe(const StripeShape& s, int64_t words, int64_t columns)
      : s_(s),
        pitch_(odd_lines(words)),
        columns_(s.source_columns(columns)),
        slot_columns_(s.line_pitch(columns_)) {}

  int64_t slot_floats() const { return slot_columns_ * pitch_; }
  // Of what `hold`s so many lines. The last one's zeros lie by themselves; an AMX tile may read up to 31 rows
  // past the last pixel.
  int64_t floats(int64_t lines) const {
    return s_.slots(lines) * slot_floats() + (columns_ + 32 * s_.stride_w) * pitch_;
  }
  // The most output lines that are filled at once.
  void hold(int64_t lines) { phase_slots_ = s_.slots(lines) / s_.stride_h; }

  int64_t column_step() const { return s_.stride_w * pitch_; }
  int64_t tap(int64_t h, int64_t w) const { return place(h) * slot_floats() + w * pitch_; }

  // Where the first pixel of an output line begins to read.
  const float* line(int64_t index) const { return data_ + place(slot(index)) * slot_floats(); }
  int64_t line_step() const { return slot_floats(); }
  // f(first, count) for output lines [first, last), image by image: within one they lie line_step() apart.
  template <class F>
  void for_images(int64_t first, int64_t last, const F& f) const {
    s_.for_images(first, last, f);
  }

  // Reads what output lines [first, last) need of `channels` channels: column(c) makes a function of a source
  // pixel, whose value is its vector from channel c on.
  template <class Column>
  void fill(float* data, int64_t first, int64_t last, int64_t channels, const Column& column) {
    open(data, first);
    for_source_lines(first, last, [&](int64_t image, int64_t h, float* out) {
      fill_line(image, h, out, [&](int64_t pixel, float* at, auto group) {
        write_pixels(pixel, at, group, channels, column);
      });
    });
  }

  // The same for a product that reduces over pixels: a word holds a channel of a source line, and in bf16
  // also of the line that the next output line reads.
  template <class Column>
  void fill_reduction(float* data, int64_t first, int64_t last, int64_t channels, const Column& column) {
    if constexpr (Words::kPerWord == 1) return fill(data, first, last, channels, column);
    open(data, first);
    for_source_lines(first, last, [&](int64_t image, int64_t h, float* out) {
      fill_line_pairs(image, h, out, channels, column);
    });
  }

 private:
  void open(float* data, int64_t first) {
    data_ = data;
    image_ = first / s_.lines;
    line_ = first % s_.lines;
  }

  int64_t slot(int64_t index) const {
    const int64_t image = index / s_.lines - image_, line = index % s_.lines;
    if (image == 0) return (line - line_) * s_.stride_h;
    const int64_t opening = s_.image_slots(s_.lines - line_);
    return opening + (image - 1) * s_.image_slots(s_.lines) + line * s_.stride_h;
  }
  // Slots of one remainder by stride_h follow each other.
  int64_t place(int64_t slot) const { return slot % s_.stride_h * phase_slots_ + slot / s_.stride_h; }

  // f(image, source line, slot) for every slot that lines [first, last) read.
  template <class F>
  void for_source_lines(int64_t first, int64_t last, const F& f) const {
    for_images(first, last, [&](int64_t index, int64_t count) {
      const int64_t image = index / s_.lines, line = index % s_.lines, base = slot(index);
      for (int64_t i = 0; i < s_.source_lines(count); ++i)
        f(image, line * s_.stride_h + s_.low_h + i, data_ + place(base + i) * slot_floats());
    });
  }

  static float* channel(float* pixel, int64_t c) { return pixel + c / Words::kPerWord; }
  void clear(float* out, int64_t pixels) const {
    for (int64_t i = 0; i < pixels * pitch_; i += kLanes) store(out + i, zero());
  }

  int64_t first_inside() const { return s_.columns_before(columns_); }
  int64_t last_inside() const { return columns_ - s_.columns_after(columns_); }

  template <class Group, class Column>
  [[gnu::always_inline]] void write_pixels(int64_t pixel, float* at, Group group, int64_t channels,
                                           const Column& column) const {
    if constexpr (kPlain<Words, decltype(column(0))>) {
      const auto from = column(0);
      for (int i = 0; i < group; ++i)
        for (int64_t c = 0; c < channels; c += 2 * kLanes)
          store(reinterpret_cast<uint16_t*>(channel(at + i * pitch_, c)),
                load_words(from.data + (pixel + i) * from.ld + c, int(channels - c)));
      return;
    }
    const int64_t padded = reduction_words<Words>(channels) * Words::kPerWord;
    for_vector_pairs(
        channels,
        [&](int64_t c) {
          const auto low = column(c), high = column(c + kLanes);
          for (int i = 0; i < group; ++i)
            store_channels<Words>(channel(at + i * pitch_, c), low(pixel + i, std::true_type()),
                                  high(pixel + i, std::true_type()));
        },
        [&](int64_t c, auto whole) {
          const auto value = column(c);
          for (int i = 0; i < group; ++i)
            store_channels<Words>(channel(at + i * pitch_, c), value(pixel + i, whole));
        });
    for (int64_t c = round_up(channels, kLanes); c < padded; c += kLanes)
      for (int i = 0; i < group; ++i) store_channels<Words>(channel(at + i * pitch_, c), zero());
  }

  // write(pixel, at, group) for the pixels of a source line that exist, `group` at a time, zeros for the
  // others.
  template <class Write>
  void fill_line(int64_t image, int64_t h, float* out, const Write& write) const {
    if (h < 0 || h >= s_.source_h) return clear(out, columns_);
    const int64_t begin = first_inside(), end = last_inside();
    const int64_t pixel = (image * s_.source_h + h) * s_.source_w + s_.low_w;
    clear(out, begin);
    for_rows(end - begin,
             [&](int64_t i, auto group) { write(pixel + begin + i, out + (begin + i) * pitch_, group); });
    clear(out + end * pitch_, columns_ - end);
  }

  template <class Column>
  void fill_line_pairs([[maybe_unused]] int64_t image, [[maybe_unused]] int64_t h,
                       [[maybe_unused]] float* out, [[maybe_unused]] int64_t channels,
                       [[maybe_unused]] const Column& column) const {
#if FASTCNN_ISA_LEVEL >= 3
    const int64_t next = h + s_.stride_h, begin = first_inside(), end = last_inside();
    const bool low = h >= 0 && h < s_.source_h, high = next >= 0 && next < s_.source_h;
    if (!low && !high) return clear(out, columns_);
    const int64_t pixel = (image * s_.source_h + h) * s_.source_w + s_.low_w,
                  below = s_.stride_h * s_.source_w;
    clear(out, begin);
    for_rows(end - begin, [&](int64_t at, auto group) {
      const int64_t i = begin + at;
      for_vectors(channels, [&](int64_t c, auto whole) {
        const auto value = column(c);
        for (int g = 0; g < group; ++g)
          store_pairs(out + (i + g) * pitch_ + c, low ? value(pixel + i + g, whole) : zero(),
                      high ? value(pixel + i + g + below, whole) : zero());
      });
    });
    clear(out + end * pitch_, columns_ - end);
#endif
  }

  const StripeShape& s_;
  const int64_t pitch_, columns_, slot_columns_;
  int64_t phase_slots_ = 0;
  float* data_ = nullptr;
  int64_t image_ = 0, line_ = 0;
};

}  // namespace
}  // namespace fastcnn
