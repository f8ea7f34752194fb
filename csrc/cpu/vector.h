// Vectors of floats in the registers' own width, and functions written once for every width.

#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "rows.h"

namespace molex {

// `Loaded` is what memory holds, wherever a float may start.
template <int LANES>
struct VectorOf {
  typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
  typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(float))));
  typedef float Loaded __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
};
template <int LANES>
using Floats = typename VectorOf<LANES>::Floats;
template <int LANES>
using Ints = typename VectorOf<LANES>::Ints;

template <int LANES>
MOLEX_INLINE Floats<LANES> load(const float* from) {
  return *reinterpret_cast<const typename VectorOf<LANES>::Loaded*>(from);
}

template <int LANES>
MOLEX_INLINE void store(float* to, Floats<LANES> x) {
  *reinterpret_cast<typename VectorOf<LANES>::Loaded*>(to) = x;
}

template <int LANES>
MOLEX_INLINE Floats<LANES> broadcast(float x) {
  return Floats<LANES>{} + x;
}

// 0, 1, 2, ... from `first` on.
template <int LANES>
MOLEX_INLINE Ints<LANES> count_from(int32_t first) {
  Ints<LANES> lanes;
  for (int lane = 0; lane < LANES; ++lane) lanes[lane] = lane;
  return lanes + first;
}

// The larger of two; `b` where `a` is NaN.
template <class V>
MOLEX_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

template <int LANES>
MOLEX_INLINE float sum_of(Floats<LANES> x) {
  for (int half = LANES / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) x[lane] += x[lane + half];
  }
  return x[0];
}

template <int LANES>
MOLEX_INLINE float largest_of(Floats<LANES> x) {
  for (int half = LANES / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) x[lane] = larger(x[lane + half], x[lane]);
  }
  return x[0];
}

// A float's bits, or those of each lane, and back.
template <class V>
MOLEX_INLINE auto bits_of(V x) {
  if constexpr (std::is_same_v<V, float>) {
    return std::bit_cast<uint32_t>(x);
  } else {
    return (decltype(x < x))x;
  }
}
template <class V, class Bits>
MOLEX_INLINE V float_of(Bits bits) {
  if constexpr (std::is_same_v<V, float>) {
    return std::bit_cast<float>(bits);
  } else {
    return (V)bits;
  }
}

// e^x for x <= 88, of a float or of each lane, with Cephes' polynomial, to about an ulp; 0 where that is no
// normal number. NaN stays.
template <class V>
MOLEX_INLINE V exponential(V x) {
  constexpr float kLowest = -87.33654f;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to a whole number
  const V shifted = x * 1.44269504f + kMagic;
  const V whole = shifted - kMagic;
  // x - whole * log 2, in two parts of which the first has zeros at its end.
  const V r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  // 2^whole, its exponent shifted to its place.
  const V result = p * float_of<V>((bits_of(shifted) << 23) + 0x3f800000);
  return x < kLowest ? V{} : result;
}

}  // namespace molex

// MOLEX_VERSIONS(name, (int64_t count, ...), body) defines `name`, a pointer to a function, with a copy
// of the body for each width of vector registers, of which the machine's is taken. In it kLanes floats
// fill a register, and there are 32 registers where kMany, else 16. Helpers have to be MOLEX_INLINE.
#define MOLEX_VERSION_(NAME, PARAMETERS, LANES, MANY, ...) \
  void NAME PARAMETERS {                                   \
    constexpr int kLanes = LANES;                          \
    [[maybe_unused]] constexpr bool kMany = MANY;          \
    __VA_ARGS__                                            \
  }
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(MOLEX_SANITIZE)
#define MOLEX_TARGET(LEVEL) __attribute__((target("arch=" LEVEL)))
#define MOLEX_VERSIONS(NAME, PARAMETERS, ...)                                                        \
  namespace versions {                                                                               \
  MOLEX_TARGET("x86-64-v4")                                                                          \
  static MOLEX_VERSION_(NAME##_v4, PARAMETERS, 16, true, __VA_ARGS__)                                \
      MOLEX_TARGET("x86-64-v3") static MOLEX_VERSION_(NAME##_v3, PARAMETERS, 8, false, __VA_ARGS__)  \
          MOLEX_TARGET("x86-64") static MOLEX_VERSION_(NAME##_v1, PARAMETERS, 4, false, __VA_ARGS__) \
  }                                                                                                  \
  void(*const NAME) PARAMETERS = __builtin_cpu_supports("x86-64-v4")   ? versions::NAME##_v4         \
                                 : __builtin_cpu_supports("x86-64-v3") ? versions::NAME##_v3         \
                                                                       : versions::NAME##_v1;
#else
#if defined(__aarch64__)
#define MOLEX_MANY true
#else
#define MOLEX_MANY false
#endif
#define MOLEX_VERSIONS(NAME, PARAMETERS, ...)                               \
  namespace versions {                                                      \
  static MOLEX_VERSION_(NAME##_any, PARAMETERS, 4, MOLEX_MANY, __VA_ARGS__) \
  }                                                                         \
  void(*const NAME) PARAMETERS = versions::NAME##_any;
#endif
