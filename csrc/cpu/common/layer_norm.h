// LayerNorm of a row in fp32, and its gradient.

#pragma once

#include <cmath>

#include "cpu/common/rows.h"

namespace molex {

// Replaces y by (y - mean) / sqrt(variance + eps) and returns 1 / sqrt(variance + eps).
inline constexpr auto normalise =
    versions([](auto registers, float* y, int64_t count, float eps) MOLEX_LAMBDA_INLINE {
      const float mean = sum_of<registers.kLanes>(y, count) / count;
      for (int64_t i = 0; i < count; ++i) y[i] -= mean;
      const float inverse = 1.0f / std::sqrt(dot_of<registers.kLanes>(y, y, count) / count + eps);
      for (int64_t i = 0; i < count; ++i) y[i] *= inverse;
      return inverse;
    });

inline constexpr auto scale_and_shift =
    versions([](auto, float* y, const float* weight, const float* bias, int64_t count) MOLEX_LAMBDA_INLINE {
      if (weight) {
        for (int64_t i = 0; i < count; ++i) y[i] *= weight[i];
      }
      if (bias) {
        for (int64_t i = 0; i < count; ++i) y[i] += bias[i];
      }
    });

// Writes the gradient of the row before the norm to `out`, and adds to the sums of the parameters' gradients.
inline constexpr auto normalise_backward = versions([](auto registers,
                                                       float* out,
                                                       const float* dy,
                                                       const float* normed,
                                                       float inverse,
                                                       const float* weight,
                                                       float* dweight,
                                                       float* dbias,
                                                       int64_t count) MOLEX_LAMBDA_INLINE {
  if (dweight) {
    MOLEX_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) {
      dweight[i] += dy[i] * normed[i];
      dbias[i] += dy[i];
    }
  }
  MOLEX_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) out[i] = weight ? dy[i] * weight[i] : dy[i];
  const float projection = dot_of<registers.kLanes>(out, normed, count) / count;
  const float mean = sum_of<registers.kLanes>(out, count) / count;
  for (int64_t i = 0; i < count; ++i) out[i] = inverse * (out[i] - normed[i] * projection - mean);
});

}  // namespace molex
