// AdamW on a CPU in one pass over memory, where operations one by one take eight.

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

}  // namespace

// kept: of each parameter, 1 − rate · decay; new1, new2: 1 − β; rate: over the first moment's correction; correction: of
// the second's root.
EXPORT void dinov2_adamw(float* parameter, const float* gradient, float* first, float* second, Index count, float scale,
                         float kept, float new1, float beta2, float new2, float rate, float correction,
                         float epsilon) {
  adamw(parameter, gradient, first, second, count, scale, kept, new1, beta2, new2, rate, correction, epsilon);
}
