// Colours, blur and solarisation of one crop. Operations in a row go through memory once; what becomes of a value by
// itself (brightness, contrast once the mean is known) is looked up where a table fits into registers, in a pass of its
// own; contrast's mean and the blur need the whole crop before they can go on.
//
// Between two operations values are whole numbers in single precision, as Pillow cuts fractions off after each.

#include "pixels.h"

#ifdef __AVX512F__

namespace {

enum Operation { kBrightness, kContrast, kSaturation, kHue };

struct Pixels {
  __m512 red, green, blue;
};

// To a relative error of 2^-28: from 14 bits, once by Newton's method.
inline __m512 reciprocal(__m512 value) {
  const __m512 about = _mm512_rcp14_ps(value);
  return _mm512_mul_ps(about, _mm512_fnmadd_ps(value, about, all(2.0f)));
}

// ITU-R 601-2 in Pillow's fixed point: whole numbers below 2^24, so that sums in single precision are exact.
inline __m512 luma(const Pixels& p) {
  __m512 sum = _mm512_fmadd_ps(p.red, all(19595.0f), all(32768.0f));
  sum = _mm512_fmadd_ps(p.green, all(38470.0f), sum);
  sum = _mm512_fmadd_ps(p.blue, all(7471.0f), sum);
  return whole(_mm512_mul_ps(sum, all(1.0f / 65536.0f)));
}

inline Pixels read(const Byte* planes, Index plane, __mmask16 mask) {
  const auto channel = [=](Index index) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, planes + index * plane)));
  };
  return {channel(0), channel(1), channel(2)};
}

inline void write(const Pixels& p, Index plane, __mmask16 mask, Byte* planes) {
  const auto channel = [=](Index index, __m512 values) {
    _mm512_mask_cvtepi32_storeu_epi8(planes + index * plane, mask, _mm512_cvttps_epi32(values));
  };
  channel(0, p.red), channel(1, p.green), channel(2, p.blue);
}

// Each value · factor + that of `by` · (1 - factor). Rounded twice, as Pillow's is: where the result is a whole number,
// that decides whether it stays one. Said so that a compiler does not put the two together.
inline __m512 blended(__m512 values, __m512 by, float factor) {
  const __m512 part = _mm512_mul_round_ps(all(factor), _mm512_sub_ps(values, by),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return limited(_mm512_add_ps(part, by));
}

inline void blend(Pixels& p, __m512 by, float factor) {
  for (__m512* values : {&p.red, &p.green, &p.blue}) *values = blended(*values, by, factor);
}

// One channel of HSV's way back: `place` is 5, 3, 1 for red, green, blue; hue in sixths of the circle.
inline __m512 channel(float place, __m512 hue, __m512 value, __m512 chroma) {
  __m512 k = _mm512_add_ps(all(place), hue);
  k = _mm512_mask_sub_ps(k, _mm512_cmp_ps_mask(k, all(6.0f), _CMP_GE_OQ), k, all(6.0f));
  const __m512 lower = _mm512_min_ps(k, _mm512_sub_ps(all(4.0f), k));
  const __m512 part = _mm512_min_ps(_mm512_max_ps(lower, _mm512_setzero_ps()), all(1.0f));
  return whole(_mm512_fnmadd_ps(chroma, part, _mm512_add_ps(value, all(0.5f))));
}

// Pillow's way to HSV and back, with 8 bits for hue and saturation between.
inline void shift_hue(Pixels& p, float shift) {
  const __m512 tiny = all(2e-4f);  // less than the least fraction of an exact result, more than rounding
  const __m512 value = _mm512_max_ps(p.red, _mm512_max_ps(p.green, p.blue));
  const __m512 range = _mm512_sub_ps(value, _mm512_min_ps(p.red, _mm512_min_ps(p.green, p.blue)));
  const __m512 scale = reciprocal(_mm512_max_ps(range, all(1.0f)));
  const __mmask16 is_red = _mm512_cmp_ps_mask(p.red, value, _CMP_EQ_OQ);
  const __mmask16 is_green = _mm512_cmp_ps_mask(p.green, value, _CMP_EQ_OQ);
  __m512 difference = _mm512_sub_ps(p.red, p.green), place = all(4.0f);
  difference = _mm512_mask_sub_ps(difference, is_green, p.blue, p.red);
  place = _mm512_mask_mov_ps(place, is_green, all(2.0f));
  difference = _mm512_mask_sub_ps(difference, is_red, p.green, p.blue);
  place = _mm512_maskz_mov_ps(static_cast<__mmask16>(~is_red), place);
  __m512 hue = _mm512_fmadd_ps(difference, scale, place);
  hue = _mm512_mask_add_ps(hue, _mm512_cmp_ps_mask(hue, _mm512_setzero_ps(), _CMP_LT_OQ), hue, all(6.0f));
  hue = _mm512_add_ps(whole(_mm512_fmadd_ps(hue, all(42.5f), tiny)), all(shift));
  hue = _mm512_mask_sub_ps(hue, _mm512_cmp_ps_mask(hue, all(256.0f), _CMP_GE_OQ), hue, all(256.0f));
  hue = _mm512_mul_ps(hue, all(6.0f / 255.0f));
  const __m512 least = reciprocal(_mm512_max_ps(value, all(1.0f)));
  const __m512 saturation = whole(_mm512_fmadd_ps(_mm512_mul_ps(range, all(255.0f)), least, tiny));
  const __m512 chroma = _mm512_mul_ps(_mm512_mul_ps(value, all(1.0f / 255.0f)), saturation);
  p = {channel(5.0f, hue, value, chroma), channel(3.0f, hue, value, chroma), channel(1.0f, hue, value, chroma)};
}

inline void apply(Pixels& p, int operation, float factor, float mean) {
  switch (operation) {
    case kBrightness:
      return blend(p, _mm512_setzero_ps(), factor);
    case kContrast:
      return blend(p, all(mean), factor);
    case kSaturation:
      return blend(p, luma(p), factor);
    case kHue:
      return shift_hue(p, factor);
  }
}

// ---- Blur: values times 64 in 16 bits, weights times 2^15, every product rounded.

constexpr Index kWide = 32;  // values of a vector
constexpr int kBits = 6;

// Σ kernel[i] · (what lies i before the middle + what lies i behind it).
template <typename Lines>
inline __m512i weighted(const std::int16_t* kernel, Index radius, const Lines& line) {
  __m512i sum = _mm512_mulhrs_epi16(line(0), _mm512_set1_epi16(kernel[0]));
  for (Index i = 1; i <= radius; ++i) {
    const __m512i both = _mm512_add_epi16(line(-i), line(i));
    sum = _mm512_add_epi16(sum, _mm512_mulhrs_epi16(both, _mm512_set1_epi16(kernel[i])));
  }
  return sum;
}

// By a symmetric kernel, of which there are the middle and what follows, along either side; at the borders what is
// outermost is repeated.
void blur(Byte* plane, Index size, const std::int16_t* kernel, Index radius) {
  const Index width = (size + kWide - 1) / kWide * kWide, taps = 2 * radius + 1;
  const Scratch<std::int16_t> wide(width + 2 * radius), filtered(taps * width);
  // Where each row is kept once it was filtered along, and what stands for those beyond the borders. There is room for
  // as many rows as the kernel has taps, and each takes the place of one that is not wanted any more.
  const Scratch<std::int16_t*> places(size + 2 * radius);
  std::int16_t** const lines = places.get() + radius;
  for (Index row = 0, at = 0; row < size; ++row, at = at + 1 < taps ? at + 1 : 0)
    lines[row] = filtered.get() + at * width;
  for (Index i = 1; i <= radius; ++i) lines[-i] = lines[0], lines[size - 1 + i] = lines[size - 1];
  const auto filter_row = [&](Index row) {
    const Byte* in = plane + row * size;
    std::int16_t *middle = wide.get() + radius, *out = lines[row];
    for (Index i = 0; i < size; i += kWide) {
      const auto mask = static_cast<__mmask32>(size - i >= kWide ? 0xffffffffu : (1u << (size - i)) - 1u);
      const __m512i values = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, in + i));
      _mm512_storeu_si512(middle + i, _mm512_slli_epi16(values, kBits));
    }
    for (Index i = 1; i <= radius; ++i) middle[-i] = middle[0];
    for (Index i = size; i < width + radius; ++i) middle[i] = middle[size - 1];
    for (Index i = 0; i < width; i += kWide)
      _mm512_storeu_si512(out + i, weighted(kernel, radius, [=](Index by) {
                            return _mm512_loadu_si512(middle + i + by);
                          }));
  };
  Index done = 0;
  for (Index row = 0; row < size; ++row) {
    // A row is written when all that depend on it were filtered along it.
    for (; done < std::min(size, row + radius + 1); ++done) filter_row(done);
    std::int16_t* const* middle = lines + row;
    for (Index i = 0; i < width; i += kWide) {
      const __m512i sum = weighted(kernel, radius, [=](Index by) { return _mm512_loadu_si512(middle[by] + i); });
      const __m512i rounded = _mm512_srli_epi16(_mm512_add_epi16(sum, _mm512_set1_epi16(1 << (kBits - 1))), kBits);
      const auto mask = static_cast<__mmask32>(size - i >= kWide ? 0xffffffffu : (1u << (size - i)) - 1u);
      _mm512_mask_cvtusepi16_storeu_epi8(plane + row * size + i, mask, rounded);
    }
  }
}

// ---- What becomes of a value by itself, for all 256 of them.

#ifdef __AVX512VBMI__
constexpr bool kByTable = true;
#else
constexpr bool kByTable = false;  // looking one value up at a time would be slower than working it out
#endif

inline bool has_table(int kind) { return kByTable && (kind == kBrightness || kind == kContrast); }

class Table {
 public:
  Table() {
    for (int i = 0; i < 256; ++i) values_[i] = static_cast<Byte>(i);
  }
  // What blends with the same for every pixel: black, or a mean.
  void then_blend(float by, float factor) {
    for (Byte* at = values_; at < values_ + 256; at += 16) {
      const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(at));
      const __m512 found = blended(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), all(by), factor);
      _mm_store_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(found)));
    }
  }
#ifdef __AVX512VBMI__
  void look_up(Byte* values, Index count) const {
    const auto* quarter = reinterpret_cast<const __m512i*>(values_);
    for (Index i = 0; i < count; i += 64) {
      const __mmask64 mask = count - i >= 64 ? ~0ull : (1ull << (count - i)) - 1;
      const __m512i at = _mm512_maskz_loadu_epi8(mask, values + i);
      const __m512i lower = _mm512_permutex2var_epi8(quarter[0], at, quarter[1]);
      const __m512i upper = _mm512_permutex2var_epi8(quarter[2], at, quarter[3]);
      _mm512_mask_storeu_epi8(values + i, mask, _mm512_mask_mov_epi8(lower, _mm512_movepi8_mask(at), upper));
    }
  }
#else
  void look_up(Byte* values, Index count) const {
    for (Index i = 0; i < count; ++i) values[i] = values_[values[i]];
  }
#endif

 private:
  alignas(64) Byte values_[256];
};

// The mean of a crop's luma, rounded.
float mean_luma(const Byte* planes, Index plane) {
  __m512i sum = _mm512_setzero_si512();
  for (Index at = 0; at < plane; at += 16) {
    const __mmask16 mask = first_of(plane - at);
    const __m512 values = luma(read(planes + at, plane, mask));
    sum = _mm512_add_epi32(sum, _mm512_maskz_cvttps_epi32(mask, values));
  }
  const __m512i low = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(sum));
  const __m512i high = _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(sum, 1));
  const auto total = static_cast<double>(_mm512_reduce_add_epi64(_mm512_add_epi64(low, high)));
  return static_cast<float>(std::floor(total / static_cast<double>(plane) + 0.5));
}

}  // namespace

void recolour(const Crop& crop) {
  const int *kinds = crop.kinds, operations = crop.operations;
  const Index plane = crop.size * crop.size;
  const bool grey = crop.grey != 0;
  Byte* planes = crop.planes;
  for (int first = 0, last; first < operations || (first == operations && grey); first = last) {
    // As many as one pass can do, by a table or by pixels; what begins with contrast first needs its mean.
    const float mean = first < operations && kinds[first] == kContrast ? mean_luma(planes, plane) : 0.0f;
    last = std::min(first + 1, operations);
    if (first < operations && has_table(kinds[first])) {
      Table table;
      table.then_blend(mean, crop.factors[first]);
      for (; last < operations && kinds[last] == kBrightness; ++last) table.then_blend(0.0f, crop.factors[last]);
      table.look_up(planes, 3 * plane);
      continue;
    }
    while (last < operations && kinds[last] != kContrast && !has_table(kinds[last])) ++last;
    const bool ends = last == operations;
    for (Index at = 0; at < plane; at += 16) {
      const __mmask16 mask = first_of(plane - at);
      Pixels p = read(planes + at, plane, mask);
      for (int i = first; i < last; ++i) apply(p, kinds[i], crop.factors[i], mean);
      if (grey && ends) p.red = p.green = p.blue = luma(p);
      write(p, plane, mask, planes + at);
    }
    if (ends) break;
  }
  if (crop.radius >= 0) {
    for (Index channel = 0; channel < (grey ? 1 : 3); ++channel)
      blur(planes + channel * plane, crop.size, crop.kernel, crop.radius);
    for (Index channel = 1; grey && channel < 3; ++channel)
      std::memcpy(planes + channel * plane, planes, static_cast<std::size_t>(plane));
  }
  if (crop.threshold < 256) {
#pragma omp simd
    for (Index i = 0; i < 3 * plane; ++i)
      planes[i] = planes[i] < crop.threshold ? planes[i] : static_cast<Byte>(255 - planes[i]);
  }
}

#endif
