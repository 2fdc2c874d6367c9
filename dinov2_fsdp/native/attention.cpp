// Attention on a CPU, one sequence's head after the other: its scores stay in a core's cache.
//
// Libraries' products of such small matrices, 257 × 64 × 257, leave half of an AMD EPYC's speed unused, and need a pass
// over memory before and after each (docs/performance.md). Here the right side of every product is laid out anew in
// panels, so that neither strides nor the tensors' type reach the innermost loop. The backward pass computes the softmax
// weights again, as in 2205.14135: to write them down and to read them takes about as long, and there are many.
//
// This is attention that multiplies in single precision; for bfloat16 see attention_pairs.h.

#include "attention_pairs.h"

#ifdef __AVX512F__

namespace {

constexpr Index kQueries = 60;  // at most at a time, forward

// Fewer where the last would be few.
inline Index queries_at_a_time(Index length) {
  const Index parts = (length + kQueries - 1) / kQueries;
  return (length + parts - 1) / parts;
}

// rows × columns as they are multiplied: where they lie if they have the type, else in `copy`.
template <typename T>
inline Left<float> read(const T* in, Index stride, Index rows, Index columns, float* copy) {
  if constexpr (std::is_same_v<T, float>) {
    return {in, stride};
  } else {
    for (Index row = 0; row < rows; ++row) convert(in + row * stride, columns, copy + row * columns);
    return {copy, columns};
  }
}

// A row of scores → the exponentials of its softmax; returns what they are to be multiplied by. What is beyond `length`
// comes out as zeros.
inline float exponentials(float* scores, Index length, float factor) {
  const Index vectors = up_to(16, length);
  for (Index c = length; c < vectors; ++c) scores[c] = -INFINITY;
  __m512 most = load(scores);
  for (Index c = 16; c < vectors; c += 16) most = _mm512_max_ps(load(scores + c), most);
  // Subtracted first: what is rounded of a product of the largest would make its own exponential anything.
  const __m512 scale = _mm512_set1_ps(factor), largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  __m512 sum = _mm512_setzero_ps();
  for (Index c = 0; c < vectors; c += 16) {
    const __m512 found = exp_below_zero(_mm512_mul_ps(_mm512_sub_ps(load(scores + c), largest), scale));
    sum = _mm512_add_ps(sum, found);
    _mm512_storeu_ps(scores + c, found);
  }
  return 1.0f / _mm512_reduce_add_ps(sum);
}

// Up to 16 values.
inline void store(__m512 values, float* out, Index there) {
  _mm512_mask_storeu_ps(out, lanes(there), values);
}

inline void store(__m512 values, BFloat16* out, Index there) {
#ifdef __AVX512BF16__
  _mm256_mask_storeu_epi16(out, lanes(there), (__m256i)_mm512_cvtneps_pbh(values));
#else
  float wide[16];
  _mm512_storeu_ps(wide, values);
  convert(wide, std::min<Index>(16, there), out);
#endif
}

// in · factor
template <typename T>
inline void scale_row(const float* in, Index count, float factor, T* out) {
  for (Index c = 0; c < count; c += 16) {
    store(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(count - c), in + c), _mm512_set1_ps(factor)), out + c, count - c);
  }
}

template <typename T>
void attention(const T* qkv, Heads at, float factor, T* out) {
  const Index length = at.length, dim = at.dim, row = 3 * at.stride(), count = at.sequences * at.heads;
  const Index wide = padded(length);
  const int some_heads = heads_at_a_time(at);
#pragma omp parallel
  {
    const Scratch<float> keys(dim * wide), values(length * padded(dim)), copy(std::is_same_v<T, float> ? 1 : length * dim);
    const Scratch<float> weights(kQueries * wide), found(kQueries * dim), scales(kQueries);
#pragma omp for schedule(dynamic, some_heads)
    for (Index i = 0; i < count; ++i) {
      const T *first = qkv + at.of(i, 3), *next = (i + 1) % some_heads ? qkv + at.of(i + 1, 3) : nullptr;
      const Left<float> key = read(first + at.stride(), row, length, dim, copy.get());
      pack_transposed(key.at, key.row_step, dim, length, keys.get());
      lay_out_rows(first + 2 * at.stride(), row, length, dim, values.get());
      const Left<float> query = read(first, row, length, dim, copy.get());
      const Index queries = queries_at_a_time(length);
      for (Index start = 0; start < length; start += queries) {
        const Index some = std::min(queries, length - start);
        product(some, length, dim, query.from_row(start), keys.get(), weights.get(), wide);
        for (Index r = 0; r < some; ++r) {
          float* at_row = weights.get() + r * wide;
          scales.get()[r] = exponentials(at_row, length, factor);
          if (next) ask_for_row(next, start + r, at, 3);
        }
        // Divided by their sums afterwards: what weights are multiplied with is less than they are.
        T* target = out + at.of(i, 1) + start * at.stride();
        product(some, dim, length, {weights.get(), wide}, values.get(), found.get(), dim);
        for (Index r = 0; r < some; ++r)
          scale_row(found.get() + r * dim, dim, scales.get()[r], target + r * at.stride());
      }
    }
  }
}

// c (columns × dim) = leftᵀ · panels, both with `length` rows; left (length × columns).
inline void transposed_product(Index columns, Index dim, Index length, const float* left, Index left_row,
                               const float* panels, float* c, Index c_row) {
  product(columns, dim, length, {left, 1, 32 * left_row, left_row}, panels, c, c_row);
}

template <typename T>
void attention_backward(const float* gradient, const T* qkv, Heads at, float factor, float* of_qkv) {
  const Index length = at.length, dim = at.dim, row = 3 * at.stride(), count = at.sequences * at.heads;
  const Index wide = padded(length);
  const int some_heads = heads_at_a_time(at);
#pragma omp parallel
  {
    const Scratch<float> panels(std::max(dim * wide, length * padded(dim)));
    const Scratch<float> copy(std::is_same_v<T, float> ? 1 : length * dim);
    const Scratch<float> weights(length * wide), scores(length * wide);
#pragma omp for schedule(dynamic, some_heads)
    for (Index i = 0; i < count; ++i) {
      const T* query = qkv + at.of(i, 3);
      float* of_query = of_qkv + at.of(i, 3);
      const Left<float> of_out = {gradient + at.of(i, 1), at.stride()};
      const Left<float> key = read(query + at.stride(), row, length, dim, copy.get());
      pack_transposed(key.at, key.row_step, dim, length, panels.get());
      product(length, length, dim, read(query, row, length, dim, copy.get()), panels.get(), weights.get(), wide);
      const Left<float> value = read(query + 2 * at.stride(), row, length, dim, copy.get());
      pack_transposed(value.at, value.row_step, dim, length, panels.get());
      product(length, length, dim, of_out, panels.get(), scores.get(), wide);
      for (Index r = 0; r < length; ++r) {
        float *of_scores = scores.get() + r * wide, *at_row = weights.get() + r * wide;
        const float scale = exponentials(at_row, length, factor);
        if ((i + 1) % some_heads) {
          ask_for_row(qkv + at.of(i + 1, 3), r, at, 3);
          ask_for_row(gradient + at.of(i + 1, 1), r, at, 1);
          ask_for_row(of_qkv + at.of(i + 1, 3), r, at, 3);
        }
        // Behind the softmax weights stand zeros, so that zeros do behind these.
        for (Index c = length; c < up_to(16, length); ++c) of_scores[c] = 0.0f;
        const __m512 sum = _mm512_set1_ps(
            scale * sum_of(length, [=](Index c) { return _mm512_mul_ps(load(of_scores + c), load(at_row + c)); }));
        for (Index c = 0; c < length; c += 16) {
          const __m512 weight = _mm512_mul_ps(load(at_row + c), _mm512_set1_ps(scale));
          _mm512_storeu_ps(of_scores + c, _mm512_mul_ps(_mm512_mul_ps(weight, _mm512_set1_ps(factor)),
                                                        _mm512_sub_ps(load(of_scores + c), sum)));
          _mm512_storeu_ps(at_row + c, weight);
        }
      }
      lay_out_rows(query + at.stride(), row, length, dim, panels.get());
      product(length, dim, length, {scores.get(), wide}, panels.get(), of_query, row);
      lay_out_rows(query, row, length, dim, panels.get());
      float *of_key = of_query + at.stride(), *of_value = of_key + at.stride();
      transposed_product(length, dim, length, scores.get(), wide, panels.get(), of_key, row);
      lay_out_rows(of_out.at, of_out.row_step, length, dim, panels.get());
      transposed_product(length, dim, length, weights.get(), wide, panels.get(), of_value, row);
    }
  }
}

// By the type that is multiplied.
template <typename T, typename C>
void by_type(const T* qkv, Heads at, float factor, T* out) {
  if constexpr (std::is_same_v<C, float>) {
    attention(qkv, at, factor, out);
  } else {
    attention_by_pairs(qkv, at, factor, out);
  }
}

template <typename T, typename C>
void backward_by_type(const C* gradient, const T* qkv, Heads at, float factor, C* of_qkv) {
  if constexpr (std::is_same_v<C, float>) {
    attention_backward(gradient, qkv, at, factor, of_qkv);
  } else {
    attention_backward_by_pairs(gradient, qkv, at, factor, of_qkv);
  }
}

}  // namespace

// `how`: see panels.h. The gradients have the type that is multiplied.
EXPORT void dinov2_attention(int how, const void* qkv, Index sequences, Index length, Index heads, Index dim,
                             float factor, void* out) {
  const Heads at = {sequences, length, heads, dim};
  MULTIPLY(by_type, IN(qkv), at, factor, OUT(out))
}

EXPORT void dinov2_attention_backward(int how, const void* gradient, const void* qkv, Index sequences, Index length,
                                      Index heads, Index dim, float factor, void* of_qkv) {
  const Heads at = {sequences, length, heads, dim};
  MULTIPLY(backward_by_type, BETWEEN(gradient), IN(qkv), at, factor, BETWEEN_OUT(of_qkv))
}

#endif
