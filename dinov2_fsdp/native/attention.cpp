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
inline Index queries_at_a_time(Index count) {
  const Index parts = std::max<Index>(1, (count + kQueries - 1) / kQueries);
  return (count + parts - 1) / parts;
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
void attention(Parts<const T> in, Heads at, float factor, T* out) {
  const Index length = at.length, dim = at.dim, count = at.sequences * at.heads;
  const Index wide = padded(length);
  const int some_heads = heads_at_a_time(at);
#pragma omp parallel
  {
    const Scratch<float> keys(dim * wide), values(length * padded(dim)), copy(std::is_same_v<T, float> ? 1 : length * dim);
    const Scratch<float> weights(kQueries * wide), found(kQueries * dim), scales(kQueries);
#pragma omp for schedule(dynamic, some_heads)
    for (Index i = 0; i < count; ++i) {
      const T *first = in.keys + at.of_keys(i, in.key_row), *next = next_head(in, at, i, some_heads);
      const Index all = at.queries(i), queries = queries_at_a_time(all);
      const Left<float> key = read(first, in.key_row, length, dim, copy.get());
      pack_transposed(key.at, key.row_step, dim, length, keys.get());
      lay_out_rows(first + at.stride(), in.key_row, length, dim, values.get());
      const T* asked = in.queries + at.of_queries(i, in.query_row);
      const Left<float> query = read(asked, in.query_row, all, dim, copy.get());
      for (Index start = 0; start < all; start += queries) {
        const Index some = std::min(queries, all - start);
        product(some, length, dim, query.from_row(start), keys.get(), weights.get(), wide);
        for (Index r = 0; r < some; ++r) {
          float* at_row = weights.get() + r * wide;
          scales.get()[r] = exponentials(at_row, length, factor);
          if (next) ask_for_row(next, start + r, at, 3);
        }
        // Divided by their sums afterwards: what weights are multiplied with is less than they are.
        T* target = out + at.of_queries(i, at.stride()) + start * at.stride();
        product(some, dim, length, {weights.get(), wide}, values.get(), found.get(), dim);
        for (Index r = 0; r < some; ++r)
          scale_row(found.get() + r * dim, dim, scales.get()[r], target + r * at.stride());
      }
    }
  }
}

// c (columns × dim) = leftᵀ · panels, both with so many `rows`; left (rows × columns).
inline void transposed_product(Index columns, Index dim, Index rows, const float* left, Index left_row,
                               const float* panels, float* c, Index c_row) {
  product(columns, dim, rows, {left, 1, 32 * left_row, left_row}, panels, c, c_row);
}

template <typename T>
void attention_backward(const float* gradient, Parts<const T> in, Heads at, float factor, Parts<float> of) {
  const Index length = at.length, dim = at.dim, count = at.sequences * at.heads;
  const Index wide = padded(length);
  const int some_heads = heads_at_a_time(at);
#pragma omp parallel
  {
    const Scratch<float> panels(std::max(dim * wide, length * padded(dim)));
    const Scratch<float> copy(std::is_same_v<T, float> ? 1 : length * dim);
    const Scratch<float> weights(length * wide), scores(length * wide);
#pragma omp for schedule(dynamic, some_heads)
    for (Index i = 0; i < count; ++i) {
      const T *query = in.queries + at.of_queries(i, in.query_row), *keys = in.keys + at.of_keys(i, in.key_row);
      float *of_query = of.queries + at.of_queries(i, of.query_row), *of_key = of.keys + at.of_keys(i, of.key_row);
      const Index queries = at.queries(i);
      const Left<float> of_out = {gradient + at.of_queries(i, at.stride()), at.stride()};
      const Left<float> key = read(keys, in.key_row, length, dim, copy.get());
      pack_transposed(key.at, key.row_step, dim, length, panels.get());
      product(queries, length, dim, read(query, in.query_row, queries, dim, copy.get()), panels.get(), weights.get(), wide);
      const Left<float> value = read(keys + at.stride(), in.key_row, length, dim, copy.get());
      pack_transposed(value.at, value.row_step, dim, length, panels.get());
      product(queries, length, dim, of_out, panels.get(), scores.get(), wide);
      for (Index r = 0; r < queries; ++r) {
        float *of_scores = scores.get() + r * wide, *at_row = weights.get() + r * wide;
        const float scale = exponentials(at_row, length, factor);
        if (const T* next = next_head(in, at, i, some_heads)) {
          ask_for_row(next, r, at, 3);
          ask_for_row(gradient + at.of_queries(i + 1, at.stride()), r, at, 1);
          ask_for_row(next_head(of, at, i, some_heads), r, at, 3);
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
      lay_out_rows(keys, in.key_row, length, dim, panels.get());
      product(queries, dim, length, {scores.get(), wide}, panels.get(), of_query, of.query_row);
      lay_out_rows(query, in.query_row, queries, dim, panels.get());
      transposed_product(length, dim, queries, scores.get(), wide, panels.get(), of_key, of.key_row);
      lay_out_rows(of_out.at, of_out.row_step, queries, dim, panels.get());
      transposed_product(length, dim, queries, weights.get(), wide, panels.get(), of_key + at.stride(), of.key_row);
    }
  }
}

// By the type that is multiplied.
template <typename T, typename C>
void by_type(const Parts<const T>& in, Heads at, float factor, T* out) {
  if constexpr (std::is_same_v<C, float>) {
    attention(in, at, factor, out);
  } else {
    attention_by_pairs(in, at, factor, out);
  }
}

template <typename T, typename C>
void backward_by_type(const C* gradient, const Parts<const T>& in, Heads at, float factor, const Parts<C>& of) {
  if constexpr (std::is_same_v<C, float>) {
    attention_backward(gradient, in, at, factor, of);
  } else {
    attention_backward_by_pairs(gradient, in, at, factor, of);
  }
}

// Rows of queries, keys and values.
template <typename T>
inline Parts<T> of_three(T* qkv, const Heads& at) {
  return {qkv, qkv + at.stride(), 3 * at.stride(), 3 * at.stride()};
}

// Rows of queries, and rows of keys and values.
template <typename T>
inline Parts<T> of_two(T* queries, T* keys, const Heads& at) {
  return {queries, keys, at.stride(), 2 * at.stride()};
}

}  // namespace

// `how`: see panels.h. The gradients have the type that is multiplied.
EXPORT void dinov2_attention(int how, const void* qkv, Index sequences, Index length, Index heads, Index dim,
                             float factor, void* out) {
  const Heads at = {sequences, length, heads, dim, nullptr};
  MULTIPLY(by_type, of_three(IN(qkv), at), at, factor, OUT(out))
}

EXPORT void dinov2_attention_backward(int how, const void* gradient, const void* qkv, Index sequences, Index length,
                                      Index heads, Index dim, float factor, void* of_qkv) {
  const Heads at = {sequences, length, heads, dim, nullptr};
  MULTIPLY(backward_by_type, BETWEEN(gradient), of_three(IN(qkv), at), at, factor, of_three(BETWEEN_OUT(of_qkv), at))
}

// … of some queries, (count, heads, dim), a sequence's after the other's: `starts`, (sequences + 1), says which are
// whose. Keys and values: (sequences · length, 2, heads, dim).
EXPORT void dinov2_attention_of(int how, const void* queries, const void* keys, const Index* starts, Index sequences,
                                Index length, Index heads, Index dim, float factor, void* out) {
  const Heads at = {sequences, length, heads, dim, starts};
  MULTIPLY(by_type, of_two(IN(queries), IN(keys), at), at, factor, OUT(out))
}

EXPORT void dinov2_attention_of_backward(int how, const void* gradient, const void* queries, const void* keys,
                                         const Index* starts, Index sequences, Index length, Index heads, Index dim,
                                         float factor, void* of_queries, void* of_keys) {
  const Heads at = {sequences, length, heads, dim, starts};
  MULTIPLY(backward_by_type, BETWEEN(gradient), of_two(IN(queries), IN(keys), at), at, factor,
           of_two(BETWEEN_OUT(of_queries), BETWEEN_OUT(of_keys), at))
}

#endif
