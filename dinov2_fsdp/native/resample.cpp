// Bicubic resampling of a part of an image, Pillow's bits: each side by itself, a filter that widens with the shrinkage
// (so that nothing is skipped), whole numbers between the sides. A row is filtered along itself when it is first wanted,
// and only as many stay as the filter across them sees.
//
// Pixels have 8 bits and weights 22, and instructions multiply whole numbers of 8 or 16: a weight is the sum of three
// numbers of 8 bits, or of two of 12, each with a sign, that are multiplied apart. Four pixels are taken at a time.

#include "pixels.h"

#ifdef __AVX512F__

namespace {

constexpr double kSupport = 2.0;  // of the filter, in pixels of the smaller scale
constexpr int kBits = 22;         // of a weight behind the point
constexpr Index kLanes = 16;      // of 32 bits in a register, a sum in each
constexpr Index kTaps = 4;        // pixels that a lane takes at a time
constexpr Index kRegister = 64;   // bytes, as many as in a line of the processor's caches
constexpr Index kAhead = 3;       // rows between what is read and what is asked for

// Keys' cubic convolution with a = -1/2.
inline double cubic(double x) {
  x = std::fabs(x);
  const double near = (1.5 * x - 2.5) * x * x + 1.0, far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0;
  return x < 1.0 ? near : x < 2.0 ? far : 0.0;
}

// Which of `from` pixels each of `to` pixels is made of, and by which weights; `most` at most, a multiple of kTaps, what
// is beyond a pixel's own being zero.
class Filter {
 public:
  Filter(Index from, Index to)
      : scale_(static_cast<double>(from) / static_cast<double>(to)), stretch_(std::max(scale_, 1.0)), from_(from),
        most(most_of(to)), firsts(to), weights(to * most) {
    const Scratch<double> found(most);
    double* __restrict values = found.get();
    for (Index i = 0; i < to; ++i) {
      const double middle = middle_of(i), narrower = 1.0 / stretch_;
      const Index first = first_of(i), count = end_of(i) - first;
      std::int32_t* __restrict rounded = weights.get() + i * most;
#pragma omp simd
      for (Index k = 0; k < most; ++k)
        values[k] = k < count ? cubic((static_cast<double>(first + k) - middle + 0.5) * narrower) : 0.0;
      double sum = 0.0;
      for (Index k = 0; k < count; ++k) sum += values[k];
#pragma omp simd
      for (Index k = 0; k < most; ++k) {
        const double weight = values[k] / sum * (1 << kBits);
        rounded[k] = static_cast<std::int32_t>(weight + std::copysign(0.5, weight));
      }
      firsts.get()[i] = first;
    }
  }

 private:
  double middle_of(Index i) const { return (static_cast<double>(i) + 0.5) * scale_; }
  Index first_of(Index i) const {
    return std::max<Index>(0, static_cast<Index>(middle_of(i) - kSupport * stretch_ + 0.5));
  }
  Index end_of(Index i) const {
    return std::min<Index>(from_, static_cast<Index>(middle_of(i) + kSupport * stretch_ + 0.5));
  }
  Index most_of(Index to) const {
    Index found = 1;
    for (Index i = 0; i < to; ++i) found = std::max(found, end_of(i) - first_of(i));
    return (found + kTaps - 1) / kTaps * kTaps;
  }
  double scale_, stretch_;
  Index from_;

 public:
  const Index most;
  const Scratch<Index> firsts;
  const Scratch<std::int32_t> weights;
};

// What four pixels are multiplied by for each lane, kParts registers; and the sums of the parts.
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

class Sums {
 public:
  static constexpr Index kParts = 3;
  // Put the weights of a lane's four pixels into kParts registers of `lanes` lanes; `parts`: that lane of the first.
  static void lay_out(const std::int32_t* weights, Index lanes, std::int32_t* parts) {
    __m128i rest = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights));
    for (Index part = kParts - 1; part >= 0; --part) {
      parts[part * lanes] = _mm_cvtsi128_si32(_mm_cvtepi32_epi8(rest));
      const __m128i low = _mm_srai_epi32(_mm_slli_epi32(rest, 24), 24);
      rest = _mm_srai_epi32(_mm_sub_epi32(rest, low), 8);
    }
  }
  void add(__m512i pixels, const __m512i (&by)[kParts]) {
    for (Index part = 0; part < kParts; ++part) sums_[part] = _mm512_dpbusd_epi32(sums_[part], pixels, by[part]);
  }
  __m512i total() const {
    const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(sums_[0], 8), sums_[1]);
    return _mm512_add_epi32(_mm512_slli_epi32(upper, 8), sums_[2]);
  }

 private:
  __m512i sums_[kParts] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_set1_epi32(1 << (kBits - 1))};
};

#else

class Sums {
 public:
  static constexpr Index kParts = 4;  // upper halves of the first and third pixel and of the others, then lower halves
  static void lay_out(const std::int32_t* weights, Index lanes, std::int32_t* parts) {
    for (Index tap = 0; tap < kTaps; ++tap) {
      const std::int32_t high = (weights[tap] + kHalf / 2) >> kHalfBits, odd = tap % 2;
      reinterpret_cast<std::int16_t*>(parts + odd * lanes)[tap / 2] = static_cast<std::int16_t>(high);
      reinterpret_cast<std::int16_t*>(parts + (2 + odd) * lanes)[tap / 2] =
          static_cast<std::int16_t>(weights[tap] - high * kHalf);
    }
  }
  void add(__m512i pixels, const __m512i (&by)[kParts]) {
    const __m512i even = _mm512_and_si512(pixels, _mm512_set1_epi16(0xff)), odd = _mm512_srli_epi16(pixels, 8);
    for (Index half = 0; half < 2; ++half) {
      sums_[half] = _mm512_add_epi32(sums_[half], _mm512_madd_epi16(even, by[2 * half]));
      sums_[half] = _mm512_add_epi32(sums_[half], _mm512_madd_epi16(odd, by[2 * half + 1]));
    }
  }
  __m512i total() const { return _mm512_add_epi32(_mm512_slli_epi32(sums_[0], kHalfBits), sums_[1]); }

 private:
  static constexpr int kHalfBits = 12, kHalf = 1 << kHalfBits;
  __m512i sums_[2] = {_mm512_setzero_si512(), _mm512_set1_epi32(1 << (kBits - 1))};
};

#endif

constexpr Index kParts = Sums::kParts;

// A filter along rows for sixteen pixels of the result: where in a channel each begins behind `base`.
struct Group {
  Index base;
  alignas(kRegister) std::int32_t places[kLanes];
  alignas(kRegister) Byte bytes[kRegister];  // of four pixels for each lane, if they are in one register
};

// Groups, and the parts of their weights, (most / kTaps, kParts, kLanes) each; returns whether for every group one
// register, filled from its base, holds the four pixels that each lane begins with.
bool group_filter(const Filter& filter, Index size, bool flip, Group* groups, std::int32_t* parts) {
  bool all_near = true;
  for (Index g = 0; kLanes * g < size; ++g) {
    Group& group = groups[g];
    const auto of_lane = [&](Index lane) {
      const Index x = std::min(kLanes * g + lane, size - 1);
      return flip ? size - 1 - x : x;
    };
    group.base = filter.firsts.get()[std::min(of_lane(0), of_lane(kLanes - 1))];
    for (Index lane = 0; lane < kLanes; ++lane) {
      const Index x = of_lane(lane), place = filter.firsts.get()[x] - group.base;
      group.places[lane] = static_cast<std::int32_t>(place);
      all_near = all_near && place + kTaps <= kRegister;
      for (Index tap = 0; tap < kTaps; ++tap) group.bytes[kTaps * lane + tap] = static_cast<Byte>(place + tap);
      for (Index k = 0; k < filter.most; k += kTaps)
        Sums::lay_out(filter.weights.get() + x * filter.most + k, kLanes,
                      parts + (g * filter.most + k) / kTaps * kParts * kLanes + lane);
    }
  }
  return all_near;
}

inline __m512i load(const void* from) { return _mm512_load_si512(from); }

// Four bytes for each lane.
struct FromMemory {
  explicit FromMemory(const Group& group) : places(load(group.places)) {}
  __m512i operator()(const Byte* at) const { return _mm512_i32gather_epi32(places, at, 1); }
  __m512i places;
};

#ifdef __AVX512VBMI__
struct FromOne {
  explicit FromOne(const Group& group) : bytes(load(group.bytes)) {}
  __m512i operator()(const Byte* at) const { return _mm512_permutexvar_epi8(bytes, _mm512_loadu_si512(at)); }
  __m512i bytes;
};
#else
using FromOne = FromMemory;
#endif

// A row, whose channels lie `wide` bytes apart, and `narrow` in the result. What is read for sixteen pixels moves on with
// the filter, the places behind it stay.
template <typename From>
inline void filter_along(const Group* groups, Index count, Index quads, const std::int32_t* parts, const Byte* row,
                         Index wide, Byte* out, Index narrow) {
  for (const Group* group = groups; group < groups + count; ++group, out += kLanes) {
    const From pick(*group);
    Sums sums[3];
    const Byte* at = row + group->base;
    for (Index quad = 0; quad < quads; ++quad, at += kTaps, parts += kParts * kLanes) {
      __m512i by[kParts];
      for (Index part = 0; part < kParts; ++part) by[part] = load(parts + part * kLanes);
      for (Index channel = 0; channel < 3; ++channel) sums[channel].add(pick(at + channel * wide), by);
    }
    for (Index channel = 0; channel < 3; ++channel) {
      const __m512i total = _mm512_srai_epi32(sums[channel].total(), kBits);
      const __m128i limited = _mm512_cvtusepi32_epi8(_mm512_max_epi32(total, _mm512_setzero_si512()));
      _mm_store_si128(reinterpret_cast<__m128i*>(out + channel * narrow), limited);
    }
  }
}

// Sixty-four values of each of four rows, by the parts of four weights; `most` rows altogether, whole numbers of 8 bits.
inline void filter_across(const Byte* const* rows, Index most, const std::int32_t* parts, Index x, Byte* out) {
  Sums sums[4];
  for (Index k = 0; k < most; k += kTaps, parts += kParts) {
    const __m512i a = load(rows[k] + x), b = load(rows[k + 1] + x), c = load(rows[k + 2] + x), d = load(rows[k + 3] + x);
    const __m512i low_ab = _mm512_unpacklo_epi8(a, b), high_ab = _mm512_unpackhi_epi8(a, b);
    const __m512i low_cd = _mm512_unpacklo_epi8(c, d), high_cd = _mm512_unpackhi_epi8(c, d);
    __m512i by[kParts];
    for (Index part = 0; part < kParts; ++part) by[part] = _mm512_set1_epi32(parts[part]);
    sums[0].add(_mm512_unpacklo_epi16(low_ab, low_cd), by);
    sums[1].add(_mm512_unpackhi_epi16(low_ab, low_cd), by);
    sums[2].add(_mm512_unpacklo_epi16(high_ab, high_cd), by);
    sums[3].add(_mm512_unpackhi_epi16(high_ab, high_cd), by);
  }
  // Packing takes lanes in the order in which unpacking has left them.
  const auto total = [&](int i) { return _mm512_srai_epi32(sums[i].total(), kBits); };
  const __m512i first = _mm512_packs_epi32(total(0), total(1)), second = _mm512_packs_epi32(total(2), total(3));
  _mm512_store_si512(out + x, _mm512_packus_epi16(first, second));
}

// One row's pixels, channel by channel, `wide` bytes apart.
class Rows {
 public:
#ifdef __AVX512VBMI__
  Rows() {
    alignas(kRegister) Byte places[kRegister];
    for (int channel = 0; channel < 3; ++channel) {
      is_third_[channel] = 0;
      for (int i = 0; i < kRegister; ++i) {
        places[i] = static_cast<Byte>((3 * i + channel) % (2 * kRegister));
        is_third_[channel] |= static_cast<__mmask64>(3 * i + channel >= 2 * kRegister) << i;
      }
      places_[channel] = load(places);
    }
  }
  void read(const Byte* pixels, Index width, Index wide, Byte* row) const {
    for (Index x = 0; x < width; x += kRegister) {
      const Index bytes = 3 * (width - x);
      const auto part = [&](Index from) {
        const Index left = std::min<Index>(kRegister, bytes - from);
        const __mmask64 there = left <= 0 ? 0 : ~0ull >> (kRegister - left);
        return _mm512_maskz_loadu_epi8(there, pixels + 3 * x + from);
      };
      const __m512i first = part(0), second = part(kRegister), third = part(2 * kRegister);
      for (int channel = 0; channel < 3; ++channel) {
        const __m512i found = _mm512_permutex2var_epi8(first, places_[channel], second);
        _mm512_store_si512(row + channel * wide + x,
                           _mm512_mask_permutexvar_epi8(found, is_third_[channel], places_[channel], third));
      }
    }
  }

 private:
  __m512i places_[3];
  __mmask64 is_third_[3];
#else
  void read(const Byte* pixels, Index width, Index wide, Byte* row) const {
    for (Index x = 0; x < width; x += 16)
      splitter_(pixels + 3 * x, width - x, [=](int channel, __m128i bytes) {
        _mm_store_si128(reinterpret_cast<__m128i*>(row + channel * wide + x), bytes);
      });
  }

 private:
  Splitter splitter_;
#endif
};

inline Index whole_registers(Index bytes) { return (bytes + kRegister - 1) / kRegister * kRegister; }

}  // namespace

void resample(const Byte* image, Index row_bytes, const Crop& crop) {
  const Index height = crop.height, width = crop.width, size = crop.size;
  const Byte* pixels = image + crop.top * row_bytes + 3 * crop.left;
  const Filter along(width, size), across(height, size);
  const Index groups = (size + kLanes - 1) / kLanes, narrow = groups * kLanes, flat = whole_registers(3 * narrow);
  const Index parts_along = along.most / kTaps * kParts * kLanes, parts_across = across.most / kTaps * kParts;
  const Scratch<Group> grouped(groups);
  const Scratch<std::int32_t> by_along(groups * parts_along), by_across(size * parts_across);
  const bool is_near = group_filter(along, size, crop.flip != 0, grouped.get(), by_along.get());
  const auto filter = is_near ? filter_along<FromOne> : filter_along<FromMemory>;
  for (Index i = 0; i < size * across.most; i += kTaps)
    Sums::lay_out(across.weights.get() + i, 1, by_across.get() + i / kTaps * kParts);
  // What is read behind a row's end, by lanes without weights, has to be memory.
  const Index wide = whole_registers(width) + whole_registers(along.most) + kRegister;
  const Scratch<Byte> row(3 * wide), kept(across.most * flat), line(flat);
  const Scratch<const Byte*> lines(across.most);
  std::memset(kept.get(), 0, static_cast<std::size_t>(across.most * flat));
  const Rows rows;
  Index done = 0;
  for (Index y = 0; y < size; ++y) {
    const Index first = across.firsts.get()[y], end = std::min(height, first + across.most);
    for (done = std::max(done, first); done < end; ++done) {
      const Byte* from = pixels + done * row_bytes;
      rows.read(from, width, wide, row.get());
      // Hardware does not see where the next part of an image's row begins.
      for (Index at = 0; done + kAhead < height && at < 3 * width; at += kRegister)
        _mm_prefetch(reinterpret_cast<const char*>(from + kAhead * row_bytes + at), _MM_HINT_T0);
      Byte* out = kept.get() + done % across.most * flat;
      filter(grouped.get(), groups, along.most / kTaps, by_along.get(), row.get(), wide, out, narrow);
    }
    for (Index k = 0, at = first % across.most; k < across.most; ++k, at = at + 1 < across.most ? at + 1 : 0)
      lines.get()[k] = kept.get() + at * flat;
    for (Index x = 0; x < flat; x += kRegister)
      filter_across(lines.get(), across.most, by_across.get() + y * parts_across, x, line.get());
    for (Index channel = 0; channel < 3; ++channel)
      std::memcpy(crop.planes + (channel * size + y) * size, line.get() + channel * narrow, static_cast<std::size_t>(size));
  }
}

#endif
