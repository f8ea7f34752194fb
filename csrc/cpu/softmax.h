// The exponential, and what is made of it over a row, in fp32 and in a fixed order.

#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "rows.h"

namespace molex {

// 2^n e^r, |r| <= log(2) / 2, with Cephes' polynomial, within an ulp; at most e^88, 0 where that is no normal
// number. NaN stays.
MOLEX_INLINE float exp_of(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
  const float inside = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;
  const float shifted = inside * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const uint32_t power = (std::bit_cast<uint32_t>(shifted) + 127u) << 23;
  const float made = (p * r * r + r + 1.0f) * std::bit_cast<float>(power);
  return x < -87.0f ? 0.0f : made;
}

MOLEX_INLINE float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }

constexpr int kWide = 16;
typedef float Wide __attribute__((vector_size(kWide * sizeof(float))));
typedef float LoadedWide __attribute__((vector_size(kWide * sizeof(float)), aligned(4), may_alias));

MOLEX_INLINE Wide load(const float* from) { return *reinterpret_cast<const LoadedWide*>(from); }

MOLEX_INLINE Wide larger(Wide a, Wide b) { return a > b ? a : b; }

#define MOLEX_UPPER(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)

// Lanes folded onto one another: always the same order.
#define MOLEX_FOLD(x, COMBINE)                                                                      \
  x = COMBINE(x, MOLEX_UPPER(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));             \
  x = COMBINE(x, MOLEX_UPPER(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));             \
  x = COMBINE(x, MOLEX_UPPER(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));             \
  x = COMBINE(x, MOLEX_UPPER(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))

MOLEX_INLINE Wide added(Wide a, Wide b) { return a + b; }

MOLEX_INLINE float largest_lane(Wide x) {
  MOLEX_FOLD(x, larger);
  return x[0];
}

MOLEX_INLINE float sum_of_lanes(Wide x) {
  MOLEX_FOLD(x, added);
  return x[0];
}

// Floats of a row in whole vectors.
constexpr int64_t wide_of(int64_t count) { return (count + kWide - 1) / kWide * kWide; }

// p_i = e^(z_i - m) with the largest m, 0 up to whole vectors; returns {m, sum_i p_i}. p may be z.
struct Exponentials {
  float largest, sum;
};

MOLEX_INLINE Exponentials exponentials_of(const float* z, float* p, int64_t count) {
  const int64_t whole = wide_of(count);
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  if (whole != count || z != p) {
    for (int64_t i = 0; i < count; ++i) p[i] = z[i];
    for (int64_t i = count; i < whole; ++i) p[i] = kLowest;
  }
  Wide most = Wide{} + kLowest;
  for (int64_t i = 0; i < whole; i += kWide) most = larger(load(p + i), most);
  const float largest = largest_lane(most);
  Wide sum = {};
  for (int64_t i = 0; i < whole; i += kWide) {
    for (int lane = 0; lane < kWide; ++lane) p[i + lane] = exp_of(p[i + lane] - largest);
    sum += load(p + i);
  }
  return {largest, sum_of_lanes(sum)};
}

// out [wide_of(count)]; softmax of the first `count`, then zeros.
MOLEX_CLONES inline void softmax_of(const float* z, float* out, int64_t count) {
  const float inverse = 1.0f / exponentials_of(z, out, count).sum;
  for (int64_t i = 0; i < count; ++i) out[i] *= inverse;
}

}  // namespace molex
