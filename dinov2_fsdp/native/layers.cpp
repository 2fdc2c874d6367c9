// What stands between the matrix products of a transformer block on a CPU, each in one pass over memory.
//
// Compiled once for each instruction set (setup.py); dinov2_fsdp/native/__init__.py loads one of them and says what
// every function takes. The loops are plain, for the compiler to vectorise; transposing and products are not.
// Arithmetic is in single precision, whatever the tensors' type. Sums over rows go through blocks of a fixed number of
// rows, so that results depend neither on the number of threads nor on their timing.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Index = std::int64_t;

constexpr Index kBlock = 32;   // rows whose sums are added up in single precision before they meet others in double
constexpr Index kWidest = 4096;  // values of a row that a function may keep beside it; longer rows are refused

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

// totals[column] = Σ over rows of what `add(row, sums)` adds to the sums of a block, in single precision; the blocks meet
// in order and in double precision.
template <typename Add>
inline void sum_over_rows(Index rows, Index columns, float* totals, const Add& add) {
  const Index blocks = (rows + kBlock - 1) / kBlock;
  const std::unique_ptr<float[]> partial(new float[blocks * columns]);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (Index block = 0; block < blocks; ++block) {
      float* sums = partial.get() + block * columns;
      std::fill(sums, sums + columns, 0.0f);
      const Index last = std::min(rows, (block + 1) * kBlock);
      for (Index row = block * kBlock; row < last; ++row) add(row, sums);
    }
#pragma omp for schedule(static)
    for (Index start = 0; start < columns; start += 64) {
      double sums[64] = {};
      const Index count = std::min<Index>(64, columns - start);
      for (Index block = 0; block < blocks; ++block) {
        const float* part = partial.get() + block * columns + start;
        for (Index i = 0; i < count; ++i) sums[i] += part[i];
      }
      for (Index i = 0; i < count; ++i) totals[start + i] = static_cast<float>(sums[i]);
    }
  }
}

// `out` may be `in`.
void gelu(const float* in, float* out, Index count) {
  constexpr Index kPart = 8192;
#pragma omp parallel for schedule(static)
  for (Index start = 0; start < count; start += kPart) {
    const Index end = std::min(count, start + kPart);
#pragma omp simd
    for (Index i = start; i < end; ++i) {
      out[i] = in[i] * normal(in[i]).cumulative;
    }
  }
}

template <typename T>
void gelu_backward(const T* hidden, T* gradient, T* activated, Index rows, Index columns, float* totals) {
  sum_over_rows(rows, columns, totals, [=](Index row, float* __restrict sums) {
    const T* __restrict x_row = hidden + row * columns;
    T* __restrict g_row = gradient + row * columns;
    T* __restrict a_row = activated + row * columns;
    for (Index i = 0; i < columns; ++i) {
      const float x = widen(x_row[i]);
      const Normal at = normal(x);
      const float g = widen(g_row[i]) * (at.cumulative + x * at.density);
      a_row[i] = narrow<T>(x * at.cumulative);
      g_row[i] = narrow<T>(g);
      sums[i] += g;
    }
  });
}

template <typename T>
void sum_rows(const T* in, Index rows, Index columns, float* totals) {
  sum_over_rows(rows, columns, totals, [=](Index row, float* __restrict sums) {
    const T* __restrict values = in + row * columns;
    for (Index i = 0; i < columns; ++i) sums[i] += widen(values[i]);
  });
}

template <typename T>
void norm(const T* __restrict in, const T* __restrict weight, const T* __restrict bias, float epsilon, Index rows,
          Index columns, T* __restrict out, float* __restrict means, float* __restrict scales) {
#pragma omp parallel for schedule(static)
  for (Index row = 0; row < rows; ++row) {
    const T* __restrict values = in + row * columns;
    T* __restrict target = out + row * columns;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (Index i = 0; i < columns; ++i) sum += widen(values[i]);
    const float mean = sum / static_cast<float>(columns);
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (Index i = 0; i < columns; ++i) {
      const float centred = widen(values[i]) - mean;
      squares += centred * centred;
    }
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(columns) + epsilon);
    for (Index i = 0; i < columns; ++i)
      target[i] = narrow<T>((widen(values[i]) - mean) * scale * widen(weight[i]) + widen(bias[i]));
    means[row] = mean;
    scales[row] = scale;
  }
}

// out = the gradient in the rows, + onto if that is given; totals: the sums for the weight, then those for the bias.
template <typename T>
void norm_backward(const T* gradient, const T* in, const float* means, const float* scales, const T* weight,
                   const T* onto, Index rows, Index columns, T* out, float* totals) {
  sum_over_rows(rows, 2 * columns, totals, [=](Index row, float* __restrict of_weight) {
    float* __restrict of_bias = of_weight + columns;
    const T* __restrict g_row = gradient + row * columns;
    const T* __restrict x_row = in + row * columns;
    const T* __restrict factors = weight;
    const Index count = columns;
    const float mean = means[row], scale = scales[row];
    float sum = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : sum, product)
    for (Index i = 0; i < count; ++i) {
      const float g = widen(g_row[i]), normed = (widen(x_row[i]) - mean) * scale, weighted = g * widen(factors[i]);
      sum += weighted;
      product += weighted * normed;
      of_weight[i] += g * normed;
      of_bias[i] += g;
    }
    sum /= static_cast<float>(columns);
    product /= static_cast<float>(columns);
    T* target = out + row * columns;
    const auto of_value = [=](Index i) {
      const float normed = (widen(x_row[i]) - mean) * scale;
      return scale * (widen(g_row[i]) * widen(factors[i]) - sum - normed * product);
    };
    if (onto) {
      const T* added = onto + row * columns;
#pragma omp simd
      for (Index i = 0; i < count; ++i) target[i] = narrow<T>(of_value(i) + widen(added[i]));
    } else {
#pragma omp simd
      for (Index i = 0; i < count; ++i) target[i] = narrow<T>(of_value(i));
    }
  });
}

// `out` may be `in`.
template <typename T>
void softmax(const T* in, T* out, Index rows, Index columns) {
#pragma omp parallel for schedule(static)
  for (Index row = 0; row < rows; ++row) {
    float values[kWidest];
    const T* source = in + row * columns;
    T* target = out + row * columns;
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (Index i = 0; i < columns; ++i) {
      const float value = widen(source[i]);
      values[i] = value;
      largest = value > largest ? value : largest;
    }
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (Index i = 0; i < columns; ++i) {
      values[i] = exp_below_zero(values[i] - largest);
      sum += values[i];
    }
    const float factor = 1.0f / sum;
#pragma omp simd
    for (Index i = 0; i < columns; ++i) target[i] = narrow<T>(values[i] * factor);
  }
}

// gradient ← weights · (gradient − Σ weights · gradient)
void softmax_backward(float* __restrict gradient, const float* __restrict weights, Index rows, Index columns) {
#pragma omp parallel for schedule(static)
  for (Index row = 0; row < rows; ++row) {
    float* __restrict g = gradient + row * columns;
    const float* __restrict w = weights + row * columns;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (Index i = 0; i < columns; ++i) sum += g[i] * w[i];
#pragma omp simd
    for (Index i = 0; i < columns; ++i) g[i] = w[i] * (g[i] - sum);
  }
}

template <typename T>
inline void copy_scaled(const T* __restrict in, T* __restrict out, Index count, float factor) {
  if (factor == 1.0f) {
    std::memcpy(out, in, count * sizeof(T));
  } else {
    for (Index i = 0; i < count; ++i) out[i] = narrow<T>(widen(in[i]) * factor);
  }
}

// packed (sequences · length, parts, heads, dim) → parts (parts, sequences · heads, length, dim), the first · factor
template <typename T>
void split_heads(const T* packed, Index sequences, Index length, Index parts, Index heads, Index dim, float factor,
                 T* out) {
  const Index stride = parts * heads * dim;
#pragma omp parallel for collapse(2) schedule(static)
  for (Index sequence = 0; sequence < sequences; ++sequence) {
    for (Index part = 0; part < parts * heads; ++part) {
      const Index kind = part / heads, head = part % heads;
      const T* source = packed + sequence * length * stride + part * dim;
      T* target = out + ((kind * sequences + sequence) * heads + head) * length * dim;
      for (Index i = 0; i < length; ++i) copy_scaled(source + i * stride, target + i * dim, dim, kind ? 1.0f : factor);
    }
  }
}

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

// batch × rows × columns → batch × columns × rows
template <typename T>
void transpose(const T* in, Index batch, Index rows, Index columns, T* out) {
  constexpr Index kColumns = 64 / sizeof(T);  // a cache line
#pragma omp parallel for collapse(2) schedule(static)
  for (Index matrix = 0; matrix < batch; ++matrix) {
    for (Index column = 0; column < columns; column += kColumns) {
      const Index start = matrix * rows * columns;
      transpose_part(in + start + column, columns, rows, std::min(kColumns, columns - column),
                     out + start + column * rows, rows);
    }
  }
}

// by head (sequences · heads, length, dim), or (sequences · heads, dim, length) if turned → packed, whose rows have
// `stride` values: (sequences · length, heads, dim), · factor
template <typename T>
void join_heads(const T* by_head, Index sequences, Index length, Index heads, Index dim, Index stride, float factor,
                bool turned, T* packed) {
#pragma omp parallel for collapse(2) schedule(static)
  for (Index sequence = 0; sequence < sequences; ++sequence) {
    for (Index head = 0; head < heads; ++head) {
      const T* source = by_head + (sequence * heads + head) * length * dim;
      T* target = packed + sequence * length * stride + head * dim;
      if (turned) {
        transpose_part(source, length, dim, length, target, stride);
      } else {
        for (Index i = 0; i < length; ++i) copy_scaled(source + i * dim, target + i * stride, dim, factor);
      }
    }
  }
}

#ifdef __AVX512F__

// Attention in single precision, one sequence's head after the other: its scores stay in a core's cache, and queries,
// keys and values are read where they lie. Libraries' products of such small matrices, 257 × 64 × 257, leave half of an AMD
// EPYC's speed unused (docs/performance.md).

// c (kRows × 16 · kVectors) = a · b; a[row][k] lies at row · a_row + k · a_k; `last` masks the last vector's columns.
template <int kRows, int kVectors>
inline void product_tile(const float* a, Index a_row, Index a_k, const float* b, Index b_k, Index depth,
                         __mmask16 last, float* c, Index c_row) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[row][v] = _mm512_setzero_ps();
  for (Index k = 0; k < depth; ++k) {
    __m512 columns[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      columns[v] = v + 1 < kVectors ? _mm512_loadu_ps(b + k * b_k + 16 * v)
                                    : _mm512_maskz_loadu_ps(last, b + k * b_k + 16 * v);
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      const __m512 value = _mm512_set1_ps(a[row * a_row + k * a_k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[row][v] = _mm512_fmadd_ps(value, columns[v], sums[row][v]);
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      _mm512_mask_storeu_ps(c + row * c_row + 16 * v, v + 1 < kVectors ? __mmask16(0xffff) : last, sums[row][v]);
}

template <int kRows, int kVectors>
inline void product_rows(Index rows, const float* a, Index a_row, Index a_k, const float* b, Index b_k, Index depth,
                         __mmask16 last, float* c, Index c_row) {
  for (; rows >= kRows; rows -= kRows, a += kRows * a_row, c += kRows * c_row)
    product_tile<kRows, kVectors>(a, a_row, a_k, b, b_k, depth, last, c, c_row);
  if constexpr (kRows > 1) {
    constexpr int kFewer = kRows > 8 ? 8 : kRows / 2;
    if (rows) product_rows<kFewer, kVectors>(rows, a, a_row, a_k, b, b_k, depth, last, c, c_row);
  }
}

// c (rows × columns) = a (rows × depth) · b (depth × columns), whose rows lie side by side.
void product(Index rows, Index columns, Index depth, const float* a, Index a_row, Index a_k, const float* b, Index b_k,
             float* c, Index c_row) {
  for (Index start = 0; start < columns; start += 32) {
    const Index some = std::min<Index>(32, columns - start);
    const Index in_last = some > 16 ? some - 16 : some;
    const auto last = static_cast<__mmask16>((1u << in_last) - 1u);
    if (some > 16) {
      product_rows<12, 2>(rows, a, a_row, a_k, b + start, b_k, depth, last, c + start, c_row);
    } else {
      product_rows<12, 1>(rows, a, a_row, a_k, b + start, b_k, depth, last, c + start, c_row);
    }
  }
}

// The place of one head of one sequence in packed (sequences · length, parts, heads, dim).
struct Heads {
  Index sequences, length, heads, dim;
  Index stride() const { return heads * dim; }
  Index of(Index index, Index parts) const {
    return (index / heads) * length * parts * stride() + (index % heads) * dim;
  }
};

// The softmax weights are written only if there is a place for them.
void attention(const float* qkv, Heads at, float factor, float* weights, float* out) {
  const Index length = at.length, dim = at.dim, row = 3 * at.stride(), count = at.sequences * at.heads;
#pragma omp parallel
  {
    const std::unique_ptr<float[]> keys(new float[dim * length]), cached(new float[weights ? 1 : length * length]);
#pragma omp for schedule(static)
    for (Index i = 0; i < count; ++i) {
      const float* query = qkv + at.of(i, 3);
      const float* key = query + at.stride();
      const float* value = key + at.stride();
      float* scores = weights ? weights + i * length * length : cached.get();
      transpose_part(key, row, length, dim, keys.get(), length);
      product(length, length, dim, query, row, 1, keys.get(), length, scores, length);
      for (Index r = 0; r < length; ++r) {
        float* __restrict values = scores + r * length;
        float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
        for (Index c = 0; c < length; ++c) {
          values[c] *= factor;
          largest = values[c] > largest ? values[c] : largest;
        }
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (Index c = 0; c < length; ++c) {
          values[c] = exp_below_zero(values[c] - largest);
          sum += values[c];
        }
        const float scale = 1.0f / sum;
#pragma omp simd
        for (Index c = 0; c < length; ++c) values[c] *= scale;
      }
      product(length, dim, length, scores, length, 1, value, row, out + at.of(i, 1), at.stride());
    }
  }
}

void attention_backward(const float* gradient, const float* qkv, const float* weights, Heads at, float factor,
                        float* of_qkv) {
  const Index length = at.length, dim = at.dim, row = 3 * at.stride(), count = at.sequences * at.heads;
#pragma omp parallel
  {
    const std::unique_ptr<float[]> values(new float[dim * length]), scores(new float[length * length]);
#pragma omp for schedule(static)
    for (Index i = 0; i < count; ++i) {
      const float* query = qkv + at.of(i, 3);
      const float* key = query + at.stride();
      const float* of_out = gradient + at.of(i, 1);
      const float* kept = weights + i * length * length;
      float* of_query = of_qkv + at.of(i, 3);
      transpose_part(key + at.stride(), row, length, dim, values.get(), length);
      product(length, length, dim, of_out, at.stride(), 1, values.get(), length, scores.get(), length);
      for (Index r = 0; r < length; ++r) {
        float* __restrict of_scores = scores.get() + r * length;
        const float* __restrict w = kept + r * length;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (Index c = 0; c < length; ++c) sum += of_scores[c] * w[c];
#pragma omp simd
        for (Index c = 0; c < length; ++c) of_scores[c] = factor * w[c] * (of_scores[c] - sum);
      }
      product(length, dim, length, scores.get(), length, 1, key, row, of_query, row);
      product(length, dim, length, scores.get(), 1, length, query, row, of_query + at.stride(), row);
      product(length, dim, length, kept, 1, length, of_out, at.stride(), of_query + 2 * at.stride(), row);
    }
  }
}

#endif

}  // namespace

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

// Of which code this was built.
EXPORT const char* dinov2_source() { return DINOV2_SOURCE; }

EXPORT Index dinov2_widest_row() { return kWidest; }

EXPORT void dinov2_gelu(const float* in, float* out, Index count) { gelu(in, out, count); }

EXPORT void dinov2_gelu_backward(int half, const void* hidden, void* gradient, void* activated, Index rows,
                                 Index columns, float* totals) {
  CALL(gelu_backward, IN(hidden), OUT(gradient), OUT(activated), rows, columns, totals)
}

EXPORT void dinov2_sum_rows(int half, const void* in, Index rows, Index columns, float* totals) {
  CALL(sum_rows, IN(in), rows, columns, totals)
}

EXPORT void dinov2_norm(int half, const void* in, const void* weight, const void* bias, float epsilon, Index rows,
                        Index columns, void* out, float* means, float* scales) {
  CALL(norm, IN(in), IN(weight), IN(bias), epsilon, rows, columns, OUT(out), means, scales)
}

EXPORT void dinov2_norm_backward(int half, const void* gradient, const void* in, const float* means,
                                 const float* scales, const void* weight, const void* onto, Index rows, Index columns,
                                 void* out, float* totals) {
  CALL(norm_backward, IN(gradient), IN(in), means, scales, IN(weight), IN(onto), rows, columns, OUT(out), totals)
}

EXPORT void dinov2_softmax(int half, const void* in, void* out, Index rows, Index columns) {
  CALL(softmax, IN(in), OUT(out), rows, columns)
}

EXPORT void dinov2_softmax_backward(float* gradient, const float* weights, Index rows, Index columns) {
  softmax_backward(gradient, weights, rows, columns);
}

EXPORT void dinov2_split_heads(int half, const void* packed, Index sequences, Index length, Index parts, Index heads,
                               Index dim, float factor, void* out) {
  CALL(split_heads, IN(packed), sequences, length, parts, heads, dim, factor, OUT(out))
}

EXPORT void dinov2_join_heads(int half, const void* by_head, Index sequences, Index length, Index heads, Index dim,
                              Index stride, float factor, int turned, void* packed) {
  CALL(join_heads, IN(by_head), sequences, length, heads, dim, stride, factor, turned != 0, OUT(packed))
}

EXPORT void dinov2_transpose(int half, const void* in, Index batch, Index rows, Index columns, void* out) {
  CALL(transpose, IN(in), batch, rows, columns, OUT(out))
}

// Whether there is attention: it needs AVX-512.
EXPORT int dinov2_has_attention() {
#ifdef __AVX512F__
  return 1;
#else
  return 0;
#endif
}

#ifdef __AVX512F__

EXPORT void dinov2_attention(const float* qkv, Index sequences, Index length, Index heads, Index dim, float factor,
                             float* weights, float* out) {
  attention(qkv, {sequences, length, heads, dim}, factor, weights, out);
}

EXPORT void dinov2_attention_backward(const float* gradient, const float* qkv, const float* weights, Index sequences,
                                      Index length, Index heads, Index dim, float factor, float* of_qkv) {
  attention_backward(gradient, qkv, weights, {sequences, length, heads, dim}, factor, of_qkv);
}

#endif
