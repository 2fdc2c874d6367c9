// What the files of compiled code stand on: types, rounding, exp, and matrices with their sides exchanged.
//
// Arithmetic is in single precision, whatever the tensors' type.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#define EXPORT extern "C" __attribute__((visibility("default")))

// `half` says that tensors hold bfloat16, else float.
#define CALL(function, ...)              \
  if (half) {                            \
    using T = BFloat16;                  \
    function<T>(__VA_ARGS__);            \
  } else {                               \
    using T = float;                     \
    function<T>(__VA_ARGS__);            \
  }
#define IN(pointer) static_cast<const T*>(pointer)
#define OUT(pointer) static_cast<T*>(pointer)

namespace {

using Index = std::int64_t;

struct BFloat16 {
  std::uint16_t bits;
};

inline float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return bits_to_float(static_cast<std::uint32_t>(value.bits) << 16); }

template <typename T>
inline T narrow(float value);
template <>
inline float narrow<float>(float value) {
  return value;
}
template <>
inline BFloat16 narrow<BFloat16>(float value) {
  // To the nearest, ties to even. Not a number stays that: rounding up could turn it into infinity.
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool number = (bits & 0x7fffffffu) <= 0x7f800000u;
  return {static_cast<std::uint16_t>(number ? rounded : 0x7fc0u)};
}

// exp of what is not above 0; 0 below -87, where it would come near what single precision holds in full.
inline float exp_below_zero(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;  // false for what is not a number, which so stays
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: leaves the nearest whole number
  const float whole = shifted - 12582912.0f;
  const float rest = (clamped - whole * 0.693145752f) - whole * 1.42860677e-6f;
  float p = 1.381459568853478e-3f;  // 1 + r + r² · this, fitted to a relative error of 3e-9
  p = p * rest + 8.368717214102164e-3f;
  p = p * rest + 4.166838810919513e-2f;
  p = p * rest + 0.16666520628114084f;
  p = p * rest + 0.4999999344746817f;
  p = p * rest + 1.0f;
  p = p * rest + 1.0f;
  const std::uint32_t exponent = (float_to_bits(shifted) - 0x4b400000u + 127u) << 23;
  return x < -87.0f ? 0.0f : p * bits_to_float(exponent);
}

struct Normal {
  float density;
  float cumulative;
};

// The standard normal distribution at x. The tail is density · Mills' ratio; that is a polynomial in 1 / (1 + c |x|),
// fitted to a relative error of 5e-8 for |x| up to 13.3, where the density leaves single precision.
inline Normal normal(float x) {
  const float a = std::fabs(x);
  const float density = 0.39894228f * exp_below_zero(-0.5f * a * a);
  const float t = 1.0f / (1.0f + 0.23f * a);
  float ratio = -0.19654573286842508f;
  ratio = ratio * t + 0.7272329506313892f;
  ratio = ratio * t - 0.6955793542442273f;
  ratio = ratio * t + 0.7537628156700368f;
  ratio = ratio * t - 0.08110354226298438f;
  ratio = ratio * t + 0.2989272918090708f;
  ratio = ratio * t + 0.21515693784036746f;
  ratio = ratio * t + 0.2315304705254989f;
  ratio = ratio * t - 6.775901859022349e-05f;
  const float tail = density * ratio;
  return {density, x > 0.0f ? 1.0f - tail : tail};
}

#ifdef __AVX512F__
// Both for sixteen values: where a compiler is left to it, its code takes a sixth longer.
inline __m512 exp_below_zero(__m512 x) {
  const __mmask16 there = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  const __m512 magic = _mm512_set1_ps(12582912.0f);
  const __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504f), magic);
  const __m512 whole = _mm512_sub_ps(shifted, magic);
  __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693145752f), x);
  rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(1.42860677e-6f), rest);
  __m512 p = _mm512_set1_ps(1.381459568853478e-3f);
  for (const float c :
       {8.368717214102164e-3f, 4.166838810919513e-2f, 0.16666520628114084f, 0.4999999344746817f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(c));
  return _mm512_maskz_scalef_ps(there, p, whole);
}

struct Normals {
  __m512 density, cumulative;
};

inline Normals normal(__m512 x) {
  // Not infinite, which a step of Newton's makes no number of; what is none stays so.
  const __m512 a = _mm512_min_ps(_mm512_set1_ps(1e18f), _mm512_abs_ps(x)), one = _mm512_set1_ps(1.0f);
  const __m512 squared = _mm512_mul_ps(_mm512_mul_ps(a, a), _mm512_set1_ps(-0.5f));
  const __m512 density = _mm512_mul_ps(_mm512_set1_ps(0.39894228f), exp_below_zero(squared));
  const __m512 divisor = _mm512_fmadd_ps(a, _mm512_set1_ps(0.23f), one);
  __m512 t = _mm512_rcp14_ps(divisor);  // to 14 bits, and by a step of Newton's to 28
  t = _mm512_fmadd_ps(t, _mm512_fnmadd_ps(divisor, t, one), t);
  __m512 ratio = _mm512_set1_ps(-0.19654573286842508f);
  for (const float c : {0.7272329506313892f, -0.6955793542442273f, 0.7537628156700368f, -0.08110354226298438f,
                        0.2989272918090708f, 0.21515693784036746f, 0.2315304705254989f, -6.775901859022349e-05f})
    ratio = _mm512_fmadd_ps(ratio, t, _mm512_set1_ps(c));
  const __m512 tail = _mm512_mul_ps(density, ratio);
  const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
  return {density, _mm512_mask_sub_ps(tail, above, one, tail)};
}

// ---- What is rounded to bfloat16 next, by half a step of 2e-3 to 4e-3: an error of some 1e-4 is not seen there.

// 2^y of what is not above 0, to 3e-6; 0 below -125.
inline __m512 rough_power_of_two(__m512 y) {
  const __mmask16 there = _mm512_cmp_ps_mask(y, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);
  const __m512 whole = _mm512_roundscale_ps(y, 0), rest = _mm512_sub_ps(y, whole);
  __m512 p = _mm512_set1_ps(0.009571077302098274f);
  for (const float c : {0.05591822415590286f, 0.24024708569049835f, 0.6931218504905701f, 0.9999992847442627f})
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(c));
  return _mm512_maskz_scalef_ps(there, p, whole);
}

// As above, Mills' ratio fitted to 2e-5 and its variable from the processor's reciprocal, which is right to 6e-5.
inline Normals rough_normal(__m512 x) {
  const __m512 a = _mm512_abs_ps(x), one = _mm512_set1_ps(1.0f);
  const __m512 halves = _mm512_mul_ps(_mm512_mul_ps(a, a), _mm512_set1_ps(-0.72134752f));  // log2(e) / 2
  const __m512 density = _mm512_mul_ps(_mm512_set1_ps(0.39894228f), rough_power_of_two(halves));
  const __m512 t = _mm512_rcp14_ps(_mm512_fmadd_ps(a, _mm512_set1_ps(0.36f), one));
  __m512 ratio = _mm512_set1_ps(-0.24838563799858093f);
  for (const float c : {0.6414695978164673f, 0.08424228429794312f, 0.42460185289382935f, 0.35086679458618164f,
                        0.0005088006728328764f})
    ratio = _mm512_fmadd_ps(ratio, t, _mm512_set1_ps(c));
  const __m512 tail = _mm512_mul_ps(density, ratio);
  const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
  return {density, _mm512_mask_sub_ps(tail, above, one, tail)};
}

// For what is multiplied as C.
template <typename C>
inline Normals normal_for(__m512 x) {
  if constexpr (std::is_same_v<C, BFloat16>) {
    return rough_normal(x);
  } else {
    return normal(x);
  }
}
#endif

// Memory that begins where a cache line does.
template <typename T>
class Scratch {
 public:
  explicit Scratch(Index count) : values_(static_cast<T*>(std::aligned_alloc(64, bytes(count)))) {
    if (!values_) throw std::bad_alloc();
  }
  T* get() const { return values_.get(); }

 private:
  static std::size_t bytes(Index count) { return (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64; }
  struct Free {
    void operator()(T* values) const { std::free(values); }
  };
  std::unique_ptr<T, Free> values_;
};

// 8 rows of 8 values, their sides exchanged.
inline void transpose_8x8(const float* in, Index in_stride, float* out, Index out_stride) {
  __m256 row[8], pair[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(in + i * in_stride);
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    row[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    row[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    row[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    row[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(row[i], row[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * out_stride, _mm256_permute2f128_ps(row[i], row[i + 4], 0x31));
  }
}

inline void transpose_8x8(const BFloat16* in, Index in_stride, BFloat16* out, Index out_stride) {
  __m128i row[8], pair[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i * in_stride));
  for (int i = 0; i < 4; ++i) {
    pair[2 * i] = _mm_unpacklo_epi16(row[2 * i], row[2 * i + 1]);
    pair[2 * i + 1] = _mm_unpackhi_epi16(row[2 * i], row[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {  // columns 2i and 2i + 1, 2i + 4 and 2i + 5 of rows 0 to 3 and 4 to 7
    row[4 * i] = _mm_unpacklo_epi32(pair[4 * i], pair[4 * i + 2]);
    row[4 * i + 1] = _mm_unpackhi_epi32(pair[4 * i], pair[4 * i + 2]);
    row[4 * i + 2] = _mm_unpacklo_epi32(pair[4 * i + 1], pair[4 * i + 3]);
    row[4 * i + 3] = _mm_unpackhi_epi32(pair[4 * i + 1], pair[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    __m128i* first = reinterpret_cast<__m128i*>(out + 2 * i * out_stride);
    __m128i* second = reinterpret_cast<__m128i*>(out + (2 * i + 1) * out_stride);
    _mm_storeu_si128(first, _mm_unpacklo_epi64(row[i], row[i + 4]));
    _mm_storeu_si128(second, _mm_unpackhi_epi64(row[i], row[i + 4]));
  }
}

// rows × columns → columns × rows
template <typename T>
inline void transpose_part(const T* in, Index in_stride, Index rows, Index columns, T* out, Index out_stride) {
  const Index even_rows = rows & ~Index{7}, even_columns = columns & ~Index{7};
  for (Index row = 0; row < even_rows; row += 8) {
    for (Index column = 0; column < even_columns; column += 8)
      transpose_8x8(in + row * in_stride + column, in_stride, out + column * out_stride + row, out_stride);
    for (Index column = even_columns; column < columns; ++column)
      for (Index i = 0; i < 8; ++i) out[column * out_stride + row + i] = in[(row + i) * in_stride + column];
  }
  for (Index row = even_rows; row < rows; ++row)
    for (Index column = 0; column < columns; ++column) out[column * out_stride + row] = in[row * in_stride + column];
}

}  // namespace
