// Vectors of floats read from memory of any supported dtype and rounded into it, in the registers of one
// pass: for what would otherwise be a row of floats, written and read again.

#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/common/rows.h"

namespace molex {

// A single float is a vector of one lane.
template <int LANES>
struct LanesOf {
  using Type = Floats<LANES>;
};
template <>
struct LanesOf<1> {
  using Type = float;
};
template <int LANES>
using Lanes = typename LanesOf<LANES>::Type;

// The bits of numbers of 16 and of 32.
template <int LANES>
struct BitsOf {
  typedef uint16_t Narrow __attribute__((vector_size(LANES * sizeof(uint16_t))));
  typedef uint32_t Wide __attribute__((vector_size(LANES * sizeof(uint32_t))));
};

// With AVX2 two instructions each way, where GCC makes five of what says the same for every machine.
#if defined(MOLEX_SEVERAL) || (defined(__AVX2__) && defined(__GNUC__) && !defined(__clang__))
constexpr int kBrainFloats = 8;
typedef short EightBits __attribute__((vector_size(8 * sizeof(short))));
typedef long long FourLongs __attribute__((vector_size(4 * sizeof(long long))));

MOLEX_INLINE Ints<8> upper_halves(const c10::BFloat16* from) {
  EightBits bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return __builtin_ia32_pmovzxwd256(bits) << 16;
}

// Stores the lower halves of numbers that fit them.
MOLEX_INLINE void store_lower_halves(Ints<8> x, c10::BFloat16* to) {
  const FourLongs bits = (FourLongs)x;
  const Ints<4> low = (Ints<4>)__builtin_ia32_extract128i256(bits, 0);
  const Ints<4> high = (Ints<4>)__builtin_ia32_extract128i256(bits, 1);
  const EightBits packed = __builtin_ia32_packusdw128(low, high);
  __builtin_memcpy(to, &packed, sizeof(packed));
}
#else
constexpr int kBrainFloats = 0;
MOLEX_INLINE Ints<8> upper_halves(const c10::BFloat16*) { return {}; }
MOLEX_INLINE void store_lower_halves(Ints<8>, c10::BFloat16*) {}
#endif

// How many elements a pass takes at once: a register's worth of floats, of halves what one instruction
// converts.
template <class Element, class Registers>
constexpr int lanes_of(Registers registers) {
  constexpr bool halves = std::is_same_v<Element, c10::Half> && converts_halves(Registers{});
  return halves && Registers::kLanes > kHalves ? kHalves : registers.kLanes;
}

template <int LANES, class Registers, class Element>
MOLEX_INLINE Lanes<LANES> load_elements(Registers, const Element* from) {
  if constexpr (LANES == 1) {
    return static_cast<float>(*from);
  } else if constexpr (std::is_same_v<Element, float>) {
    return load<LANES>(from);
  } else if constexpr (std::is_same_v<Element, c10::BFloat16> && LANES == kBrainFloats) {
    return (Floats<LANES>)upper_halves(from);
  } else if constexpr (std::is_same_v<Element, c10::BFloat16>) {
    using Bits = typename BitsOf<LANES>::Narrow;
    using Wider = typename BitsOf<LANES>::Wide;
    Bits bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    return (Floats<LANES>)(__builtin_convertvector(bits, Wider) << 16);
  } else if constexpr (LANES == kHalves && converts_halves(Registers{})) {
    float to[LANES];
    widen_halves(from, to);
    return load<LANES>(to);
  } else {
    Floats<LANES> x;
    for (int lane = 0; lane < LANES; ++lane) x[lane] = static_cast<float>(from[lane]);
    return x;
  }
}

// Rounds to the nearest, ties to even.
template <int LANES, class Registers, class Element>
MOLEX_INLINE void store_elements(Registers, Element* to, Lanes<LANES> x) {
  if constexpr (LANES == 1) {
    *to = static_cast<Element>(x);
  } else if constexpr (std::is_same_v<Element, float>) {
    store(to, x);
  } else if constexpr (std::is_same_v<Element, c10::BFloat16>) {
    using Bits = typename BitsOf<LANES>::Narrow;
    using Wider = typename BitsOf<LANES>::Wide;
    constexpr uint32_t kNaN = 0x7fc0;
    const Wider bits = (Wider)x;
    const Wider nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Wider rounded = select(x == x, nearest, Wider{} + kNaN);
    if constexpr (LANES == kBrainFloats) {
      store_lower_halves((Ints<LANES>)rounded, to);
    } else {
      const Bits narrow = __builtin_convertvector(rounded, Bits);
      __builtin_memcpy(to, &narrow, sizeof(narrow));
    }
  } else if constexpr (LANES == kHalves && converts_halves(Registers{})) {
    float from[LANES];
    store(from, x);
    narrow_halves(from, to);
  } else {
    for (int lane = 0; lane < LANES; ++lane) to[lane] = static_cast<Element>(x[lane]);
  }
}

// Calls `one` for whole vectors of elements, then for single ones: one(lanes, i).
template <int LANES, class Function>
MOLEX_INLINE void for_elements(int64_t count, const Function& one) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) one(std::integral_constant<int, LANES>{}, i);
  for (; i < count; ++i) one(std::integral_constant<int, 1>{}, i);
}

// Calls the function with a value of the element type of a dtype.
template <class Function>
auto by_dtype(ScalarType dtype, const Function& function) {
  switch (dtype) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::BFloat16:
      return function(c10::BFloat16{});
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Half, "expected float32, bfloat16 or float16");
      return function(c10::Half{});
  }
}

}  // namespace molex
