// Functions that are compiled for several instruction sets. A call runs the version that the machine can.
//
//   constexpr auto add = versions([](auto, float* to, const float* from, int64_t count) MOLEX_LAMBDA_INLINE {
//     for (int64_t i = 0; i < count; ++i) to[i] += from[i];
//   });
//
// compiles the body for x86-64-v4 (AVX-512), x86-64-v3 (AVX2 and FMA) and x86-64, and `add(to, from, count)`
// runs one of the three. The first argument is the instruction set's `Registers`; where the body needs them,
// it names it: `[](auto registers, ...)` and `constexpr int kLanes = registers.kLanes`. What the body calls
// has to be MOLEX_INLINE, else it is compiled for x86-64 only. Arguments are passed by value: a reference to
// a float could be to one that the body writes, and would be read again and again.

#pragma once

// There is one version, for what the flags allow, with clang, on other processors, and with flags that
// already ask for AVX (-march=native). Clang refuses to inline functions with vector arguments across
// instruction sets.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__AVX__)
#define MOLEX_SEVERAL
#endif

// Stands before a loop whose outputs overlap no input, so that the compiler vectorises it without run-time
// checks.
#if defined(__clang__)
#define MOLEX_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define MOLEX_INDEPENDENT _Pragma("GCC ivdep")
#else
#define MOLEX_INDEPENDENT
#endif
#define MOLEX_INLINE inline __attribute__((always_inline))
#define MOLEX_LAMBDA_INLINE __attribute__((always_inline))

namespace molex {

// The vector registers of an instruction set: each holds `kLanes` floats, and there are 32 of them if kMany,
// else 16.
template <int LANES, bool MANY_REGISTERS>
struct Registers {
  static constexpr int kLanes = LANES;
  static constexpr bool kMany = MANY_REGISTERS;
};

#if defined(MOLEX_SEVERAL)

// GCC 11 can ask for single features only.
#if __GNUC__ >= 12
inline const bool kHasV4 = __builtin_cpu_supports("x86-64-v4");
inline const bool kHasV3 = __builtin_cpu_supports("x86-64-v3");
#else
inline const bool kHasV3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                           __builtin_cpu_supports("f16c");
inline const bool kHasV4 = kHasV3 && __builtin_cpu_supports("avx512f") &&
                           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif

template <class Body, class... Arguments>
__attribute__((target("arch=x86-64-v4"))) auto run_v4(Arguments... arguments) {
  return Body{}(Registers<16, true>{}, arguments...);
}

template <class Body, class... Arguments>
__attribute__((target("arch=x86-64-v3"))) auto run_v3(Arguments... arguments) {
  return Body{}(Registers<8, false>{}, arguments...);
}

template <class Body, class... Arguments>
MOLEX_INLINE auto run(Arguments... arguments) {
  if (kHasV4) return run_v4<Body>(arguments...);
  if (kHasV3) return run_v3<Body>(arguments...);
  return Body{}(Registers<4, false>{}, arguments...);
}

#else

#if defined(__AVX512F__)
using OnlyRegisters = Registers<16, true>;
#elif defined(__AVX2__)
using OnlyRegisters = Registers<8, false>;
#elif defined(__aarch64__)
using OnlyRegisters = Registers<4, true>;
#else
using OnlyRegisters = Registers<4, false>;
#endif

template <class Body, class... Arguments>
MOLEX_INLINE auto run(Arguments... arguments) {
  return Body{}(OnlyRegisters{}, arguments...);
}

#endif

template <class Body>
struct Versions {
  template <class... Arguments>
  MOLEX_INLINE auto operator()(Arguments... arguments) const {
    return run<Body>(arguments...);
  }

  // Converts to a pointer to a function, for tables of functions.
  template <class Result, class... Arguments>
  using Pointer = Result (*)(Arguments...);
  template <class Result, class... Arguments>
  constexpr operator Pointer<Result, Arguments...>() const {
    return [](Arguments... arguments) -> Result { return run<Body>(arguments...); };
  }
};

// Makes the versions of a body, which must not capture anything.
template <class Body>
constexpr Versions<Body> versions(Body) {
  return {};
}

}  // namespace molex
