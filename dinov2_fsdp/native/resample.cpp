// Bicubic resampling of a part of an image, as Pillow does it: each side by itself, a filter that widens with the shrinkage
// (so that nothing is skipped), whole numbers between the sides. A row is filtered along itself when it is first wanted,
// and only as many stay as the filter across them sees.

#include "pixels.h"

#ifdef __AVX512F__

namespace {

constexpr double kSupport = 2.0;  // of the filter, in pixels of the smaller scale
constexpr Index kWindow = 64;     // values that four registers hold, from which sixteen are picked

// Keys' cubic convolution with a = -1/2.
inline double cubic(double x) {
  x = std::fabs(x);
  const double near = (1.5 * x - 2.5) * x * x + 1.0, far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0;
  return x < 1.0 ? near : x < 2.0 ? far : 0.0;
}

// Which of `from` pixels each of `to` pixels is made of, and by which weights; `most` at most.
struct Filter {
  Filter(Index from, Index to)
      : scale(static_cast<double>(from) / static_cast<double>(to)), stretch(std::max(scale, 1.0)),
        most(2 * static_cast<Index>(std::ceil(kSupport * stretch)) + 1), firsts(to), counts(to), weights(to * most) {
    const Scratch<double> found(most);
    const double narrower = 1.0 / stretch;
    for (Index i = 0; i < to; ++i) {
      const double middle = (static_cast<double>(i) + 0.5) * scale;
      const Index first = std::max<Index>(0, static_cast<Index>(middle - kSupport * stretch + 0.5));
      const Index count = std::min<Index>(from, static_cast<Index>(middle + kSupport * stretch + 0.5)) - first;
      double* __restrict values = found.get();
#pragma omp simd
      for (Index k = 0; k < count; ++k)
        values[k] = cubic((static_cast<double>(first + k) - middle + 0.5) * narrower);
      double sum = 0.0;
      for (Index k = 0; k < count; ++k) sum += values[k];
      const double scaled = 1.0 / sum;
      for (Index k = 0; k < most; ++k)
        weights.get()[i * most + k] = k < count ? static_cast<float>(values[k] * scaled) : 0.0f;
      firsts.get()[i] = first;
      counts.get()[i] = count;
    }
  }
  double scale, stretch;
  Index most;
  Scratch<Index> firsts, counts;
  Scratch<float> weights;
};

// A filter along rows for sixteen pixels of the result: where each begins behind `base`, and their weights, (taps, 16).
struct Group {
  Index base, span, taps;  // the furthest place is span - 1
  alignas(64) std::int32_t places[16];
};

void group_filter(const Filter& filter, Index size, bool flip, Group* groups, float* weights) {
  for (Index g = 0; 16 * g < size; ++g) {
    Group& group = groups[g];
    group = {INT32_MAX, 0, 0, {}};
    const auto of_lane = [&](Index lane) {
      const Index x = std::min(16 * g + lane, size - 1);
      return flip ? size - 1 - x : x;
    };
    for (Index lane = 0; lane < 16; ++lane) group.base = std::min(group.base, filter.firsts.get()[of_lane(lane)]);
    for (Index lane = 0; lane < 16; ++lane) {
      const Index x = of_lane(lane), place = filter.firsts.get()[x] - group.base, taps = filter.counts.get()[x];
      group.places[lane] = static_cast<std::int32_t>(place);
      group.span = std::max(group.span, place + 1);
      group.taps = std::max(group.taps, taps);
      for (Index k = 0; k < filter.most; ++k)
        weights[(g * filter.most + k) * 16 + lane] = filter.weights.get()[x * filter.most + k];
    }
  }
}

// Rows of three channels, (3, wide) each, with room behind them for what a group reads without using it.
inline void read_row(const Byte* pixels, Index width, const Splitter& splitter, Index wide, float* row) {
  for (Index x = 0; x < width; x += 16)
    splitter(pixels + 3 * x, width - x, [=](int channel, __m128i bytes) {
      _mm512_storeu_ps(row + channel * wide + x, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
    });
}

// Sixteen values behind `at`: picked from two registers, from four, or from memory one by one.
struct FromTwo {
  static __m512 pick(const float* at, __m512i places) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(at), places, _mm512_loadu_ps(at + 16));
  }
};

struct FromFour {
  static __m512 pick(const float* at, __m512i places) {
    const __mmask16 is_far = _mm512_test_epi32_mask(places, _mm512_set1_epi32(kWindow / 2));
    return _mm512_mask_mov_ps(FromTwo::pick(at, places), is_far, FromTwo::pick(at + 32, places));
  }
};

struct FromMemory {
  static __m512 pick(const float* at, __m512i places) { return _mm512_i32gather_ps(places, at, 4); }
};

// Sixteen pixels; channels lie `wide` apart in the row and `narrow` in the result. What is read moves on by a value for
// each of the filter's weights, the places behind it stay.
template <typename From>
inline void filter_from(const Group& group, const float* weights, const float* row, Index wide, float* out,
                        Index narrow) {
  __m512 sums[3] = {all(0.5f), all(0.5f), all(0.5f)};
  const __m512i places = _mm512_load_si512(group.places);
  const float* at = row + group.base;
  for (Index k = 0; k < group.taps; ++k, ++at) {
    const __m512 by = _mm512_load_ps(weights + 16 * k);
    for (Index channel = 0; channel < 3; ++channel)
      sums[channel] = _mm512_fmadd_ps(From::pick(at + channel * wide, places), by, sums[channel]);
  }
  for (Index channel = 0; channel < 3; ++channel) _mm512_store_ps(out + channel * narrow, limited(sums[channel]));
}

inline void filter_along(const Group& group, const float* weights, const float* row, Index wide, float* out,
                         Index narrow) {
  if (group.span <= kWindow / 2) return filter_from<FromTwo>(group, weights, row, wide, out, narrow);
  if (group.span <= kWindow) return filter_from<FromFour>(group, weights, row, wide, out, narrow);
  filter_from<FromMemory>(group, weights, row, wide, out, narrow);
}

}  // namespace

// height × width pixels of three bytes, rows `row_bytes` apart → (3, size, size), mirrored if asked for.
EXPORT void dinov2_resample(const std::uint8_t* pixels, Index row_bytes, Index height, Index width, Index size, int flip,
                            std::uint8_t* planes) {
  const Filter along(width, size), across(height, size);
  const Index groups = (size + 15) / 16, narrow = groups * 16, plane = size * size;
  const Scratch<Group> grouped(groups);
  const Scratch<float> weights(groups * along.most * 16);
  group_filter(along, size, flip != 0, grouped.get(), weights.get());
  // What a window or a lane without weights reads behind a row's end is zero.
  const Index wide = (width + 15) / 16 * 16 + kWindow + along.most;
  const Scratch<float> row(3 * wide), kept(across.most * 3 * narrow);
  const Scratch<const float*> lines(across.most);
  std::fill(row.get(), row.get() + 3 * wide, 0.0f);
  const Splitter splitter;
  Index done = 0;
  for (Index y = 0; y < size; ++y) {
    const Index first = across.firsts.get()[y], taps = across.counts.get()[y];
    for (done = std::max(done, first); done < first + taps; ++done) {
      read_row(pixels + done * row_bytes, width, splitter, wide, row.get());
      float* out = kept.get() + done % across.most * 3 * narrow;
      for (Index g = 0; g < groups; ++g)
        filter_along(grouped.get()[g], weights.get() + g * along.most * 16, row.get(), wide, out + 16 * g, narrow);
    }
    for (Index k = 0; k < taps; ++k) lines.get()[k] = kept.get() + (first + k) % across.most * 3 * narrow;
    const float* by = across.weights.get() + y * across.most;
    for (Index x = 0; x < size; x += 16) {
      __m512 sums[3] = {all(0.5f), all(0.5f), all(0.5f)};
      for (Index k = 0; k < taps; ++k)
        for (Index channel = 0; channel < 3; ++channel)
          sums[channel] =
              _mm512_fmadd_ps(_mm512_load_ps(lines.get()[k] + channel * narrow + x), all(by[k]), sums[channel]);
      for (Index channel = 0; channel < 3; ++channel)
        _mm512_mask_cvtepi32_storeu_epi8(planes + channel * plane + y * size + x, first_of(size - x),
                                         _mm512_cvttps_epi32(limited(sums[channel])));
    }
  }
}

#endif
