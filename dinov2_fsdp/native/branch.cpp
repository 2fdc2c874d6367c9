// Linear layers of a block with what stands around them, a block of rows after the other from end to end.
//
// Each thread takes its own rows through norm, product, activation and product, so that what lies between never leaves
// its cache, nothing waits between the operations, and no thread for another. Libraries' products cannot be joined so;
// with large matrices these are as fast (docs/performance.md).
//
// Every sum over rows goes from the first row to the last, or by blocks of rows that meet in order: results do not
// depend on threads. A row's own sums are the same wherever it stands, but that tiles want sixteen rows: with fewer in
// the last block, another instruction adds those up in its own order.

#include "panels.h"

#ifdef __AMX_BF16__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef __AVX512F__

#include <omp.h>

namespace {

// Rows that a thread takes from end to end: a multiple of a tile's.
template <typename C>
constexpr Index kBlock = kByTiles<C> ? 64 : 48;
// Blocks at a time, before the weights' gradients are multiplied; more with many threads.
constexpr Index kBlocks = 32;
// Rows of a weight's gradient that are summed up by themselves. Those of a panel for tiles stay in the nearest cache.
template <typename C>
constexpr Index kSummed = (kByTiles<C> ? 8 : 16) * kBlock<C>;
static_assert(kBlocks % 16 == 0, "what is summed up by itself would depend on the number of threads");

// A block of rows · panels; each panel's result, (rows, 32) in single precision, is handed to
// `take(panel, result, from, to)`, all of its rows or some after the other, an even number but for the last.
template <typename C, typename Take>
inline void by_panels(Index rows, Index columns, Index depth, const Left<C>& left, const C* panels, const Take& take) {
  const Index count = columns / kPanel;
#ifdef __AMX_BF16__
  if constexpr (std::is_same_v<C, BFloat16>) {
    if (fills_squares(rows, depth, left)) {
      // One panel is taken while tiles multiply the next.
      alignas(64) float found[2][kBlock<C> * kPanel];
      const Index each = (rows << 16) / ((rows + 2 * kSide - 1) / (2 * kSide) * (depth / kDeep));
      for (Index p = 0; p < count; ++p) {
        Index from = p ? 0 : rows, due = 0;
        const auto take_up_to = [&](Index to) {
          if (to > from) take(p - 1, found[(p - 1) & 1], from, to);
          from = std::max(from, to);
        };
        by_squares<2>(rows, left, panels + p * depth * kPanel, depth, 0xffff, found[p & 1], kPanel,
                      [&] { take_up_to(std::min(rows, (due += each) >> 16) & ~Index{1}); });
        take_up_to(rows);
      }
      take(count - 1, found[(count - 1) & 1], Index{0}, rows);
      return;
    }
  }
#endif
  alignas(64) float found[kBlock<C> * kPanel];
  for (Index p = 0; p < count; ++p) {
    tiles<2>(rows, left, panels + p * depth * kPanel, depth, 0xffff, found, kPanel);
    take(p, found, Index{0}, rows);
  }
}

// A linear layer's weight, (out, in), as the right side of `rows · weightᵀ`: depth is `in`. Rows times `factor`.
template <typename C, typename T>
void pack_forward(const T* weight, Index out, Index in, const float* factor, C* panels) {
  constexpr Index kPair = sizeof(float) / sizeof(C);  // what is transposed lies in the memory of a float
#pragma omp for schedule(static)
  for (Index p = 0; p < out / kPanel; ++p) {
    const Scratch<C> rows(kPanel * in);
    for (Index row = 0; row < kPanel; ++row) {
      const T* __restrict source = weight + (p * kPanel + row) * in;
      C* __restrict target = rows.get() + row * in;
      const float scale = factor ? factor[p * kPanel + row] : 1.0f;
      for (Index i = 0; i < in; ++i) target[i] = narrow<C>(widen(source[i]) * scale);
    }
    transpose_part(reinterpret_cast<const float*>(rows.get()), in / kPair, kPanel, in / kPair,
                   reinterpret_cast<float*>(panels + p * in * kPanel), kPanel);
  }
}

// … of `rows · weight`, as in the backward pass: depth is `out`, whose rows are times `factor`.
template <typename C, typename T>
void pack_backward(const T* weight, Index out, Index in, const float* factor, C* panels) {
#pragma omp for schedule(static)
  for (Index first = 0; first < out; first += kPanel) {
    const Scratch<float> rows(kPanel * in);
    for (Index row = 0; row < kPanel; ++row) {
      const T* __restrict source = weight + (first + row) * in;
      float* __restrict target = rows.get() + row * in;
      const float scale = factor ? factor[first + row] : 1.0f;
      for (Index i = 0; i < in; ++i) target[i] = widen(source[i]) * scale;
    }
    lay_out<kPanel>(rows.get(), in, kPanel, in, out, panels + first * kPanel);
  }
}

// ---- Norms of a block of rows, as in layers.cpp.

template <typename T, typename To>
inline void norm_row(const T* in, const float* weight, const float* bias, Index count, float mean, float scale, To* out) {
  const auto normed = [=](Index i) {
    const __m512 centred = _mm512_sub_ps(load(in + i), _mm512_set1_ps(mean));
    return _mm512_fmadd_ps(_mm512_mul_ps(centred, _mm512_set1_ps(scale)), load(weight + i), load(bias + i));
  };
  for (Index i = 0; i < count; i += kPanel) store(normed(i), normed(i + 16), out + i);  // a row is a multiple of it
}

template <typename T>
inline void statistics(const T* in, Index count, float epsilon, float* mean, float* scale) {
  const float centre = sum_of(count, [=](Index i) { return load(in + i); }) / static_cast<float>(count);
  const float squares = sum_of(count, [=](Index i) {
    const __m512 centred = _mm512_sub_ps(load(in + i), _mm512_set1_ps(centre));
    return _mm512_mul_ps(centred, centred);
  });
  *mean = centre;
  *scale = 1.0f / std::sqrt(squares / static_cast<float>(count) + epsilon);
}

// out = the gradient in the row, + onto if that is given; adds to the sums for the weight and the bias.
template <typename T>
inline void norm_row_backward(const float* gradient, const T* in, const float* weight, Index count, float mean,
                              float scale, const T* onto, float* of_weight, float* of_bias, T* out) {
  const __m512 centre = _mm512_set1_ps(mean), factor = _mm512_set1_ps(scale);
  // Two at a time: each waits for the one before.
  __m512 sums[2], products[2];
  for (int v = 0; v < 2; ++v) sums[v] = products[v] = _mm512_setzero_ps();
  for (Index start = 0; start < count; start += kPanel) {
    for (int v = 0; v < 2; ++v) {
      const Index i = start + 16 * v;
      const __m512 given = load(gradient + i), weighted = _mm512_mul_ps(given, load(weight + i));
      const __m512 normed = _mm512_mul_ps(_mm512_sub_ps(load(in + i), centre), factor);
      sums[v] = _mm512_add_ps(sums[v], weighted);
      products[v] = _mm512_fmadd_ps(weighted, normed, products[v]);
      _mm512_storeu_ps(of_weight + i, _mm512_fmadd_ps(given, normed, load(of_weight + i)));
      _mm512_storeu_ps(of_bias + i, _mm512_add_ps(given, load(of_bias + i)));
    }
  }
  const auto per_value = [=](const __m512(&both)[2]) {
    return _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_add_ps(both[0], both[1])) / static_cast<float>(count));
  };
  const __m512 sum = per_value(sums), product = per_value(products);
  const auto of_value = [=](Index i) {
    const __m512 normed = _mm512_mul_ps(_mm512_sub_ps(load(in + i), centre), factor);
    const __m512 weighted = _mm512_fmsub_ps(load(gradient + i), load(weight + i), sum);
    const __m512 found = _mm512_mul_ps(factor, _mm512_fnmadd_ps(normed, product, weighted));
    return onto ? _mm512_add_ps(found, load(onto + i)) : found;
  };
  for (Index i = 0; i < count; i += kPanel) store(of_value(i), of_value(i + 16), out + i);
}

// ---- Some rows of a matrix, as stochastic depth keeps them.

// Which rows a branch runs on, and what its results are multiplied by; null for all, each times one.
struct Chosen {
  const Index* at;
  const float* factors;
  Index operator[](Index row) const { return at ? at[row] : row; }
};

// A block of the chosen rows, in `copy` if they may lie anywhere; `scaled`: times their factors.
template <typename T>
inline const T* block_of(const T* matrix, Index dim, const Chosen& chosen, Index first, Index some, bool scaled, T* copy) {
  if (!chosen.at) return matrix + first * dim;
  for (Index row = first; row < first + some; ++row) {
    const T* from = matrix + chosen.at[row] * dim;
    T* to = copy + (row - first) * dim;
    const __m512 factor = _mm512_set1_ps(scaled ? chosen.factors[row] : 1.0f);
    for (Index i = 0; i < dim; i += kPanel)  // a row is a multiple of it
      store(_mm512_mul_ps(load(from + i), factor), _mm512_mul_ps(load(from + i + 16), factor), to + i);
  }
  return copy;
}

// Copies all rows but the chosen ones.
template <typename T>
void copy_others(const T* in, Index all, Index dim, const Index* rows, Index count, T* out) {
  const Scratch<char> is_chosen(all);
  std::fill(is_chosen.get(), is_chosen.get() + all, char{0});
  for (Index k = 0; k < count; ++k) is_chosen.get()[rows[k]] = 1;
#pragma omp parallel for schedule(static)
  for (Index row = 0; row < all; ++row)
    if (!is_chosen.get()[row]) std::memcpy(out + row * dim, in + row * dim, static_cast<std::size_t>(dim) * sizeof(T));
}

// ---- Sums over rows.

// What blocks of rows add up each by itself; `columns` sums a block.
class BlockSums {
 public:
  BlockSums(Index blocks, Index columns) : columns_(columns), partial_(blocks * columns), totals_(columns) {
    std::fill(totals_.get(), totals_.get() + columns, 0.0);
  }
  float* of(Index block) const {
    float* sums = partial_.get() + block * columns_;
    std::fill(sums, sums + columns_, 0.0f);
    return sums;
  }
  // By all threads, for so many blocks.
  void meet(Index blocks) const {
#pragma omp for schedule(static)
    for (Index start = 0; start < columns_; start += 64) {
      const Index end = std::min(columns_, start + 64);
      for (Index block = 0; block < blocks; ++block)
        for (Index i = start; i < end; ++i) totals_.get()[i] += partial_.get()[block * columns_ + i];
    }
  }
  void read(Index first, Index count, float* out) const {
    for (Index i = 0; i < count; ++i) out[i] = static_cast<float>(totals_.get()[first + i]);
  }

 private:
  Index columns_;
  Scratch<float> partial_;
  Scratch<double> totals_;
};

// The gradient of a weight, (narrow, wide) or its transposed: sums over rows of narrow ⊗ wide.
template <typename C>
class OfWeight {
 public:
  OfWeight(Index depth, Index narrow, Index wide)
      : depth_(depth), narrow_(narrow), wide_(wide), groups_(high() * depth), panels_(wide * depth),
        sums_(panel_size() * (wide / kPanel)) {}
  Index depth() const { return depth_; }
  // The place of a block's rows.
  C* groups(Index row) const { return groups_.get() + row * kGroup; }
  C* panels(Index row) const { return panels_.get() + row * kPanel; }
  // After a block's rows were written.
  void fill_up(Index at, Index rows) const { ::fill_up(rows, wide_, depth_, panels(at)); }
  // By all threads. `first`: whether nothing was added before.
  void multiply(Index rows, bool first) const {
    // Sums of so many rows meet in order, whatever the number of blocks at a time: that is a multiple of theirs.
    const Index whole = depth_of<C>(rows);  // what is behind the rows was filled up
    // Some panels at a time, so that what is read of the groups stays in a cache for them. Pairs of bfloat16 are read
    // slowly enough for any cache: a few at a time, so that no thread waits long for another.
    constexpr Index kMost = std::is_same_v<C, BFloat16> && !kByTiles<C> ? 2 : 8;
    const Index count = wide_ / kPanel, threads = omp_get_num_threads();
    Index together = std::clamp<Index>(count / (4 * threads), 1, kMost);
    for (Index fewer = together; 2 * fewer >= together && fewer > 0; --fewer)
      if ((count + fewer - 1) / fewer % threads == 0) {  // as many parts for each thread, if hardly smaller ones are
        together = fewer;
        break;
      }
#pragma omp for schedule(dynamic) nowait
    for (Index start = 0; start < count; start += together) {
      for (Index from = 0; from < rows; from += kSummed<C>) {
        const Index depth = std::min(kSummed<C>, whole - from);
        for (Index p = start; p < std::min(count, start + together); ++p)
          add_groups(groups(from), depth_ * kGroup, panels_.get() + (p * depth_ + from) * kPanel, depth,
                     first && from == 0, high(), kPanel, sums_.get() + p * panel_size(), kPanel);
      }
    }
  }
  // By all threads: (wide, narrow).
  template <typename T>
  void read_turned(T* out) const {
#pragma omp for schedule(static)
    for (Index p = 0; p < wide_ / kPanel; ++p) {
      const Scratch<float> turned(kPanel * narrow_);
      transpose_part(sums_.get() + p * panel_size(), kPanel, narrow_, kPanel, turned.get(), narrow_);
      convert(turned.get(), kPanel * narrow_, out + p * kPanel * narrow_);
    }
  }
  // By all threads: (narrow, wide), of a weight that was used times `factor`; the factors' gradient, without the bias'.
  // Without a weight the sums alone.
  template <typename T>
  void read(const T* weight, const float* factor, T* out, float* of_factor) const {
#pragma omp for schedule(static)
    for (Index row = 0; row < narrow_; ++row) {
      const float scale = factor ? factor[row] : 1.0f;
      if (!weight) {
        for (Index p = 0; p < wide_ / kPanel; ++p)
          convert(sums_.get() + p * panel_size() + row * kPanel, kPanel, out + row * wide_ + p * kPanel);
        continue;
      }
      double total = 0.0;
      for (Index p = 0; p < wide_ / kPanel; ++p) {
        const float* __restrict sums = sums_.get() + p * panel_size() + row * kPanel;
        const T* __restrict by = weight + row * wide_ + p * kPanel;
        T* __restrict target = out + row * wide_ + p * kPanel;
#pragma omp simd
        for (Index i = 0; i < kPanel; ++i) target[i] = narrow<T>(sums[i] * scale);
        total += sum_of(kPanel, [=](Index i) { return _mm512_mul_ps(load(sums + i), load(by + i)); });
      }
      if (of_factor) of_factor[row] = static_cast<float>(total);
    }
  }

 private:
  static constexpr Index kGroup = Multiplied<C>::kGroup;
  Index high() const { return groups_of<C>(narrow_) * kGroup; }
  Index panel_size() const { return high() * kPanel; }
  Index depth_, narrow_, wide_;
  Scratch<C> groups_, panels_;
  Scratch<float> sums_;
};

// Blocks of rows at a time.
template <typename C>
inline Index blocks_at_a_time(Index rows) {
  const Index threads = omp_get_max_threads();
  return std::min((rows + kBlock<C> - 1) / kBlock<C>, std::max(kBlocks, 16 * threads));
}

// ---- The branches.

struct Norm {
  const float *weight, *bias;
  float epsilon;
};

template <typename C, typename T>
inline void norm_block(const T* tokens, Index rows, Index dim, const Norm& norm, float* means, float* scales, C* out) {
  for (Index row = 0; row < rows; ++row) {
    statistics(tokens + row * dim, dim, norm.epsilon, means + row, scales + row);
    norm_row(tokens + row * dim, norm.weight, norm.bias, dim, means[row], scales[row], out + row * dim);
  }
}

// out = linear(norm(tokens)); of chosen rows, which are copied to `taken`.
template <typename T, typename C>
void norm_linear(const T* tokens, Chosen chosen, T* taken, Index rows, Index dim, Norm norm, const T* weight,
                 const float* bias, Index width, T* out, float* means, float* scales) {
  const Scratch<C> panels(dim * width);
#pragma omp parallel
  {
    [[maybe_unused]] const InUse<C> in_use;
    pack_forward<C>(weight, width, dim, nullptr, panels.get());
    const Scratch<C> normed(kBlock<C> * dim);
#pragma omp for schedule(dynamic)
    for (Index first = 0; first < rows; first += kBlock<C>) {
      const Index some = std::min(kBlock<C>, rows - first);
      const T* here = block_of(tokens, dim, chosen, first, some, false, chosen.at ? taken + first * dim : nullptr);
      norm_block(here, some, dim, norm, means + first, scales + first, normed.get());
      by_panels(some, width, dim, Left<C>{normed.get(), dim}, panels.get(), 
                [&](Index p, float* found, Index from, Index to) {
        const __m512 added[2] = {load(bias + p * kPanel), load(bias + p * kPanel + 16)};
        for (Index row = from; row < to; ++row)
          store(_mm512_add_ps(load(found + row * kPanel), added[0]),
                _mm512_add_ps(load(found + row * kPanel + 16), added[1]), out + (first + row) * width + p * kPanel);
      });
    }
  }
}

// One panel's part of a result: (+ bias · factor) · the chosen row's factor + onto, which stands block by block, to the
// chosen row.
template <typename T>
inline void write_linear(const float* found, Index from, Index to, Index p, const float* bias, const float* factor,
                         Index first, Index dim, const T* onto, const Chosen& chosen, T* out) {
  __m512 added[2];
  for (Index v = 0; v < 2; ++v) {
    added[v] = load(bias + p * kPanel + 16 * v);
    if (factor) added[v] = _mm512_mul_ps(added[v], load(factor + p * kPanel + 16 * v));
  }
  for (Index row = from; row < to; ++row) {
    const __m512 times = _mm512_set1_ps(chosen.at ? chosen.factors[first + row] : 1.0f);
    __m512 x[2];
    for (Index v = 0; v < 2; ++v) {
      x[v] = _mm512_add_ps(load(found + row * kPanel + 16 * v), added[v]);
      if (onto) x[v] = _mm512_fmadd_ps(x[v], times, load(onto + (first + row) * dim + p * kPanel + 16 * v));
    }
    store(x[0], x[1], out + chosen[first + row] * dim + p * kPanel);
  }
}

// out = linear(in) · factor + onto, if there are these; chosen rows of `out`, if any are, and with `onto` alone.
template <typename T, typename C>
void scaled_linear(const T* in, Index rows, Index width, const T* weight, const float* bias, const float* factor,
                   Index dim, const T* onto, Chosen chosen, T* out) {
  const Scratch<C> panels(dim * width);
#pragma omp parallel
  {
    [[maybe_unused]] const InUse<C> in_use;
    pack_forward<C>(weight, dim, width, factor, panels.get());
    const Scratch<C> copy(std::is_same_v<T, C> ? 1 : kBlock<C> * width);
#pragma omp for schedule(dynamic)
    for (Index first = 0; first < rows; first += kBlock<C>) {
      const Index some = std::min(kBlock<C>, rows - first);
      const C* left = as_multiplied(in + first * width, some * width, copy.get());
      by_panels(some, dim, width, Left<C>{left, width}, panels.get(), 
                [&](Index p, float* found, Index from, Index to) {
        write_linear(found, from, to, p, bias, factor, first, dim, onto, chosen, out);
      });
    }
  }
}

// out = linear2(GELU(linear1(norm(tokens)))) · factor, + tokens if `onto`; kept: what linear1 gave, by blocks and panels.
// Of chosen rows, which are copied to `taken`, `onto` them: `out` may be `tokens`.
template <typename T, typename C>
void feed_forward(const T* tokens, Chosen chosen, T* taken, Index rows, Index dim, Index width, Norm norm,
                  const T* weight1, const float* bias1, const T* weight2, const float* bias2, const float* factor,
                  bool onto, T* out, T* kept, float* means, float* scales) {
  const Scratch<C> panels1(dim * width), panels2(dim * width);
  const T* added = !onto ? nullptr : chosen.at ? taken : tokens;
#pragma omp parallel
  {
    [[maybe_unused]] const InUse<C> in_use;
    pack_forward<C>(weight1, width, dim, nullptr, panels1.get());
    pack_forward<C>(weight2, dim, width, factor, panels2.get());
    const Scratch<C> normed(kBlock<C> * dim), activated(kBlock<C> * width);
#pragma omp for schedule(dynamic)
    for (Index first = 0; first < rows; first += kBlock<C>) {
      const Index some = std::min(kBlock<C>, rows - first);
      const T* here = block_of(tokens, dim, chosen, first, some, false, chosen.at ? taken + first * dim : nullptr);
      norm_block(here, some, dim, norm, means + first, scales + first, normed.get());
      by_panels(some, width, dim, Left<C>{normed.get(), dim}, panels1.get(), 
                [&](Index p, float* found, Index from, Index to) {
        C* target = activated.get() + p * kBlock<C> * kPanel;
        T* hidden = kept ? kept + first * width + p * some * kPanel : nullptr;
        for (Index row = from; row < to; ++row) {
          __m512 x[2], active[2];
          for (Index v = 0; v < 2; ++v) {
            x[v] = _mm512_add_ps(load(found + row * kPanel + 16 * v), load(bias1 + p * kPanel + 16 * v));
            active[v] = _mm512_mul_ps(x[v], normal_for<C>(x[v]).cumulative);
          }
          if (hidden) store(x[0], x[1], hidden + row * kPanel);
          store(active[0], active[1], target + row * kPanel);
        }
      });
      by_panels(some, dim, width, Left<C>{activated.get(), kPanel, kBlock<C> * kPanel}, panels2.get(),
              [&](Index p, float* found, Index from, Index to) {
                write_linear(found, from, to, p, bias2, factor, first, dim, added, chosen, out);
              });
    }
  }
}

// What a backward pass gives of a norm and the linear layer behind it.
struct OfNormLinear {
  float *norm_weight, *norm_bias;
  void* weight;
  float* bias;
};

// … and of a linear layer with LayerScale; `factor` is null without that.
struct OfScaled {
  void* weight;
  float *bias, *factor;
};

inline void finish_scaled(const float* total, const float* bias, const float* factor, Index dim, const OfScaled& of) {
  for (Index i = 0; i < dim; ++i) {
    if (factor) of.factor[i] += total[i] * bias[i];
    of.bias[i] = factor ? total[i] * factor[i] : total[i];
  }
}

// The way back through a norm and what is multiplied by a linear layer behind it, for a block of rows: `left` is the
// gradient in the layer's output.
template <typename T, typename C>
struct NormBackward {
  const T* tokens;
  Chosen chosen;  // of `onto` and `of_tokens`, which may be the same
  Index dim;
  Norm norm;
  const float *means, *scales;
  const T* onto;
  T* of_tokens;
  const OfWeight<C>& of_weight;

  void recompute(Index first, Index some, Index at, float* normed) const {
    for (Index row = first; row < first + some; ++row)
      norm_row(tokens + row * dim, norm.weight, norm.bias, dim, means[row], scales[row], normed + (row - first) * dim);
    lay_out_groups(normed, dim, some, dim, of_weight.depth(), of_weight.groups(at));
  }

  // `sums`: for the norm's weight, then its bias. `of_normed` is overwritten.
  void finish(Index first, Index some, const Left<C>& left, const C* panels, Index width, float* of_normed,
              float* sums) const {
    by_panels(some, dim, width, left, panels, [&](Index p, const float* found, Index from, Index to) {
      for (Index row = from; row < to; ++row)
        std::memcpy(of_normed + row * dim + p * kPanel, found + row * kPanel, kPanel * sizeof(float));
    });
    for (Index row = first; row < first + some; ++row)
      norm_row_backward(of_normed + (row - first) * dim, tokens + row * dim, norm.weight, dim, means[row], scales[row],
                        onto ? onto + chosen[row] * dim : nullptr, sums, sums + dim, of_tokens + chosen[row] * dim);
  }
};

template <typename T>
inline void add_rows(const T* in, Index rows, Index columns, float* __restrict sums) {
  for (Index row = 0; row < rows; ++row) {
    const T* __restrict values = in + row * columns;
    for (Index i = 0; i < columns; ++i) sums[i] += widen(values[i]);
  }
}

// The gradients of `feed_forward`. With chosen rows `tokens` are those that were taken.
template <typename T, typename C>
void feed_forward_backward(const T* gradient, Chosen chosen, const T* tokens, Index rows, Index dim, Index width, Norm norm,
                           const T* weight1, const T* weight2, const float* bias2, const float* factor, bool onto,
                           const T* kept, const float* means, const float* scales, T* of_tokens, OfNormLinear of_first,
                           OfScaled of_second) {
  const Index blocks = blocks_at_a_time<C>(rows), depth = blocks * kBlock<C>;
  const Scratch<C> panels1(dim * width), panels2(dim * width);
  const OfWeight<C> weight1_sums(depth, dim, width), weight2_sums(depth, dim, width);
  const BlockSums sums(blocks, width + 3 * dim);
  const NormBackward<T, C> back = {tokens, chosen, dim, norm, means, scales, onto ? gradient : nullptr, of_tokens,
                                   weight1_sums};
#pragma omp parallel
  {
    [[maybe_unused]] const InUse<C> in_use;
    pack_backward(weight1, width, dim, nullptr, panels1.get());
    pack_backward(weight2, dim, width, factor, panels2.get());
    // Pairs of rows lie interleaved in panels; where they do not, rows can be multiplied as they lie there.
    constexpr bool kPairs = !std::is_same_v<C, float>;
    const Scratch<C> copy(std::is_same_v<T, C> ? 1 : kBlock<C> * dim), by_rows(kPairs ? kBlock<C> * width : 1);
    const Scratch<float> normed(kBlock<C> * dim);
    const Scratch<T> taken(chosen.at ? kBlock<C> * dim : 1);
    for (Index start = 0; start < rows; start += depth) {
      const Index count = std::min(depth, rows - start);
#pragma omp for schedule(dynamic)
      for (Index at = 0; at < count; at += kBlock<C>) {
        const Index first = start + at, some = std::min(kBlock<C>, rows - first);
        const T* of_out = block_of(gradient, dim, chosen, first, some, true, taken.get());
        float* of_bias1 = sums.of(at / kBlock<C>);
        add_rows(of_out, some, dim, of_bias1 + width);
        lay_out_groups(of_out, dim, some, dim, depth, weight2_sums.groups(at));
        back.recompute(first, some, at, normed.get());
        const C* left = as_multiplied(of_out, some * dim, copy.get());
        by_panels(some, width, dim, Left<C>{left, dim}, panels2.get(), 
                  [&](Index p, float* found, Index from, Index to) {
          const T* hidden = kept + first * width + p * some * kPanel;
          float* bias_sums = of_bias1 + p * kPanel;
          C* of_second = weight2_sums.panels(at) + p * depth * kPanel;
          C* of_first = weight1_sums.panels(at) + p * depth * kPanel;
          __m512 sums[2] = {load(bias_sums), load(bias_sums + 16)};
          alignas(64) float activated[2 * kPanel];
          for (Index row = from; row < to; row += 2) {
            const Index both = std::min<Index>(2, to - row);
            for (Index r = 0; r < both; ++r)
              for (Index v = 0; v < 2; ++v) {
                float* gradient_at = found + (row + r) * kPanel + 16 * v;
                const __m512 x = load(hidden + (row + r) * kPanel + 16 * v);
                const Normals here = normal_for<C>(x);
                const __m512 slope = _mm512_fmadd_ps(x, here.density, here.cumulative);
                const __m512 g = _mm512_mul_ps(load(gradient_at), slope);
                sums[v] = _mm512_add_ps(sums[v], g);
                _mm512_store_ps(gradient_at, g);
                _mm512_store_ps(activated + r * kPanel + 16 * v, _mm512_mul_ps(x, here.cumulative));
              }
            store_rows<kPanel>(activated, kPanel, both, of_second + row * kPanel);
            store_rows<kPanel>(found + row * kPanel, kPanel, both, of_first + row * kPanel);
          }
          for (Index v = 0; v < 2; ++v) _mm512_storeu_ps(bias_sums + 16 * v, sums[v]);
          if constexpr (kPairs)
            convert(found + from * kPanel, (to - from) * kPanel, by_rows.get() + (p * kBlock<C> + from) * kPanel);
        });
        weight2_sums.fill_up(at, some);
        weight1_sums.fill_up(at, some);
        const C* of_hidden = kPairs ? by_rows.get() : weight1_sums.panels(at);
        back.finish(first, some, Left<C>{of_hidden, kPanel, (kPairs ? kBlock<C> : depth) * kPanel}, panels1.get(), width,
                    normed.get(), of_bias1 + width + dim);
      }
      weight2_sums.multiply(count, start == 0);
      weight1_sums.multiply(count, start == 0);
      sums.meet((count + kBlock<C> - 1) / kBlock<C>);
    }
    weight1_sums.read_turned(static_cast<T*>(of_first.weight));
    weight2_sums.read(weight2, factor, static_cast<T*>(of_second.weight), of_second.factor);
  }
  const Scratch<float> total(dim);
  sums.read(0, width, of_first.bias);
  sums.read(width, dim, total.get());
  sums.read(width + dim, dim, of_first.norm_weight);
  sums.read(width + 2 * dim, dim, of_first.norm_bias);
  finish_scaled(total.get(), bias2, factor, dim, of_second);
}

// The gradients of `norm_linear`, + `onto` if that is given. With chosen rows `tokens` are those that were taken.
template <typename T, typename C>
void norm_linear_backward(const C* gradient, const T* tokens, Chosen chosen, Index rows, Index dim, Index width, Norm norm,
                          const T* weight, const float* means, const float* scales, const T* onto, T* of_tokens,
                          OfNormLinear of) {
  const Index blocks = blocks_at_a_time<C>(rows), depth = blocks * kBlock<C>;
  const Scratch<C> panels(dim * width);
  const OfWeight<C> weight_sums(depth, dim, width);
  const BlockSums sums(blocks, width + 2 * dim);
  const NormBackward<T, C> back = {tokens, chosen, dim, norm, means, scales, onto, of_tokens, weight_sums};
#pragma omp parallel
  {
    [[maybe_unused]] const InUse<C> in_use;
    pack_backward(weight, width, dim, nullptr, panels.get());
    const Scratch<float> normed(kBlock<C> * dim);
    for (Index start = 0; start < rows; start += depth) {
      const Index count = std::min(depth, rows - start);
#pragma omp for schedule(dynamic)
      for (Index at = 0; at < count; at += kBlock<C>) {
        const Index first = start + at, some = std::min(kBlock<C>, rows - first);
        const C* of_out = gradient + first * width;
        float* of_bias = sums.of(at / kBlock<C>);
        add_rows(of_out, some, width, of_bias);
        lay_out<kPanel>(of_out, width, some, width, depth, weight_sums.panels(at));
        weight_sums.fill_up(at, some);
        back.recompute(first, some, at, normed.get());
        back.finish(first, some, Left<C>{of_out, width}, panels.get(), width, normed.get(), of_bias + width);
      }
      weight_sums.multiply(count, start == 0);
      sums.meet((count + kBlock<C> - 1) / kBlock<C>);
    }
    weight_sums.read_turned(static_cast<T*>(of.weight));
  }
  sums.read(0, width, of.bias);
  sums.read(width, dim, of.norm_weight);
  sums.read(width + dim, dim, of.norm_bias);
}

// The gradients of `scaled_linear`.
template <typename T, typename C>
void scaled_linear_backward(const T* gradient, Chosen chosen, const T* in, Index rows, Index width, const T* weight,
                            const float* bias, const float* factor, Index dim, C* of_in, OfScaled of) {
  const Index blocks = blocks_at_a_time<C>(rows), depth = blocks * kBlock<C>;
  const Scratch<C> panels(dim * width);
  const OfWeight<C> weight_sums(depth, dim, width);
  const BlockSums sums(blocks, dim);
#pragma omp parallel
  {
    [[maybe_unused]] const InUse<C> in_use;
    pack_backward(weight, dim, width, factor, panels.get());
    const Scratch<C> copy(std::is_same_v<T, C> ? 1 : kBlock<C> * dim);
    const Scratch<T> taken(chosen.at ? kBlock<C> * dim : 1);
    for (Index start = 0; start < rows; start += depth) {
      const Index count = std::min(depth, rows - start);
#pragma omp for schedule(dynamic)
      for (Index at = 0; at < count; at += kBlock<C>) {
        const Index first = start + at, some = std::min(kBlock<C>, rows - first);
        const T* of_out = block_of(gradient, dim, chosen, first, some, true, taken.get());
        add_rows(of_out, some, dim, sums.of(at / kBlock<C>));
        lay_out_groups(of_out, dim, some, dim, depth, weight_sums.groups(at));
        lay_out<kPanel>(in + first * width, width, some, width, depth, weight_sums.panels(at));
        weight_sums.fill_up(at, some);
        const C* left = as_multiplied(of_out, some * dim, copy.get());
        by_panels(some, width, dim, Left<C>{left, dim}, panels.get(), 
                  [&](Index p, const float* found, Index from, Index to) {
          for (Index row = from; row < to; ++row)
            convert(found + row * kPanel, kPanel, of_in + (first + row) * width + p * kPanel);
        });
      }
      weight_sums.multiply(count, start == 0);
      sums.meet((count + kBlock<C> - 1) / kBlock<C>);
    }
    weight_sums.read(weight, factor, static_cast<T*>(of.weight), of.factor);
  }
  const Scratch<float> total(dim);
  sums.read(0, dim, total.get());
  finish_scaled(total.get(), bias, factor, dim, of);
}

// out (narrow × wide) = leftᵀ · right: the product alone.
template <typename T, typename C>
void product_of_rows(const T* left, const T* right, Index rows, Index narrow, Index wide, T* out) {
  const Index blocks = blocks_at_a_time<C>(rows), depth = blocks * kBlock<C>;
  const OfWeight<C> sums(depth, narrow, wide);
#pragma omp parallel
  {
    [[maybe_unused]] const InUse<C> in_use;
    for (Index start = 0; start < rows; start += depth) {
      const Index count = std::min(depth, rows - start);
#pragma omp for schedule(dynamic)
      for (Index at = 0; at < count; at += kBlock<C>) {
        const Index first = start + at, some = std::min(kBlock<C>, rows - first);
        lay_out_groups(left + first * narrow, narrow, some, narrow, depth, sums.groups(at));
        lay_out<kPanel>(right + first * wide, wide, some, wide, depth, sums.panels(at));
        sums.fill_up(at, some);
      }
      sums.multiply(count, start == 0);
#pragma omp barrier
    }
    sums.read(static_cast<const T*>(nullptr), nullptr, out, nullptr);
  }
}

}  // namespace

// `how` says it of tensors; biases, factors, norms' parameters, statistics and their gradients are in single precision.
// The gradients in what stands between the two layers of attention have the type that is multiplied.
// `at`: which `rows` of a longer matrix are meant, times `factors`; without it all of them. `taken`: their copy.
EXPORT void dinov2_norm_linear(int how, const void* tokens, const Index* at, void* taken, Index rows, Index dim,
                               const float* norm_weight, const float* norm_bias, float epsilon, const void* weight,
                               const float* bias, Index width, void* out, float* means, float* scales) {
  const Norm norm = {norm_weight, norm_bias, epsilon};
  const Chosen chosen = {at, nullptr};
  MULTIPLY(norm_linear, IN(tokens), chosen, OUT(taken), rows, dim, norm, IN(weight), bias, width, OUT(out), means, scales)
}

EXPORT void dinov2_norm_linear_backward(int how, const void* gradient, const void* tokens, const Index* at, Index rows,
                                        Index dim, Index width, const float* norm_weight, const float* norm_bias,
                                        const void* weight, const float* means, const float* scales, const void* onto,
                                        void* of_tokens, float* of_norm_weight, float* of_norm_bias, void* of_weight,
                                        float* of_bias) {
  const Norm norm = {norm_weight, norm_bias, 0.0f};
  const OfNormLinear of = {of_norm_weight, of_norm_bias, of_weight, of_bias};
  const Chosen chosen = {at, nullptr};
  MULTIPLY(norm_linear_backward, BETWEEN(gradient), IN(tokens), chosen, rows, dim, width, norm, IN(weight), means,
           scales, IN(onto), OUT(of_tokens), of)
}

EXPORT void dinov2_scaled_linear(int how, const void* in, Index rows, Index width, const void* weight,
                                 const float* bias, const float* factor, Index dim, const void* onto, const Index* at,
                                 const float* factors, void* out) {
  const Chosen chosen = {at, factors};
  MULTIPLY(scaled_linear, IN(in), rows, width, IN(weight), bias, factor, dim, IN(onto), chosen, OUT(out))
}

EXPORT void dinov2_scaled_linear_backward(int how, const void* gradient, const Index* at, const float* factors,
                                          const void* in, Index rows, Index width, const void* weight,
                                          const float* bias, const float* factor, Index dim, void* of_in,
                                          void* of_weight, float* of_bias, float* of_factor) {
  const OfScaled of = {of_weight, of_bias, of_factor};
  const Chosen chosen = {at, factors};
  MULTIPLY(scaled_linear_backward, IN(gradient), chosen, IN(in), rows, width, IN(weight), bias, factor, dim,
           BETWEEN_OUT(of_in), of)
}

// out = `in`, (all, dim), but for these rows, which are left as they are
EXPORT void dinov2_copy_others(int half, const void* in, Index all, Index dim, const Index* rows, Index count, void* out) {
  CALL(copy_others, IN(in), all, dim, rows, count, OUT(out))
}

EXPORT void dinov2_product_of_rows(int how, const void* left, const void* right, Index rows, Index narrow, Index wide,
                                   void* out) {
  MULTIPLY(product_of_rows, IN(left), IN(right), rows, narrow, wide, OUT(out))
}

EXPORT void dinov2_feed_forward(int how, const void* tokens, const Index* at, const float* factors, void* taken,
                                Index rows, Index dim, Index width, const float* norm_weight, const float* norm_bias,
                                float epsilon, const void* weight1, const float* bias1, const void* weight2,
                                const float* bias2, const float* factor, int onto, void* out, void* kept, float* means,
                                float* scales) {
  const Norm norm = {norm_weight, norm_bias, epsilon};
  const Chosen chosen = {at, factors};
  MULTIPLY(feed_forward, IN(tokens), chosen, OUT(taken), rows, dim, width, norm, IN(weight1), bias1, IN(weight2), bias2,
           factor, onto != 0, OUT(out), OUT(kept), means, scales)
}

EXPORT void dinov2_feed_forward_backward(int how, const void* gradient, const Index* at, const float* factors,
                                         const void* tokens, Index rows, Index dim, Index width,
                                         const float* norm_weight, const float* norm_bias, const void* weight1,
                                         const void* weight2, const float* bias2, const float* factor, int onto,
                                         const void* kept, const float* means, const float* scales, void* of_tokens,
                                         float* of_norm_weight, float* of_norm_bias, void* of_weight1, float* of_bias1,
                                         void* of_weight2, float* of_bias2, float* of_factor) {
  const Norm norm = {norm_weight, norm_bias, 0.0f};
  const OfNormLinear of_first = {of_norm_weight, of_norm_bias, of_weight1, of_bias1};
  const OfScaled of_second = {of_weight2, of_bias2, of_factor};
  const Chosen chosen = {at, factors};
  MULTIPLY(feed_forward_backward, IN(gradient), chosen, IN(tokens), rows, dim, width, norm, IN(weight1), IN(weight2),
           bias2, factor, onto != 0, IN(kept), means, scales, OUT(of_tokens), of_first, of_second)
}

#endif

// Whether there are branches and attention: they need AVX-512.
EXPORT int dinov2_has_branches() {
#ifdef __AVX512F__
  return 1;
#else
  return 0;
#endif
}

// Whether they are multiplied in tiles.
EXPORT int dinov2_has_tiles() {
#ifdef __AMX_BF16__
  return 1;
#else
  return 0;
#endif
}

// Whether this process may use what the code was built for: Linux gives tiles to who asks, and to the threads it starts.
EXPORT int dinov2_runs_here() {
#ifdef __AVX512VBMI__
  if (!__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512vnni")) return 0;
#endif
#ifdef __AMX_BF16__
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (d & kBFloat16) && (d & kTiles) && syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#else
  return 1;
#endif
}

// Whether branches can be multiplied in bfloat16, see `how`.
EXPORT int dinov2_multiplies_bf16() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}
