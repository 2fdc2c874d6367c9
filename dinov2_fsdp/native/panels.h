// Matrix products on panels of 32 columns, in the registers of AVX-512, and how matrices are laid out for them.
//
// Matrices are multiplied as C, single precision or bfloat16 (by the processor's own instruction, sums in single
// precision), and lie in memory as T. Values of bfloat16 are multiplied in pairs: two rows of a panel lie interleaved.
// Where the processor has tiles for them, as many as fill one are multiplied there.

#pragma once

#include "common.h"
#include "tiles.h"

#ifdef __AVX512F__

namespace {

constexpr Index kPanel = 32;  // columns of a panel: two vectors
constexpr Index kRows = 12;   // of a tile, whose 24 sums and two columns fill 26 of 32 registers
constexpr Index kAhead = 1024;  // bytes of a panel that are asked for before they are read: it comes from L2 or beyond

// What is read of a panel at a time, two cache lines, of what comes later. Beyond its end is the next one, or nothing
// that could fail.
template <typename C>
inline void ask_ahead(const C* panel) {
  const char* at = reinterpret_cast<const char*>(panel) + kAhead;
  _mm_prefetch(at, _MM_HINT_T0);
  _mm_prefetch(at + 64, _MM_HINT_T0);
}

inline Index up_to(Index multiple, Index count) { return (count + multiple - 1) / multiple * multiple; }
// The first so many lanes of a vector of sixteen.
inline __mmask16 lanes(Index count) { return static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1u); }

inline Index padded(Index columns) { return up_to(kPanel, columns); }

// What is read of a panel and of a row at a time: one value of each column, or a pair.
template <typename C>
struct Multiplied;

template <>
struct Multiplied<float> {
  static constexpr Index kDepth = 1;    // of what is multiplied at a time
  static constexpr Index kWhole = 1;    // rows are filled up to a multiple of it
  static constexpr Index kGroup = kRows;  // columns of the left side of a product of rows that lie together
  struct InUse {};                      // what a thread has while it multiplies
  using Vector = __m512;
  static Vector columns(const float* panel) { return _mm512_load_ps(panel); }
  static Vector value(const float* a) { return _mm512_set1_ps(*a); }
  static __m512 add(__m512 sum, Vector value, Vector columns) { return _mm512_fmadd_ps(value, columns, sum); }
};

#ifdef __AVX512BF16__
template <>
struct Multiplied<BFloat16> {
  static constexpr Index kDepth = 2;
#ifdef __AMX_BF16__
  static constexpr Index kWhole = kDeep;
  static constexpr Index kGroup = kSide;
  using InUse = TilesInUse;
#else
  static constexpr Index kWhole = 2;
  static constexpr Index kGroup = kRows;
  struct InUse {};
#endif
  using Vector = __m512bh;
  static Vector columns(const BFloat16* panel) { return (__m512bh)_mm512_load_si512(panel); }
  static Vector value(const BFloat16* a) {
    std::int32_t both;
    std::memcpy(&both, a, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
  }
  static __m512 add(__m512 sum, Vector value, Vector columns) { return _mm512_dpbf16_ps(sum, value, columns); }
};
#endif

template <typename C>
constexpr bool kByTiles = Multiplied<C>::kWhole > 2;

template <typename C>
using InUse = typename Multiplied<C>::InUse;

template <typename C>
inline Index depth_of(Index rows) {
  return up_to(Multiplied<C>::kWhole, rows);
}

template <typename C>
inline Index groups_of(Index columns) {
  return up_to(Multiplied<C>::kGroup, columns) / Multiplied<C>::kGroup;
}

// The left side of a product: value (row, k) lies at row · row_step + (k / 32) · chunk_step + (k % 32) · step.
template <typename C>
struct Left {
  const C* at;
  Index row_step, chunk_step = 32, step = 1;
  Left from_row(Index row) const { return {at + row * row_step, row_step, chunk_step, step}; }
};

// c = kCount rows of a · the first kVectors · 16 columns of one panel. `depth` is a multiple of what is read at a time;
// `last` masks the last vector. The rows begin `at`; `left` says how they lie, and is not handed over by value: it would
// be copied through memory as a whole, which waits for everything that was written before.
template <int kCount, int kVectors, typename C>
inline void tile(const C* at, const Left<C>& left, const C* panel, Index depth, __mmask16 last, float* c,
                 Index c_row) {
  using M = Multiplied<C>;
  __m512 sums[kCount][kVectors];
#pragma GCC unroll 12
  for (int row = 0; row < kCount; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[row][v] = _mm512_setzero_ps();
  const C* a = at;
  const Index a_row = left.row_step, a_k = left.step, a_chunk = left.chunk_step;
  for (; depth > 0; depth -= 32, a += a_chunk) {
    const Index some = std::min<Index>(32, depth);
    for (Index k = 0; k < some; k += M::kDepth, panel += M::kDepth * kPanel) {
      typename M::Vector columns[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) columns[v] = M::columns(panel + 16 * M::kDepth * v);
      ask_ahead(panel);
#pragma GCC unroll 12
      for (int row = 0; row < kCount; ++row) {
        const auto value = M::value(a + row * a_row + k * a_k);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[row][v] = M::add(sums[row][v], value, columns[v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kCount; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      _mm512_mask_storeu_ps(c + row * c_row + 16 * v, v + 1 < kVectors ? __mmask16(0xffff) : last, sums[row][v]);
}

#ifdef __AMX_BF16__
inline bool fills_squares(Index rows, Index depth, const Left<BFloat16>& left) {
  return rows >= kSide && depth % kDeep == 0 && left.step == 1;
}

constexpr auto kNothing = [] {};

// Rows by tiles that are all full: the last begin so early that they end with the rows, and find some sums again.
template <int kVectors, typename Beside>
inline void by_squares(Index rows, const Left<BFloat16>& left, const BFloat16* panel, Index depth, __mmask16 last,
                       float* c, Index c_row, const Beside& beside) {
  const auto some = [&](auto down, Index row) {
    constexpr int kDown = decltype(down)::value;
    constexpr Index kHigh = kDown * kSide;
    const Index second = kSide * left.row_step;
    const BFloat16* a = left.at + row * left.row_step;
    float* target = c + row * c_row;
    if (last == 0xffff) {
      squares<kDown, kVectors>(a, left.row_step, second, left.chunk_step, panel, depth / kDeep, target, c_row, beside);
      return;
    }
    alignas(64) float found[kHigh * kVectors * kSide];
    squares<kDown, kVectors>(a, left.row_step, second, left.chunk_step, panel, depth / kDeep, found, kVectors * kSide,
                            beside);
    for (Index r = 0; r < kHigh; ++r)
      for (int v = 0; v < kVectors; ++v)
        _mm512_mask_storeu_ps(target + r * c_row + v * kSide, v + 1 < kVectors ? __mmask16(0xffff) : last,
                              _mm512_load_ps(found + (r * kVectors + v) * kSide));
  };
  for (Index row = 0; row < rows;) {
    const bool two = rows - row > kSide && rows >= 2 * kSide;
    const Index high = two ? 2 * kSide : kSide;
    row = std::min(row, rows - high);
    if (two) {
      some(std::integral_constant<int, 2>(), row);
    } else {
      some(std::integral_constant<int, 1>(), row);
    }
    row += high;
  }
}
#endif

// Rows by as few tiles as that takes, all as high as each other or one row less: a low tile's sums wait for each other.
template <int kVectors, typename C>
inline void tiles(Index rows, const Left<C>& left, const C* panel, Index depth, __mmask16 last, float* c,
                  Index c_row) {
#ifdef __AMX_BF16__
  if constexpr (std::is_same_v<C, BFloat16>) {
    if (fills_squares(rows, depth, left)) {
      by_squares<kVectors>(rows, left, panel, depth, last, c, c_row, kNothing);
      return;
    }
  }
#endif
  const C* at = left.at;
  for (Index some; rows > 0; rows -= some, at += some * left.row_step, c += some * c_row) {
    const Index count = (rows + kRows - 1) / kRows;
    some = (rows + count - 1) / count;
    switch (some) {
#define TILE(rows)                                                \
  case rows:                                                      \
    tile<rows, kVectors>(at, left, panel, depth, last, c, c_row); \
    break;
      TILE(12) TILE(11) TILE(10) TILE(9) TILE(8) TILE(7) TILE(6) TILE(5) TILE(4) TILE(3) TILE(2) TILE(1)
#undef TILE
    }
  }
}

// c (rows × columns) = left · panels, of which the last may be wider than what is left of the columns.
template <typename C>
void product(Index rows, Index columns, Index depth, const Left<C>& left, const C* panels, float* c, Index c_row) {
  for (Index start = 0; start < columns; start += kPanel, panels += depth * kPanel) {
    const Index some = std::min(kPanel, columns - start);
    const __mmask16 last = lanes(some > 16 ? some - 16 : some);
    if (some > 16) {
      tiles<2>(rows, left, panels, depth, last, c + start, c_row);
    } else {
      tiles<1>(rows, left, panels, depth, last, c + start, c_row);
    }
  }
}

// c (12 × 32) += one group of 12 columns, transposed, · one panel; depth rows of both. To nothing if `first`; only so
// many rows and columns are written. What is added is summed up by itself: the more there is, the more is rounded.
template <typename C>
inline void add_tile(const C* group, const C* panel, Index depth, bool first, Index rows, Index columns, float* c,
                     Index c_row) {
  using M = Multiplied<C>;
  const __mmask16 left = lanes(columns), right = lanes(std::max<Index>(0, columns - 16));
  __m512 sums[kRows][2];
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) sums[row][0] = sums[row][1] = _mm512_setzero_ps();
  for (Index k = 0; k < depth; k += M::kDepth, group += M::kDepth * kRows, panel += M::kDepth * kPanel) {
    const auto near = M::columns(panel), far = M::columns(panel + 16 * M::kDepth);
    ask_ahead(panel);
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      const auto value = M::value(group + M::kDepth * row);
      sums[row][0] = M::add(sums[row][0], value, near);
      sums[row][1] = M::add(sums[row][1], value, far);
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
    if (row < rows) {
      float* at = c + row * c_row;
      if (!first) {
        sums[row][0] = _mm512_add_ps(sums[row][0], _mm512_maskz_loadu_ps(left, at));
        sums[row][1] = _mm512_add_ps(sums[row][1], _mm512_maskz_loadu_ps(right, at + 16));
      }
      _mm512_mask_storeu_ps(at, left, sums[row][0]);
      _mm512_mask_storeu_ps(at + 16, right, sums[row][1]);
    }
  }
}

// c (rows × columns) += leftᵀ · one panel, `depth` rows of both, of which groups of left's columns lie `step` apart.
template <typename C>
inline void add_groups(const C* groups, Index step, const C* panel, Index depth, bool first, Index rows, Index columns,
                       float* c, Index c_row) {
  for (Index row = 0; row < rows; row += kRows, groups += step)
    add_tile(groups, panel, depth, first, std::min(kRows, rows - row), columns, c + row * c_row, c_row);
}

#ifdef __AMX_BF16__
template <>
inline void add_groups(const BFloat16* groups, Index step, const BFloat16* panel, Index depth, bool first, Index rows,
                       Index columns, float* c, Index c_row) {
  alignas(64) float found[2][2 * kSide * kPanel];
  const __mmask16 left = lanes(columns), right = lanes(std::max<Index>(0, columns - kSide));
  // What one pair of groups gives is added while tiles multiply the next: `added` rows of `there` so far.
  Index added = 0, there = 0;
  const float* sums = nullptr;
  float* at = c;
  const auto add = [&](Index some) {
    for (const Index end = std::min(there, added + some); added < end; ++added, sums += kPanel, at += c_row) {
      __m512 near = _mm512_load_ps(sums), far = _mm512_load_ps(sums + kSide);
      if (!first) {
        near = _mm512_add_ps(near, _mm512_maskz_loadu_ps(left, at));
        far = _mm512_add_ps(far, _mm512_maskz_loadu_ps(right, at + kSide));
      }
      _mm512_mask_storeu_ps(at, left, near);
      _mm512_mask_storeu_ps(at + kSide, right, far);
    }
  };
  const Index chunks = depth / kDeep, each = (2 * kSide + chunks - 1) / chunks;
  const auto beside = [&] { add(each); };
  for (Index row = 0; row < rows; row += 2 * kSide, groups += 2 * step) {
    float* target = found[row / (2 * kSide) % 2];
    const Index high = std::min(2 * kSide, rows - row);
    if (high > kSide) {
      squares<2, 2>(groups, kDeep, step, kSide * kDeep, panel, chunks, target, kPanel, beside);
    } else {
      squares<1, 2>(groups, kDeep, step, kSide * kDeep, panel, chunks, target, kPanel, beside);
    }
    add(there);
    added = 0, there = high, sums = target;
  }
  add(there);
}
#endif

// ---- Types, and how matrices are laid out.

inline std::uint32_t pair(BFloat16 first, BFloat16 second) {
  return first.bits | static_cast<std::uint32_t>(second.bits) << 16;
}

template <typename To, typename From>
inline void convert(const From* __restrict in, Index count, To* __restrict out) {
  for (Index i = 0; i < count; ++i) out[i] = narrow<To>(widen(in[i]));
}

#ifdef __AVX512BF16__
// By the processor's instruction, which takes what is too small for a normal number for zero.
template <>
inline void convert(const float* __restrict in, Index count, BFloat16* __restrict out) {
  for (Index i = 0; i < count; i += 16) {
    const __mmask16 mask = lanes(count - i);
    const auto halves = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, in + i));
    _mm256_mask_storeu_epi16(out + i, mask, halves);
  }
}
#endif

inline __m512 load(const float* in) { return _mm512_loadu_ps(in); }

inline __m512 load(const BFloat16* in) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// 32 values, one after the other.
inline void store(__m512 first, __m512 second, float* out) {
  _mm512_storeu_ps(out, first);
  _mm512_storeu_ps(out + 16, second);
}

inline void store(__m512 first, __m512 second, BFloat16* out) {
#ifdef __AVX512BF16__
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(second, first));
#else
  float values[32];
  store(first, second, values);
  convert(values, 32, out);
#endif
}

// The sum of value(i) over i = 0, 16, …, vectors of sixteen each, four at a time: each waits for the one before. A
// compiler that may not reorder sums adds their lanes up one after the other, which takes longer than all before; these
// meet in pairs.
template <typename Value>
inline float sum_of(Index count, const Value& value) {
  __m512 sums[4];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  Index i = 0;
  for (; i + 64 <= count; i += 64)
    for (int s = 0; s < 4; ++s) sums[s] = _mm512_add_ps(sums[s], value(i + 16 * s));
  for (; i < count; i += 16) sums[0] = _mm512_add_ps(sums[0], value(i));
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

// A matrix as it is multiplied: in its own place where that has the type, else a copy of these rows.
template <typename C, typename T>
inline const C* as_multiplied(const T* in, Index count, C* copy) {
  if constexpr (std::is_same_v<T, C>) {
    return in;
  } else {
    convert(in, count, copy);
    return copy;
  }
}

inline BFloat16 as_bf16(BFloat16 value) { return value; }
inline BFloat16 as_bf16(float value) { return narrow<BFloat16>(value); }

#ifdef __AVX512BF16__
// The order that interleaves them.
inline __m512i by_pairs() {
  alignas(64) std::uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<std::uint16_t>(i / 2 + 16 * (i % 2));
  return _mm512_load_si512(order);
}

// Up to 16 values of two rows, one after the other.
inline __m512i both_rows(const float* first, const float* second, __mmask16 mask) {
  const __m512 later = second ? _mm512_maskz_loadu_ps(mask, second) : _mm512_setzero_ps();
  return (__m512i)_mm512_cvtne2ps_pbh(later, _mm512_maskz_loadu_ps(mask, first));
}

inline __m512i both_rows(const BFloat16* first, const BFloat16* second, __mmask16 mask) {
  const __m256i later = second ? _mm256_maskz_loadu_epi16(mask, second) : _mm256_setzero_si256();
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, first)), later, 1);
}
#endif

// Rows of kWidth values, two at a time, to where a row or a pair of rows lies.
template <Index kWidth, typename From>
inline void store_rows(const From* in, Index stride, Index rows, float* out) {
  for (Index row = 0; row < rows; ++row)
    for (Index i = 0; i < kWidth; ++i) out[row * kWidth + i] = widen(in[row * stride + i]);
}

template <Index kWidth, typename From>
inline void store_rows(const From* in, Index stride, Index rows, BFloat16* out) {
#ifdef __AVX512BF16__
  const __m512i order = by_pairs();
  for (Index row = 0; row < rows; row += 2) {
    const From* first = in + row * stride;
    const From* second = row + 1 < rows ? first + stride : nullptr;
    for (Index i = 0; i < kWidth; i += 16) {
      const __mmask16 mask = lanes(kWidth - i);
      const __m512i both = both_rows(first + i, second ? second + i : nullptr, mask);
      _mm512_mask_storeu_epi32(out + row * kWidth + 2 * i, mask, _mm512_permutexvar_epi16(order, both));
    }
  }
#else
  for (Index row = 0; row < rows; row += 2) {
    const From* __restrict first = in + row * stride;
    std::uint32_t both[kWidth];
    if (row + 1 < rows) {
      const From* __restrict second = first + stride;
      for (Index i = 0; i < kWidth; ++i) both[i] = pair(as_bf16(first[i]), as_bf16(second[i]));
    } else {
      for (Index i = 0; i < kWidth; ++i) both[i] = as_bf16(first[i]).bits;
    }
    std::memcpy(out + row * kWidth, both, sizeof both);
  }
#endif
}

// Rows → (columns / kWidth, depth, kWidth): their place in panels or groups that have `depth` rows. The last one is
// filled up with zeros.
template <Index kWidth, typename C, typename From>
inline void lay_out(const From* in, Index stride, Index rows, Index columns, Index depth, C* out) {
  const Index whole = columns / kWidth, rest = columns - whole * kWidth;
  for (Index g = 0; g < whole; ++g) store_rows<kWidth>(in + g * kWidth, stride, rows, out + g * depth * kWidth);
  for (Index row = 0; rest && row < rows; row += 2) {
    float filled[2 * kWidth] = {};
    const Index both = std::min<Index>(2, rows - row);
    for (Index r = 0; r < both; ++r)
      for (Index i = 0; i < rest; ++i) filled[r * kWidth + i] = widen(in[(row + r) * stride + whole * kWidth + i]);
    store_rows<kWidth>(filled, kWidth, both, out + (whole * depth + row) * kWidth);
  }
}

// Panels of `depth` rows, of which so many are there, with zeros behind them up to what is multiplied as a whole.
template <typename C>
inline void fill_up(Index rows, Index columns, Index depth, C* panels) {
  const Index there = up_to(Multiplied<C>::kDepth, rows), whole = depth_of<C>(rows);
  for (Index p = 0; there < whole && p < padded(columns) / kPanel; ++p)
    std::memset(static_cast<void*>(panels + (p * depth + there) * kPanel), 0, (whole - there) * kPanel * sizeof(C));
}

// Rows of the left side of a product of rows → groups of its columns.
template <typename C, typename From>
inline void lay_out_groups(const From* in, Index stride, Index rows, Index columns, Index depth, C* out) {
  lay_out<kRows>(in, stride, rows, columns, depth, out);
}

#ifdef __AMX_BF16__
// 16 columns are a group, 32 rows of it a tile, whose rows are columns. Filled up with zeros to whole tiles.
template <typename From>
inline void lay_out_groups(const From* in, Index stride, Index rows, Index columns, Index depth, BFloat16* out) {
  alignas(64) float pairs[kSide * kSide];  // a pair of values of two rows in the memory of a float
  for (Index start = 0; start < rows; start += kDeep) {
    const Index some = std::min(kDeep, rows - start), there = up_to(2, some) / 2;
    if (some < kDeep) std::fill(pairs + there * kSide, pairs + kSide * kSide, 0.0f);
    for (Index column = 0; column < columns; column += kSide) {
      const __mmask16 mask = lanes(columns - column);
      for (Index i = 0; i < there; ++i) {
        const From* first = in + (start + 2 * i) * stride + column;
        const From* second = 2 * i + 1 < some ? first + stride : nullptr;
        _mm512_store_si512(pairs + i * kSide, _mm512_permutexvar_epi16(by_pairs(), both_rows(first, second, mask)));
      }
      transpose_part(pairs, kSide, kSide, kSide, reinterpret_cast<float*>(out + column * depth + start * kSide), kSide);
    }
  }
}
#endif

}  // namespace

// How tensors lie in memory and are multiplied: 0 in single precision, 1 in bfloat16 and in single precision, 2 in
// bfloat16, with dinov2_multiplies_bf16 alone.
#ifdef __AVX512BF16__
#define MULTIPLY(function, ...)         \
  if (how == 2) {                       \
    using T = BFloat16;                 \
    using C = BFloat16;                 \
    function<T, C>(__VA_ARGS__);        \
  } else if (how == 1) {                \
    using T = BFloat16;                 \
    using C = float;                    \
    function<T, C>(__VA_ARGS__);        \
  } else {                              \
    using T = float;                    \
    using C = float;                    \
    function<T, C>(__VA_ARGS__);        \
  }
#else
#define MULTIPLY(function, ...)         \
  if (how) {                            \
    using T = BFloat16;                 \
    using C = float;                    \
    function<T, C>(__VA_ARGS__);        \
  } else {                              \
    using T = float;                    \
    using C = float;                    \
    function<T, C>(__VA_ARGS__);        \
  }
#endif
// What stands between two functions, and is multiplied next.
#define BETWEEN(pointer) static_cast<const C*>(pointer)
#define BETWEEN_OUT(pointer) static_cast<C*>(pointer)

#endif
