// What stands between the matrix products of a transformer block on a CPU, each in one pass over memory.
//
// Compiled once for each instruction set (setup.py); dinov2_fsdp/native/__init__.py loads one of them and says what
// every function takes. The loops are plain, for the compiler to vectorise. Sums over rows go through blocks of a fixed
// number of rows, so that results depend neither on the number of threads nor on their timing.

#include "common.h"

namespace {

constexpr Index kBlock = 32;     // rows whose sums are added up in single precision before they meet others in double
constexpr Index kWidest = 4096;  // values of a row that a function may keep beside it; longer rows are refused

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

// hidden = in + bias, if there is one; kept = hidden, if there is a place for it; out = GELU of hidden. `out` or `kept` may
// be `in`.
template <typename Kept>
void gelu(const float* in, const float* bias, Index rows, Index columns, Kept* kept, float* out) {
#pragma omp parallel for schedule(static)
  for (Index row = 0; row < rows; ++row) {
    const Index start = row * columns;
    if (bias && kept) {
#pragma omp simd
      for (Index i = 0; i < columns; ++i) {
        const float x = in[start + i] + bias[i];
        kept[start + i] = narrow<Kept>(x);
        out[start + i] = x * normal(x).cumulative;
      }
    } else if (kept) {
#pragma omp simd
      for (Index i = start; i < start + columns; ++i) {
        const float x = in[i];
        kept[i] = narrow<Kept>(x);
        out[i] = x * normal(x).cumulative;
      }
    } else if (bias) {
#pragma omp simd
      for (Index i = 0; i < columns; ++i) {
        const float x = in[start + i] + bias[i];
        out[start + i] = x * normal(x).cumulative;
      }
    } else {
#pragma omp simd
      for (Index i = start; i < start + columns; ++i) out[i] = in[i] * normal(in[i]).cumulative;
    }
  }
}

template <typename T, typename Kept>
void gelu_backward(const Kept* hidden, T* gradient, T* activated, Index rows, Index columns, float* totals) {
  sum_over_rows(rows, columns, totals, [=](Index row, float* __restrict sums) {
    const Kept* __restrict x_row = hidden + row * columns;
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

template <typename T>
void take_rows(const T* in, Index dim, const Index* rows, Index count, const float* factors, T* out) {
#pragma omp parallel for schedule(static)
  for (Index k = 0; k < count; ++k) {
    const T* __restrict from = in + rows[k] * dim;
    T* __restrict to = out + k * dim;
    if (!factors) {
      std::memcpy(to, from, static_cast<std::size_t>(dim) * sizeof(T));
      continue;
    }
    for (Index i = 0; i < dim; ++i) to[i] = narrow<T>(widen(from[i]) * factors[k]);
  }
}

template <typename T>
void add_to_rows(const T* base, Index all, Index dim, const Index* rows, Index count, const T* added,
                 const float* factors, T* out) {
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (Index row = 0; row < all; ++row)
      std::memcpy(out + row * dim, base + row * dim, static_cast<std::size_t>(dim) * sizeof(T));
#pragma omp for schedule(static)
    for (Index k = 0; k < count; ++k) {
      const T* __restrict from = base + rows[k] * dim;
      const T* __restrict by = added + k * dim;
      T* __restrict to = out + rows[k] * dim;
      const float factor = factors ? factors[k] : 1.0f;
      for (Index i = 0; i < dim; ++i) to[i] = narrow<T>(widen(from[i]) + widen(by[i]) * factor);
    }
  }
}

}  // namespace

// Of which code this was built.
EXPORT const char* dinov2_source() { return DINOV2_SOURCE; }

EXPORT Index dinov2_widest_row() { return kWidest; }

// `half` says it of `kept` alone.
EXPORT void dinov2_gelu(int half, const float* in, const float* bias, Index rows, Index columns, void* kept, float* out) {
  CALL(gelu, in, bias, rows, columns, OUT(kept), out)
}

// `half` says it of `hidden`, `halves` of the gradient and what is written.
EXPORT void dinov2_gelu_backward(int half, int halves, const void* hidden, void* gradient, void* activated, Index rows,
                                 Index columns, float* totals) {
  if (half && !halves) {
    gelu_backward(static_cast<const BFloat16*>(hidden), static_cast<float*>(gradient), static_cast<float*>(activated),
                  rows, columns, totals);
  } else {
    CALL(gelu_backward, IN(hidden), OUT(gradient), OUT(activated), rows, columns, totals)
  }
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

// out = the rows of `in` that are asked for, times their own factors if there are these
EXPORT void dinov2_take_rows(int half, const void* in, Index dim, const Index* rows, Index count, const float* factors,
                             void* out) {
  CALL(take_rows, IN(in), dim, rows, count, factors, OUT(out))
}

// out = `base`, (all, dim), with something added to each of these rows, which are distinct
EXPORT void dinov2_add_to_rows(int half, const void* base, Index all, Index dim, const Index* rows, Index count,
                               const void* added, const float* factors, void* out) {
  CALL(add_to_rows, IN(base), all, dim, rows, count, IN(added), factors, OUT(out))
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
