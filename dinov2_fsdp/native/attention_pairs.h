// Attention that multiplies bfloat16: 32 queries at a time, whose scores stand turned, a row for each key.
//
// What a query's softmax sums up is then added vector by vector; its weights are the right side of the next product as
// they come, pairs of rows interleaved; and as the left side of the products for the gradients in keys and values they
// need not be turned, which pairs make slow.

#pragma once

#include "attention.h"

#ifdef __AVX512BF16__

namespace {

// kVectors · 16 columns of scores: the largest of each.
template <int kVectors>
inline void largest_of(const float* scores, Index length, __m512 (&largest)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) largest[v] = load(scores + 16 * v);
  for (Index row = 1; row < length; ++row)
    for (int v = 0; v < kVectors; ++v) largest[v] = _mm512_max_ps(load(scores + row * kPanel + 16 * v), largest[v]);
}

// Subtracted first: what is rounded of a product of the largest would make its own exponential anything.
inline __m512 exponential(const float* score, __m512 largest, float factor) {
  const __m512 scaled = _mm512_mul_ps(_mm512_sub_ps(load(score), largest), _mm512_set1_ps(factor * 1.44269504f));
  return rough_power_of_two(scaled);
}

// Sixteen columns of two rows, the first of them even, to their half of a panel.
inline void put_rows(__m512 first, __m512 second, BFloat16* panel, Index row, int half) {
  const auto both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  _mm512_store_si512(panel + row * kPanel + 32 * half, _mm512_permutexvar_epi16(by_pairs(), both));
}

// Scores → the exponentials of each query's softmax, as a panel that is multiplied; returns what is to be multiplied
// with a query's result.
template <int kVectors>
inline void exponentials(const float* scores, Index length, float factor, BFloat16* panel, __m512 (&scales)[kVectors]) {
  __m512 largest[kVectors], sums[kVectors];
  largest_of(scores, length, largest);
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (Index row = 0; row < length; row += 2)
    for (int v = 0; v < kVectors; ++v) {
      const float* at = scores + row * kPanel + 16 * v;
      const __m512 first = exponential(at, largest[v], factor);
      const __m512 second = row + 1 < length ? exponential(at + kPanel, largest[v], factor) : _mm512_setzero_ps();
      sums[v] = _mm512_add_ps(sums[v], _mm512_add_ps(first, second));
      put_rows(first, second, panel, row, v);
    }
  for (int v = 0; v < kVectors; ++v) scales[v] = _mm512_div_ps(_mm512_set1_ps(1.0f), sums[v]);
}

// A row's 32 values, or 16 and as many zeros.
template <int kVectors>
inline void put_row(const __m512 (&values)[kVectors], BFloat16* out) {
  store(values[0], kVectors > 1 ? values[kVectors - 1] : _mm512_setzero_ps(), out);
}

// Scores and the gradient in the weights, both turned → weights and the scores' gradient, turned as the left sides of
// products (rows `stride` apart), and that gradient as a panel. `scores` are overwritten.
template <int kVectors>
inline void softmax_backward(float* scores, const float* of_weights, Index length, float factor, Index stride,
                             BFloat16* weights, BFloat16* of_scores, BFloat16* panel) {
  __m512 largest[kVectors], sums[kVectors], dots[kVectors], scales[kVectors];
  largest_of(scores, length, largest);
  for (int v = 0; v < kVectors; ++v) sums[v] = dots[v] = _mm512_setzero_ps();
  for (Index row = 0; row < length; ++row)
    for (int v = 0; v < kVectors; ++v) {
      float* at = scores + row * kPanel + 16 * v;
      const __m512 found = exponential(at, largest[v], factor);
      sums[v] = _mm512_add_ps(sums[v], found);
      dots[v] = _mm512_fmadd_ps(found, load(of_weights + row * kPanel + 16 * v), dots[v]);
      _mm512_store_ps(at, found);
    }
  for (int v = 0; v < kVectors; ++v) {
    scales[v] = _mm512_div_ps(_mm512_set1_ps(1.0f), sums[v]);
    dots[v] = _mm512_mul_ps(dots[v], scales[v]);
  }
  const auto of_row = [&](Index row, __m512 (&found)[kVectors]) {
    __m512 weight[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const Index at = row * kPanel + 16 * v;
      weight[v] = _mm512_mul_ps(load(scores + at), scales[v]);
      found[v] = _mm512_mul_ps(_mm512_mul_ps(weight[v], _mm512_set1_ps(factor)),
                               _mm512_sub_ps(load(of_weights + at), dots[v]));
    }
    put_row(weight, weights + row * stride);
    put_row(found, of_scores + row * stride);
  };
  for (Index row = 0; row < length; row += 2) {
    __m512 first[kVectors], second[kVectors];
    of_row(row, first);
    if (row + 1 < length) {
      of_row(row + 1, second);
    } else {
      for (__m512& values : second) values = _mm512_setzero_ps();
    }
    for (int v = 0; v < kVectors; ++v) put_rows(first[v], second[v], panel, row, v);
  }
}

// A panel of results, (dim, 32), each column times its factor → rows of the result.
template <int kVectors>
inline void turn_back(float* found, Index dim, Index queries, const __m512 (&factors)[kVectors], float* turned, BFloat16* out,
                      Index stride) {
  for (Index row = 0; row < dim; ++row)
    for (int v = 0; v < kVectors; ++v) {
      float* at = found + row * kPanel + 16 * v;
      _mm512_store_ps(at, _mm512_mul_ps(load(at), factors[v]));
    }
  transpose_part(found, kPanel, dim, up_to(8, queries), turned, dim);
  for (Index row = 0; row < queries; ++row) convert(turned + row * dim, dim, out + row * stride);
}

// Calls `run` with the number of vectors that so many queries, 32 at most, fill.
template <typename Run>
inline void by_vectors(Index queries, const Run& run) {
  if (queries > 16) {
    run(std::integral_constant<int, 2>());
  } else {
    run(std::integral_constant<int, 1>());
  }
}

// A left side whose rows are the columns of one head's: `depth` values of each, of which those behind the length are
// zero already.
inline Left<BFloat16> turn(const BFloat16* in, Index stride, Index length, Index dim, Index depth, BFloat16* turned) {
  transpose_part(in, stride, length, dim, turned, depth);
  return {turned, depth};
}

// Memory for so many values, zeros.
inline Scratch<BFloat16> zeros(Index count) {
  Scratch<BFloat16> found(count);
  std::fill(found.get(), found.get() + count, BFloat16{});
  return found;
}

void attention_by_pairs(Parts<const BFloat16> in, Heads at, float factor, BFloat16* out) {
  const Index length = at.length, dim = at.dim, count = at.sequences * at.heads;
  const Index depth = depth_of<BFloat16>(length);
  const int some_heads = heads_at_a_time(at);
#pragma omp parallel
  {
    [[maybe_unused]] const InUse<BFloat16> in_use;
    const Scratch<BFloat16> panel(dim * kPanel), turned = zeros(dim * depth), weights = zeros(depth * kPanel);
    const Scratch<float> scores(length * kPanel), found(dim * kPanel), rows(kPanel * dim);
#pragma omp for schedule(dynamic, some_heads)
    for (Index i = 0; i < count; ++i) {
      const BFloat16 *query = in.queries + at.of_queries(i, in.query_row), *next = next_head(in, at, i, some_heads);
      const Left<BFloat16> key = {in.keys + at.of_keys(i, in.key_row), in.key_row};
      const Left<BFloat16> value = turn(key.at + at.stride(), in.key_row, length, dim, depth, turned.get());
      BFloat16* target = out + at.of_queries(i, at.stride());
      for (Index start = 0, queries = at.queries(i); start < queries; start += kPanel) {
        const Index some = std::min(kPanel, queries - start);
        for (Index r = start; next && r < start + some; ++r) ask_for_row(next, r, at, 3);
        pack_transposed(query + start * in.query_row, in.query_row, dim, some, panel.get());
        by_vectors(some, [&](auto vectors) {
          constexpr int kVectors = decltype(vectors)::value;
          __m512 scales[kVectors];
          product(length, 16 * kVectors, dim, key, panel.get(), scores.get(), kPanel);
          exponentials(scores.get(), length, factor, weights.get(), scales);
          product(dim, 16 * kVectors, depth, value, weights.get(), found.get(), kPanel);
          turn_back(found.get(), dim, some, scales, rows.get(), target + start * at.stride(), at.stride());
        });
      }
    }
  }
}

void attention_backward_by_pairs(const BFloat16* gradient, Parts<const BFloat16> in, Heads at, float factor,
                                 Parts<BFloat16> of) {
  const Index length = at.length, dim = at.dim, count = at.sequences * at.heads;
  const Index wide = padded(length), depth = depth_of<BFloat16>(length);
  const int some_heads = heads_at_a_time(at);
#pragma omp parallel
  {
    [[maybe_unused]] const InUse<BFloat16> in_use;
    const Scratch<BFloat16> panel(dim * kPanel), turned = zeros(dim * depth), of_panel = zeros(depth * kPanel);
    const Scratch<BFloat16> weights(length * wide), of_scores(length * wide), right(depth * padded(dim));
    const Scratch<float> scores(length * kPanel), of_weights(length * kPanel), rows(kPanel * dim);
    const Scratch<float> found(std::max(length, kPanel) * dim);
#pragma omp for schedule(dynamic, some_heads)
    for (Index i = 0; i < count; ++i) {
      const BFloat16 *query = in.queries + at.of_queries(i, in.query_row), *next = next_head(in, at, i, some_heads);
      const BFloat16* of_out = gradient + at.of_queries(i, at.stride());
      BFloat16 *of_query = of.queries + at.of_queries(i, of.query_row), *of_key = of.keys + at.of_keys(i, of.key_row);
      const Left<BFloat16> key = {in.keys + at.of_keys(i, in.key_row), in.key_row}, value = {key.at + at.stride(), in.key_row};
      const Left<BFloat16> turned_key = turn(key.at, in.key_row, length, dim, depth, turned.get());
      const Index queries = at.queries(i);
      for (Index start = 0; start < queries; start += kPanel) {
        const Index some = std::min(kPanel, queries - start);
        for (Index r = start; next && r < start + some; ++r) {
          ask_for_row(next, r, at, 3);
          ask_for_row(gradient + at.of_queries(i + 1, at.stride()), r, at, 1);
          ask_for_row(next_head(of, at, i, some_heads), r, at, 3);
        }
        by_vectors(some, [&](auto vectors) {
          constexpr int kVectors = decltype(vectors)::value;
          pack_transposed(query + start * in.query_row, in.query_row, dim, some, panel.get());
          product(length, 16 * kVectors, dim, key, panel.get(), scores.get(), kPanel);
          pack_transposed(of_out + start * at.stride(), at.stride(), dim, some, panel.get());
          product(length, 16 * kVectors, dim, value, panel.get(), of_weights.get(), kPanel);
          softmax_backward<kVectors>(scores.get(), of_weights.get(), length, factor, wide, weights.get() + start,
                                     of_scores.get() + start, of_panel.get());
          product(dim, 16 * kVectors, depth, turned_key, of_panel.get(), found.get(), kPanel);
          __m512 ones[kVectors];
          for (__m512& one : ones) one = _mm512_set1_ps(1.0f);
          turn_back(found.get(), dim, some, ones, rows.get(), of_query + start * of.query_row, of.query_row);
        });
      }
      // What was turned, times rows of all queries: the gradients in keys and values.
      const auto multiply = [&](const BFloat16* left, const BFloat16* asked, Index stride, BFloat16* target) {
        lay_out_rows(asked, stride, queries, dim, right.get());
        product(length, dim, depth_of<BFloat16>(queries), Left<BFloat16>{left, wide}, right.get(), found.get(), dim);
        for (Index r = 0; r < length; ++r) convert(found.get() + r * dim, dim, target + r * of.key_row);
      };
      multiply(of_scores.get(), query, in.query_row, of_key);
      multiply(weights.get(), of_out, at.stride(), of_key + at.stride());
    }
  }
}

}  // namespace

#endif
