// What both ways of attention share: where heads lie, and how their rows are laid out for products.

#pragma once

#include "panels.h"

#ifdef __AVX512F__

#include <omp.h>

namespace {

// The places of one head of one sequence in packed rows, which lie `row` apart. `starts`: a sequence's queries are those
// from its start to the next one's; null where there are as many as keys.
struct Heads {
  Index sequences, length, heads, dim;
  const Index* starts;
  Index stride() const { return heads * dim; }
  Index of_keys(Index index, Index row) const { return (index / heads) * length * row + (index % heads) * dim; }
  Index of_queries(Index index, Index row) const {
    return starts ? starts[index / heads] * row + (index % heads) * dim : of_keys(index, row);
  }
  Index queries(Index index) const {
    return starts ? starts[index / heads + 1] - starts[index / heads] : length;
  }
};

// Queries, and keys with their values behind them: rows of all three, or of two matrices. Gradients likewise.
template <typename T>
struct Parts {
  T *queries, *keys;
  Index query_row, key_row;
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

// The next head's rows, if the thread takes that one and rows of all three are what there is.
template <typename T>
inline T* next_head(const Parts<T>& parts, const Heads& at, Index index, int some_heads) {
  const bool there = !at.starts && (index + 1) % some_heads;
  return there ? parts.queries + at.of_queries(index + 1, parts.query_row) : nullptr;
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

// Rows of keys, queries or gradients as the right side of a product.
template <typename C, typename T>
inline void lay_out_rows(const T* in, Index stride, Index length, Index dim, C* panels) {
  const Index depth = depth_of<C>(length);
  lay_out<kPanel>(in, stride, length, dim, depth, panels);
  fill_up(length, dim, depth, panels);
}

}  // namespace

#endif
