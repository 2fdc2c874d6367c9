// Attention on a CPU, one sequence's head after the other: its scores stay in a core's cache.
//
// Libraries' products of such small matrices, 257 × 64 × 257, leave half of an AMD EPYC's speed unused, and need a pass
// over memory before and after each (docs/performance.md). Here the right side of every product is laid out anew in
// panels, so that neither strides nor the tensors' type reach the innermost loop. The backward pass computes the softmax
// weights again, as in 2205.14135: to write them down and to read them takes about as long, and there are many.

#include "panels.h"

#ifdef __AVX512F__

#include <omp.h>

namespace {

// Queries at most at a time, forward. Fewer come at a time where the last would be few, but whole tiles.
template <typename C>
constexpr Index kQueries = kByTiles<C> ? 128 : 60;

template <typename C>
inline Index queries_at_a_time(Index length) {
  const Index parts = (length + kQueries<C> - 1) / kQueries<C>, queries = (length + parts - 1) / parts;
  return kByTiles<C> ? std::min(kQueries<C>, up_to(16, queries)) : queries;
}

// columns × depth → the panels of its transposed.
inline void pack_transposed(const float* in, Index stride, Index depth, Index columns, float* panels) {
  for (Index start = 0; start < columns; start += kPanel, panels += depth * kPanel) {
    const Index some = std::min(kPanel, columns - start);
    if (some < kPanel) std::fill(panels, panels + depth * kPanel, 0.0f);
    transpose_part(in + start * stride, stride, some, depth, panels, kPanel);
  }
}

// … of a matrix whose rows hold pairs: what is transposed is one of them, in the memory of a float.
inline void pack_transposed(const BFloat16* in, Index stride, Index depth, Index columns, BFloat16* panels) {
  pack_transposed(reinterpret_cast<const float*>(in), stride / 2, depth / 2, columns, reinterpret_cast<float*>(panels));
}

// rows × columns as they are multiplied: where they lie if they have the type, else in `copy`.
template <typename C, typename T>
inline Left<C> read(const T* in, Index stride, Index rows, Index columns, C* copy) {
  if constexpr (std::is_same_v<T, C>) {
    return {in, stride};
  } else {
    for (Index row = 0; row < rows; ++row) convert(in + row * stride, columns, copy + row * columns);
    return {copy, columns};
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

// Heads that a thread takes one after the other: all of a sequence, whose rows they share, if there are enough of those.
inline int heads_at_a_time(const Heads& at) {
  return static_cast<int>(at.sequences >= 4 * omp_get_max_threads() ? at.heads : 1);
}

// Asks for one row of a head of queries, keys and values, or of other parts, which lie far from the rows around it: no
// processor guesses that. They are wanted later, so that the nearest cache stays to what is worked on.
template <typename T>
inline void ask_for_row(const T* first, Index row, const Heads& at, Index parts) {
  for (Index part = 0; part < parts; ++part) {
    const char* lies = reinterpret_cast<const char*>(first + (row * parts + part) * at.stride());
    for (Index byte = 0; byte < at.dim * static_cast<Index>(sizeof(T)); byte += 64)
      _mm_prefetch(lies + byte, _MM_HINT_T1);
  }
}

// A row of scores → the exponentials of its softmax, handed to `take(vector, exponentials)` by sixteen; returns what
// they are to be multiplied by. What is beyond `length` comes out as zeros.
template <typename Take>
inline float exponentials(float* scores, Index length, float factor, const Take& take) {
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
    take(c, found);
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

// Zeros behind the whole vectors of a row that is multiplied.
template <typename C>
inline void fill_row(C* out, Index length, Index depth) {
  for (Index c = up_to(16, length); c < depth; ++c) out[c] = C{};
}

// Rows of keys, queries or gradients as the right side of a product.
template <typename C, typename T>
inline void lay_out_rows(const T* in, Index stride, Index length, Index dim, C* panels) {
  const Index depth = depth_of<C>(length);
  lay_out<kPanel>(in, stride, length, dim, depth, panels);
  fill_up(length, dim, depth, panels);
}

template <typename T, typename C>
void attention(const T* qkv, Heads at, float factor, T* out) {
  const Index length = at.length, dim = at.dim, row = 3 * at.stride(), count = at.sequences * at.heads;
  const Index wide = padded(length), depth = depth_of<C>(length);
  const int some_heads = heads_at_a_time(at);
#pragma omp parallel
  {
    [[maybe_unused]] const InUse<C> in_use;
    constexpr bool kHalf = !std::is_same_v<C, float>;
    const Scratch<C> keys(dim * wide), values(depth * padded(dim)), copy(std::is_same_v<T, C> ? 1 : length * dim);
    const Scratch<float> cached(kQueries<C> * wide), found(kQueries<C> * dim), scales(kQueries<C>);
    const Scratch<C> halves(kHalf ? kQueries<C> * wide : 1);
    // Where weights go, before each row is divided by its sum: what they are multiplied with is less than they are.
    C* weights;
    if constexpr (kHalf) {
      weights = halves.get();
    } else {
      weights = cached.get();
    }
#pragma omp for schedule(dynamic, some_heads)
    for (Index i = 0; i < count; ++i) {
      const T *first = qkv + at.of(i, 3), *next = (i + 1) % some_heads ? qkv + at.of(i + 1, 3) : nullptr;
      const Left<C> key = read(first + at.stride(), row, length, dim, copy.get());
      pack_transposed(key.at, key.row_step, dim, length, keys.get());
      lay_out_rows(first + 2 * at.stride(), row, length, dim, values.get());
      const Left<C> query = read(first, row, length, dim, copy.get());
      const Index queries = queries_at_a_time<C>(length);
      for (Index start = 0; start < length; start += queries) {
        const Index some = std::min(queries, length - start);
        product(some, length, dim, query.from_row(start), keys.get(), cached.get(), wide);
        for (Index r = 0; r < some; ++r) {
          C* to = weights + r * wide;
          scales.get()[r] = exponentials(cached.get() + r * wide, length, factor,
                                         [=](Index c, __m512 value) { store(value, to + c, 16); });
          fill_row(to, length, depth);
          if (next) ask_for_row(next, start + r, at, 3);
        }
        T* target = out + at.of(i, 1) + start * at.stride();
        product(some, dim, depth, Left<C>{weights, wide}, values.get(), found.get(), dim);
        for (Index r = 0; r < some; ++r)
          scale_row(found.get() + r * dim, dim, scales.get()[r], target + r * at.stride());
      }
    }
  }
}

// c (columns × dim) = leftᵀ · panels, both with `length` rows; left (length × columns).
inline void transposed_product(Index columns, Index dim, Index length, Left<float> left, const float* panels,
                               float* /*groups*/, float* c, Index c_row) {
  product(columns, dim, length, {left.at, 1, 32 * left.row_step, left.row_step}, panels, c, c_row);
}

#ifdef __AVX512BF16__
inline void transposed_product(Index columns, Index dim, Index length, Left<BFloat16> left, const BFloat16* panels,
                               BFloat16* groups, float* c, Index c_row) {
  const Index depth = depth_of<BFloat16>(length);
  lay_out_groups(left.at, left.row_step, length, columns, depth, groups);
  for (Index p = 0; p * kPanel < dim; ++p)
    add_groups(groups, depth * Multiplied<BFloat16>::kGroup, panels + p * depth * kPanel, depth, true, columns,
               std::min(kPanel, dim - p * kPanel), c + p * kPanel, c_row);
}
#endif

template <typename T, typename C>
void attention_backward(const C* gradient, const T* qkv, Heads at, float factor, C* of_qkv) {
  const Index length = at.length, dim = at.dim, row = 3 * at.stride(), count = at.sequences * at.heads;
  const Index wide = padded(length), depth = depth_of<C>(length);
  const int some_heads = heads_at_a_time(at);
#pragma omp parallel
  {
    [[maybe_unused]] const InUse<C> in_use;
    constexpr bool kHalf = !std::is_same_v<C, float>;
    const Scratch<C> panels(std::max(dim * wide, depth * padded(dim)));
    const Scratch<C> copy(std::is_same_v<T, C> ? 1 : length * dim);
    const Scratch<C> half_weights(kHalf ? length * wide : 1), halves(kHalf ? length * wide : 1);
    const Scratch<float> found(kHalf ? length * dim : 1);
    const Scratch<C> groups(kHalf ? groups_of<C>(length) * Multiplied<C>::kGroup * depth : 1);
    const Scratch<float> weights(length * wide), scores(length * wide);
    C *of_scores_to, *kept_to;
    if constexpr (kHalf) {
      of_scores_to = halves.get(), kept_to = half_weights.get();
    } else {
      of_scores_to = scores.get(), kept_to = weights.get();
    }
#pragma omp for schedule(dynamic, some_heads)
    for (Index i = 0; i < count; ++i) {
      const T* query = qkv + at.of(i, 3);
      C* of_query = of_qkv + at.of(i, 3);
      const Left<C> of_out = {gradient + at.of(i, 1), at.stride()};
      // Where a product goes, and what brings it to where it belongs.
      const auto place = [&](C* target) {
        if constexpr (kHalf) {
          return found.get();
        } else {
          return target;
        }
      };
      const Index found_row = kHalf ? dim : row;
      const auto keep = [&](C* target) {
        if constexpr (kHalf)
          for (Index r = 0; r < length; ++r) convert(found.get() + r * dim, dim, target + r * row);
      };
      const Left<C> key = read(query + at.stride(), row, length, dim, copy.get());
      pack_transposed(key.at, key.row_step, dim, length, panels.get());
      product(length, length, dim, read(query, row, length, dim, copy.get()), panels.get(), weights.get(), wide);
      const Left<C> value = read(query + 2 * at.stride(), row, length, dim, copy.get());
      pack_transposed(value.at, value.row_step, dim, length, panels.get());
      product(length, length, dim, of_out, panels.get(), scores.get(), wide);
      for (Index r = 0; r < length; ++r) {
        float* of_scores = scores.get() + r * wide;
        float* at_row = weights.get() + r * wide;
        const float scale =
            exponentials(at_row, length, factor, [=](Index c, __m512 value) { _mm512_storeu_ps(at_row + c, value); });
        if ((i + 1) % some_heads) {
          ask_for_row(qkv + at.of(i + 1, 3), r, at, 3);
          ask_for_row(gradient + at.of(i + 1, 1), r, at, 1);
          ask_for_row(of_qkv + at.of(i + 1, 3), r, at, 3);
        }
        // Behind the softmax weights stand zeros, so that zeros do behind these.
        for (Index c = length; c < up_to(16, length); ++c) of_scores[c] = 0.0f;
        const __m512 sum = _mm512_set1_ps(
            scale * sum_of(length, [=](Index c) { return _mm512_mul_ps(load(of_scores + c), load(at_row + c)); }));
        C *to = of_scores_to + r * wide, *weights_to = kept_to + r * wide;
        for (Index c = 0; c < length; c += 16) {
          const __m512 weight = _mm512_mul_ps(load(at_row + c), _mm512_set1_ps(scale));
          const __m512 of_score = _mm512_mul_ps(_mm512_mul_ps(weight, _mm512_set1_ps(factor)),
                                                _mm512_sub_ps(load(of_scores + c), sum));
          store(of_score, to + c, 16);
          store(weight, weights_to + c, 16);
        }
        fill_row(to, length, depth);
        fill_row(weights_to, length, depth);
      }
      const Left<C> of_scores = {of_scores_to, wide}, kept = {kept_to, wide};
      lay_out_rows(query + at.stride(), row, length, dim, panels.get());
      product(length, dim, depth, of_scores, panels.get(), place(of_query), found_row);
      keep(of_query);
      lay_out_rows(query, row, length, dim, panels.get());
      C* of_key = of_query + at.stride();
      transposed_product(length, dim, length, of_scores, panels.get(), groups.get(), place(of_key), found_row);
      keep(of_key);
      lay_out_rows(of_out.at, of_out.row_step, length, dim, panels.get());
      C* of_value = of_key + at.stride();
      transposed_product(length, dim, length, kept, panels.get(), groups.get(), place(of_value), found_row);
      keep(of_value);
    }
  }
}

}  // namespace

// `how`: see panels.h. The gradients have the type that is multiplied.
EXPORT void dinov2_attention(int how, const void* qkv, Index sequences, Index length, Index heads, Index dim,
                             float factor, void* out) {
  const Heads at = {sequences, length, heads, dim};
  MULTIPLY(attention, IN(qkv), at, factor, OUT(out))
}

EXPORT void dinov2_attention_backward(int how, const void* gradient, const void* qkv, Index sequences, Index length,
                                      Index heads, Index dim, float factor, void* of_qkv) {
  const Heads at = {sequences, length, heads, dim};
  MULTIPLY(attention_backward, BETWEEN(gradient), IN(qkv), at, factor, BETWEEN_OUT(of_qkv))
}

#endif
