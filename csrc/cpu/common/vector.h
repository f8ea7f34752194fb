// Vectors of floats of any width. Functions are written once, for every width and for a single float.

#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/common/target.h"

namespace molex {

template <int LANES>
struct VectorOf {
  typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
  typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(float))));
};
template <int LANES>
using Floats = typename VectorOf<LANES>::Floats;
template <int LANES>
using Ints = typename VectorOf<LANES>::Ints;

// Sums whose order must not depend on the machine's registers run in as many lanes, of one register or of
// several. A vector of this type is for what is not hot: where it is wider than a register, GCC's code for it
// is several times slower than that for its parts.
constexpr int kWide = 16;
using Wide = Floats<kWide>;

// A vector at any address where a float may be. It may alias floats only, as a vector may alias its elements.
template <class V>
struct InMemory {
  typedef V Type __attribute__((aligned(4)));
};

template <int LANES = kWide>
MOLEX_INLINE Floats<LANES> load(const float* from) {
  return *reinterpret_cast<const typename InMemory<Floats<LANES>>::Type*>(from);
}

template <class V>
MOLEX_INLINE void store(float* to, V x) {
  *reinterpret_cast<typename InMemory<V>::Type*>(to) = x;
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

// Returns `a` where the mask is set, else `b`. Bit operations are used for vectors wider than a register of
// AVX2: GCC would split `?:` there into single floats.
template <class Mask, class V>
MOLEX_INLINE V select(Mask mask, V a, V b) {
  if constexpr (sizeof(V) > 32) {
    return (V)((mask & (Mask)a) | (~mask & (Mask)b));
  } else {
    return mask ? a : b;
  }
}

// The larger of two values; `b` if `a` is NaN.
template <class V>
MOLEX_INLINE V larger(V a, V b) {
  return select(a > b, a, b);
}

template <int DISTANCE, class V, int... LANE>
MOLEX_INLINE V swapped(V x, std::integer_sequence<int, LANE...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(x, x, (LANE ^ DISTANCE)...);
#else  // GCC 11
  return __builtin_shuffle(x, Ints<sizeof...(LANE)>{(LANE ^ DISTANCE)...});
#endif
}

// Combines all lanes, halves first: the order is always the same. Every lane gets the result.
template <class V, class Combine, int DISTANCE = sizeof(V) / sizeof(V{}[0]) / 2>
MOLEX_INLINE V folded(V x, const Combine& combine) {
  if constexpr (DISTANCE == 0) {
    return x;
  } else {
    constexpr std::make_integer_sequence<int, sizeof(V) / sizeof(V{}[0])> kLanes;
    return folded<V, Combine, DISTANCE / 2>(combine(x, swapped<DISTANCE>(x, kLanes)), combine);
  }
}

template <class V>
MOLEX_INLINE auto sum_of_lanes(V x) {
  return folded(x, [](V a, V b) MOLEX_LAMBDA_INLINE { return a + b; })[0];
}

template <class V>
MOLEX_INLINE auto largest_lane(V x) {
  return folded(x, [](V a, V b) MOLEX_LAMBDA_INLINE {
    // Only lane 0 is used in the end, so GCC reduces a comparison of floats to one instruction per pair.
    if constexpr (std::is_same_v<decltype(a[0] + 0), float>) return a > b ? a : b;
    return larger(a, b);
  })[0];
}

// The sum of all lanes of several vectors, as that of the one vector of which they are the parts.
template <class V, size_t COUNT>
MOLEX_INLINE auto sum_of_parts(V (&parts)[COUNT]) {
  for (size_t half = COUNT / 2; half > 0; half /= 2) {
    for (size_t k = 0; k < half; ++k) parts[k] += parts[k + half];
  }
  return sum_of_lanes(parts[0]);
}

// The largest lane of several vectors.
template <class V, size_t COUNT>
MOLEX_INLINE auto largest_of_parts(V (&parts)[COUNT]) {
  for (size_t half = COUNT / 2; half > 0; half /= 2) {
    for (size_t k = 0; k < half; ++k) parts[k] = larger(parts[k], parts[k + half]);
  }
  return largest_lane(parts[0]);
}

// The product x as it is rounded, of one register. GCC fuses a product with the difference that takes it; of
// two large equal numbers, only one of them rounded, that leaves the rounding.
template <class V>
MOLEX_INLINE V rounded(V x) {
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__GNUC__) && !defined(__clang__) && defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
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

// e^x for x <= 88, of a float or of each lane, with the polynomial of Cephes, to about one ulp. Results that
// are not normal numbers become 0, NaN is kept.
template <class V>
MOLEX_INLINE V exponential(V x) {
  constexpr float kLowest = -87.33654f;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to a whole number
  const V shifted = x * 1.44269504f + kMagic;
  const V whole = shifted - kMagic;
  // Subtracts whole * log 2 in two parts, the first of which has trailing zeros, so that the product is
  // exact.
  const V r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  // Multiplies by 2^whole, made by shifting the exponent into place.
  const V result = p * float_of<V>((bits_of(shifted) << 23) + 0x3f800000);
  return select(x < kLowest, V{}, result);
}

}  // namespace molex
