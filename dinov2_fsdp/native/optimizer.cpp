// AdamW on a CPU in one pass over memory, where operations one by one take eight; and the norm that clipping needs.

#include "common.h"

namespace {

// arXiv 1711.05101, algorithm 2. Every value is rounded alike wherever a tensor is cut: the loop has no sums, and its
// vectors and the rest behind them do the same operations.
void adamw(float* __restrict parameter, const float* __restrict gradient, float* __restrict first,
           float* __restrict second, Index count, float scale, float kept, float new1, float beta2, float new2,
           float rate, float correction, float epsilon) {
#pragma omp parallel for simd schedule(static)
  for (Index i = 0; i < count; ++i) {
    const float g = gradient[i] / scale;
    const float m = first[i] + new1 * (g - first[i]);
    const float v = second[i] * beta2 + new2 * g * g;
    first[i] = m;
    second[i] = v;
    parameter[i] = parameter[i] * kept - rate * (m / (std::sqrt(v) / correction + epsilon));
  }
}

constexpr Index kSummed = 1 << 16;

// In double precision, some values after the other whatever the number of threads; a NaN or an infinity stays one.
double square_sum(const float* values, Index count) {
  const Index parts = (count + kSummed - 1) / kSummed;
  const Scratch<double> sums(parts);
#pragma omp parallel for schedule(static)
  for (Index part = 0; part < parts; ++part) {
    const float* __restrict some = values + part * kSummed;
    const Index there = std::min(kSummed, count - part * kSummed);
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (Index i = 0; i < there; ++i) sum += static_cast<double>(some[i]) * static_cast<double>(some[i]);
    sums.get()[part] = sum;
  }
  double sum = 0.0;
  for (Index part = 0; part < parts; ++part) sum += sums.get()[part];
  return sum;
}

}  // namespace

EXPORT void dinov2_square_sum(const float* values, Index count, double* sum) { *sum = square_sum(values, count); }

// kept: of each parameter, 1 − rate · decay; new1, new2: 1 − β; rate: over the first moment's correction; correction: of
// the second's root.
EXPORT void dinov2_adamw(float* parameter, const float* gradient, float* first, float* second, Index count, float scale,
                         float kept, float new1, float beta2, float new2, float rate, float correction,
                         float epsilon) {
  adamw(parameter, gradient, first, second, count, scale, kept, new1, beta2, new2, rate, correction, epsilon);
}
