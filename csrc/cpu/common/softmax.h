// Exponentials, logarithms and softmax of a row, in fp32. Sums have a fixed order.

#pragma once

#include <cmath>
#include <limits>

#include "cpu/common/vector.h"

namespace molex {

// e^x for any x, of a float or of each lane, limited to e^88.
template <class V>
MOLEX_INLINE V exp_of(V x) {
  const V most = V{} + 88.0f;
  return exponential(select(x > most, most, x));
}

template <class V>
MOLEX_INLINE V sigmoid_of(V x) {
  return 1.0f / (1.0f + exp_of(-x));
}

// log(x) for a normal number above 0, with the polynomial of Cephes. NaN and infinity are returned as they
// are.
MOLEX_INLINE float log_of(float x) {
  // x = 2^n m with sqrt(1/2) <= m < sqrt(2).
  const uint32_t bits = bits_of(x), shifted = bits - 0x3f3504f3u;
  const float n = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float m = float_of<float>((shifted & 0x007fffffu) + 0x3f3504f3u), r = m - 1.0f, s = r * r;
  float p = 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const float made = (r + (p * r * s + (n * -2.12194440e-4f - 0.5f * s))) + n * 0.693359375f;
  return x < std::numeric_limits<float>::infinity() ? made : x;
}

// The size of a row of `count` floats, rounded up to whole vectors of kWide.
constexpr int64_t wide_of(int64_t count) { return (count + kWide - 1) / kWide * kWide; }

struct Exponentials {
  float largest, sum;
};

// p_i = e^(scale (z_i - m)), where m is the largest value and scale > 0, then zeros up to whole vectors.
// Returns {m, sum_i p_i}. p may be z. LANES are those of the machine's registers, on which
// the result does not depend.
template <int LANES>
MOLEX_INLINE Exponentials exponentials_of(const float* z, float scale, float* p, int64_t count) {
  const int64_t whole = wide_of(count);
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  if (whole != count) {
    for (int64_t i = 0; i < count; ++i) p[i] = z[i];
    for (int64_t i = count; i < whole; ++i) p[i] = kLowest;
    z = p;
  }
  constexpr int kParts = kWide / LANES;
  Floats<LANES> most[kParts], sum[kParts] = {};
  for (auto& part : most) part = broadcast<LANES>(kLowest);
  for (int64_t i = 0; i < whole; i += kWide) {
    for (int k = 0; k < kParts; ++k) most[k] = larger(load<LANES>(z + i + k * LANES), most[k]);
  }
  const float largest = largest_of_parts(most);
  for (int64_t i = 0; i < whole; i += kWide) {
    for (int k = 0; k < kParts; ++k) {
      const Floats<LANES> made = exp_of((load<LANES>(z + i + k * LANES) - largest) * scale);
      store(p + i + k * LANES, made);
      sum[k] += made;
    }
  }
  return {largest, sum_of_parts(sum)};
}

// Writes the softmax of the first `count` values, then zeros up to whole vectors.
inline constexpr auto softmax_of =
    versions([](auto registers, const float* z, float* out, int64_t count) MOLEX_LAMBDA_INLINE {
      const float inverse = 1.0f / exponentials_of<registers.kLanes>(z, 1.0f, out, count).sum;
      for (int64_t i = 0; i < count; ++i) out[i] *= inverse;
    });

}  // namespace molex
