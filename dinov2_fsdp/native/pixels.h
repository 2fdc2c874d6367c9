// What colours and resampling share: bytes of pixels, sixteen at a time.

#pragma once

#include "common.h"

#ifdef __AVX512F__

using Byte = std::uint8_t;

// What was drawn for a crop, and where it is wanted. As data/fast_augment.py packs it.
struct Crop {
  std::int64_t top, left, height, width;  // of its box in the image
  std::int64_t size;
  Byte* planes;                // (3, size, size)
  const std::int16_t* kernel;  // of the blur: the middle and `radius` weights behind it, times 2^15
  std::int64_t radius;         // less than 0 for none
  std::int32_t flip, grey;
  std::int32_t threshold;  // values from this one on are inverted
  std::int32_t operations;
  std::int32_t kinds[4];  // of them, in order, each with its factor; hue's is what is added, 0 to 255
  float factors[4];
};

// Into the crop's planes: the pixels in its box, of an image with three bytes each and rows `row_bytes` apart.
void resample(const Byte* pixels, std::int64_t row_bytes, const Crop& crop);

// In their place: operations, grey, blur, inversion.
void recolour(const Crop& crop);

namespace {

inline __m512 all(float value) { return _mm512_set1_ps(value); }
inline __m512 whole(__m512 value) { return _mm512_cvtepi32_ps(_mm512_cvttps_epi32(value)); }
inline __m512 limited(__m512 value) {
  return whole(_mm512_min_ps(_mm512_max_ps(value, _mm512_setzero_ps()), all(255.0f)));
}

inline __mmask16 first_of(Index count) { return static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1u); }

// Sixteen pixels of three bytes each, channel by channel.
class Splitter {
 public:
  Splitter() {
    // Which of 48 bytes belong to a channel, for each third of them by itself; -1 is none of it.
    for (int channel = 0; channel < 3; ++channel)
      for (int part = 0; part < 3; ++part) {
        alignas(16) signed char places[16];
        for (int i = 0; i < 16; ++i) {
          const int at = 3 * i + channel - 16 * part;
          places[i] = static_cast<signed char>(at >= 0 && at < 16 ? at : -1);
        }
        orders_[channel][part] = _mm_load_si128(reinterpret_cast<const __m128i*>(places));
      }
  }
  // Of so many pixels, what is beyond being zeros; `take(channel, bytes)`.
  template <typename Take>
  void operator()(const Byte* pixels, Index count, const Take& take) const {
    const Index bytes = 3 * std::min<Index>(count, 16);
    const __m128i first = _mm_maskz_loadu_epi8(first_of(bytes), pixels);
    const __m128i second = _mm_maskz_loadu_epi8(first_of(std::max<Index>(0, bytes - 16)), pixels + 16);
    const __m128i third = _mm_maskz_loadu_epi8(first_of(std::max<Index>(0, bytes - 32)), pixels + 32);
    for (int channel = 0; channel < 3; ++channel) {
      __m128i found = _mm_shuffle_epi8(first, orders_[channel][0]);
      found = _mm_or_si128(found, _mm_shuffle_epi8(second, orders_[channel][1]));
      found = _mm_or_si128(found, _mm_shuffle_epi8(third, orders_[channel][2]));
      take(channel, found);
    }
  }

 private:
  __m128i orders_[3][3];
};

}  // namespace

#endif
