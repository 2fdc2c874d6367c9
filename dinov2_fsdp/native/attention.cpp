// Attention on a CPU, one sequence's head after the other: its scores stay in a core's cache.
//
// Libraries' products of such small matrices, 257 × 64 × 257, leave half of an AMD EPYC's speed unused, and need a pass
// over memory before and after each (docs/performance.md). Here the right side of every product is laid out anew in
// panels of 32 columns, in single precision, so that neither strides nor the tensors' type reach the innermost loop.

#include "common.h"

#ifdef __AVX512F__

namespace {

constexpr Index kPanel = 32;  // columns: two vectors
constexpr Index kRows = 12;   // of a tile, whose 24 sums and two columns fill 26 of 32 registers
constexpr Index kQueries = 48;  // at a time, forward

inline Index padded(Index columns) { return (columns + kPanel - 1) / kPanel * kPanel; }

// depth × columns → panels of 32 columns, each with all rows one after the other; zeros stand beyond the last column.
template <typename T>
void pack(const T* in, Index stride, Index depth, Index columns, float* panels) {
  for (Index start = 0; start < columns; start += kPanel, panels += depth * kPanel) {
    const Index some = std::min(kPanel, columns - start);
    for (Index k = 0; k < depth; ++k) {
      const T* __restrict source = in + k * stride + start;
      float* __restrict target = panels + k * kPanel;
      if (some == kPanel) {
        for (Index c = 0; c < kPanel; ++c) target[c] = widen(source[c]);
      } else {
        for (Index c = 0; c < kPanel; ++c) target[c] = c < some ? widen(source[c]) : 0.0f;
      }
    }
  }
}

// columns × depth → the panels of its transposed.
inline void pack_transposed(const float* in, Index stride, Index depth, Index columns, float* panels) {
  for (Index start = 0; start < columns; start += kPanel, panels += depth * kPanel) {
    const Index some = std::min(kPanel, columns - start);
    if (some < kPanel) std::fill(panels, panels + depth * kPanel, 0.0f);
    transpose_part(in + start * stride, stride, some, depth, panels, kPanel);
  }
}

// rows × columns, as single precision: where they lie if they are that, in `scratch` if not.
template <typename Kept>
inline const float* read(const Kept* in, Index& stride, Index rows, Index columns, float* scratch) {
  if constexpr (std::is_same_v<Kept, float>) {
    return in;
  } else {
    for (Index r = 0; r < rows; ++r) {
      const Kept* __restrict source = in + r * stride;
      float* __restrict target = scratch + r * columns;
      for (Index c = 0; c < columns; ++c) target[c] = widen(source[c]);
    }
    stride = columns;
    return scratch;
  }
}

// c (kCount × 16 · kVectors) = a · one panel; a[row][k] lies at row · a_row + k · a_k; `last` masks the last vector.
template <int kCount, int kVectors>
inline void product_tile(const float* a, Index a_row, Index a_k, const float* panel, Index depth, __mmask16 last,
                         float* c, Index c_row) {
  __m512 sums[kCount][kVectors];
#pragma GCC unroll 12
  for (int row = 0; row < kCount; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[row][v] = _mm512_setzero_ps();
  for (Index k = 0; k < depth; ++k) {
    __m512 columns[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) columns[v] = _mm512_load_ps(panel + k * kPanel + 16 * v);
#pragma GCC unroll 12
    for (int row = 0; row < kCount; ++row) {
      const __m512 value = _mm512_set1_ps(a[row * a_row + k * a_k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[row][v] = _mm512_fmadd_ps(value, columns[v], sums[row][v]);
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kCount; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      _mm512_mask_storeu_ps(c + row * c_row + 16 * v, v + 1 < kVectors ? __mmask16(0xffff) : last, sums[row][v]);
}

template <int kCount, int kVectors>
inline void product_rows(Index rows, const float* a, Index a_row, Index a_k, const float* panel, Index depth,
                         __mmask16 last, float* c, Index c_row) {
  for (; rows >= kCount; rows -= kCount, a += kCount * a_row, c += kCount * c_row)
    product_tile<kCount, kVectors>(a, a_row, a_k, panel, depth, last, c, c_row);
  if constexpr (kCount > 1) {
    constexpr int kFewer = kCount > 8 ? 8 : kCount / 2;
    if (rows) product_rows<kFewer, kVectors>(rows, a, a_row, a_k, panel, depth, last, c, c_row);
  }
}

// c (rows × columns) = a (rows × depth) · panels (depth × columns).
void product(Index rows, Index columns, Index depth, const float* a, Index a_row, Index a_k, const float* panels,
             float* c, Index c_row) {
  for (Index start = 0; start < columns; start += kPanel, panels += depth * kPanel) {
    const Index some = std::min(kPanel, columns - start);
    const auto last = static_cast<__mmask16>((1u << (some > 16 ? some - 16 : some)) - 1u);
    if (some > 16) {
      product_rows<kRows, 2>(rows, a, a_row, a_k, panels, depth, last, c + start, c_row);
    } else {
      product_rows<kRows, 1>(rows, a, a_row, a_k, panels, depth, last, c + start, c_row);
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
template <typename Kept>
void attention(const Kept* qkv, Heads at, float factor, Kept* weights, Kept* out) {
  const Index length = at.length, dim = at.dim, row = 3 * at.stride(), count = at.sequences * at.heads;
  const Index wide = padded(length), vectors = (length + 15) / 16 * 16;
#pragma omp parallel
  {
    constexpr bool kWidens = !std::is_same_v<Kept, float>;
    const Scratch<float> keys(dim * wide), values(length * padded(dim)), cached(kQueries * wide);
    const Scratch<float> widened(kWidens ? length * dim : 1), found(kWidens ? kQueries * dim : 1);
#pragma omp for schedule(static)
    for (Index i = 0; i < count; ++i) {
      const Kept* first = qkv + at.of(i, 3);
      Index k_row = row, q_row = row;
      const float* key = read(first + at.stride(), k_row, length, dim, widened.get());
      pack_transposed(key, k_row, dim, length, keys.get());
      pack(first + 2 * at.stride(), row, length, dim, values.get());
      const float* query = read(first, q_row, length, dim, widened.get());
      for (Index start = 0; start < length; start += kQueries) {
        const Index some = std::min(kQueries, length - start);
        product(some, length, dim, query + start * q_row, q_row, 1, keys.get(), cached.get(), wide);
        for (Index r = 0; r < some; ++r) {
          // Up to a whole vector, whose rest counts for nothing: exp of a single value takes as long as of sixteen.
          float* __restrict scores = cached.get() + r * wide;
          for (Index c = length; c < vectors; ++c) scores[c] = -INFINITY;
          float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
          for (Index c = 0; c < vectors; ++c) {
            scores[c] *= factor;
            largest = scores[c] > largest ? scores[c] : largest;
          }
          float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
          for (Index c = 0; c < vectors; ++c) {
            scores[c] = exp_below_zero(scores[c] - largest);
            sum += scores[c];
          }
          const float scale = 1.0f / sum;
          if (weights) {
            Kept* __restrict kept = weights + (i * length + start + r) * length;
#pragma omp simd
            for (Index c = 0; c < length; ++c) {
              scores[c] *= scale;
              kept[c] = narrow<Kept>(scores[c]);
            }
          } else {
#pragma omp simd
            for (Index c = 0; c < length; ++c) scores[c] *= scale;
          }
        }
        Kept* target = out + at.of(i, 1) + start * at.stride();
        if constexpr (kWidens) {
          product(some, dim, length, cached.get(), wide, 1, values.get(), found.get(), dim);
          for (Index r = 0; r < some; ++r)
            for (Index c = 0; c < dim; ++c) target[r * at.stride() + c] = narrow<Kept>(found.get()[r * dim + c]);
        } else {
          product(some, dim, length, cached.get(), wide, 1, values.get(), target, at.stride());
        }
      }
    }
  }
}

template <typename Kept>
void attention_backward(const float* gradient, const Kept* qkv, const Kept* weights, Heads at, float factor,
                        float* of_qkv) {
  const Index length = at.length, dim = at.dim, row = 3 * at.stride(), count = at.sequences * at.heads;
  const Index wide = padded(length);
#pragma omp parallel
  {
    constexpr bool kWidens = !std::is_same_v<Kept, float>;
    const Scratch<float> panels(std::max(dim * wide, length * padded(dim))), scores(length * wide);
    const Scratch<float> widened(kWidens ? length * std::max(length, dim) : 1);
#pragma omp for schedule(static)
    for (Index i = 0; i < count; ++i) {
      const Kept* query = qkv + at.of(i, 3);
      const float* of_out = gradient + at.of(i, 1);
      float* of_query = of_qkv + at.of(i, 3);
      Index v_row = row, w_row = length;
      const float* value = read(query + 2 * at.stride(), v_row, length, dim, widened.get());
      pack_transposed(value, v_row, dim, length, panels.get());
      product(length, length, dim, of_out, at.stride(), 1, panels.get(), scores.get(), wide);
      const float* w = read(weights + i * length * length, w_row, length, length, widened.get());
      for (Index r = 0; r < length; ++r) {
        float* __restrict of_scores = scores.get() + r * wide;
        const float* __restrict at_row = w + r * length;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (Index c = 0; c < length; ++c) sum += of_scores[c] * at_row[c];
#pragma omp simd
        for (Index c = 0; c < length; ++c) of_scores[c] = factor * at_row[c] * (of_scores[c] - sum);
      }
      pack(query + at.stride(), row, length, dim, panels.get());
      product(length, dim, length, scores.get(), wide, 1, panels.get(), of_query, row);
      pack(query, row, length, dim, panels.get());
      product(length, dim, length, scores.get(), 1, wide, panels.get(), of_query + at.stride(), row);
      pack(of_out, at.stride(), length, dim, panels.get());
      product(length, dim, length, w, 1, length, panels.get(), of_query + 2 * at.stride(), row);
    }
  }
}

}  // namespace

EXPORT void dinov2_attention(int half, const void* qkv, Index sequences, Index length, Index heads, Index dim,
                             float factor, void* weights, void* out) {
  const Heads at = {sequences, length, heads, dim};
  CALL(attention, IN(qkv), at, factor, OUT(weights), OUT(out))
}

// `half` says it of what was kept: queries, keys and values, and the softmax weights.
EXPORT void dinov2_attention_backward(int half, const float* gradient, const void* qkv, const void* weights,
                                      Index sequences, Index length, Index heads, Index dim, float factor,
                                      float* of_qkv) {
  const Heads at = {sequences, length, heads, dim};
  CALL(attention_backward, gradient, IN(qkv), IN(weights), at, factor, of_qkv)
}

#endif
