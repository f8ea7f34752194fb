// What functions are compiled for: a copy for each level of the instruction set, the machine's taken.

#pragma once

// Clang has one version of everything, for the instructions that its flags allow (-march=...).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(MOLEX_SANITIZE)
#define MOLEX_SEVERAL
#endif

// How GCC names the levels of the instruction set. Version 11 chooses clones by single features alone.
#if __GNUC__ >= 12
#define MOLEX_CLONE_LEVELS "arch=x86-64-v4", "arch=x86-64-v3", "default"
#define MOLEX_SUPPORTS_V4 __builtin_cpu_supports("x86-64-v4")
#define MOLEX_SUPPORTS_V3 __builtin_cpu_supports("x86-64-v3")
#else
#define MOLEX_CLONE_LEVELS "avx512f", "avx2", "default"
#define MOLEX_SUPPORTS_V3                                                                              \
  (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && \
   __builtin_cpu_supports("bmi2"))
#define MOLEX_SUPPORTS_V4                                                                          \
  (MOLEX_SUPPORTS_V3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
   __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&                     \
   __builtin_cpu_supports("avx512vl"))
#endif

// One copy of a function for each level of the instruction set, chosen when the library is loaded.
#if defined(MOLEX_SEVERAL) && defined(__linux__)
#define MOLEX_CLONES __attribute__((target_clones(MOLEX_CLONE_LEVELS)))
#else
#define MOLEX_CLONES
#endif
// Before a loop: no output overlaps an input, so that it is vectorised however many there are.
#if defined(__clang__)
#define MOLEX_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define MOLEX_INDEPENDENT _Pragma("GCC ivdep")
#else
#define MOLEX_INDEPENDENT
#endif
#define MOLEX_INLINE inline __attribute__((always_inline))
#define MOLEX_LAMBDA_INLINE __attribute__((always_inline))

// MOLEX_VERSIONS(name, (int64_t count, ...), body) defines `name`, a pointer to a function, with a copy
// of the body for each width of vector registers, of which the machine's is taken. In it kLanes floats
// fill a register, and there are 32 registers where kMany, else 16. Helpers have to be MOLEX_INLINE.
#define MOLEX_VERSION_(NAME, PARAMETERS, LANES, MANY, ...) \
  void NAME PARAMETERS {                                   \
    constexpr int kLanes = LANES;                          \
    [[maybe_unused]] constexpr bool kMany = MANY;          \
    __VA_ARGS__                                            \
  }
#if defined(MOLEX_SEVERAL)
#define MOLEX_TARGET(LEVEL) __attribute__((target("arch=" LEVEL)))
#define MOLEX_VERSIONS(NAME, PARAMETERS, ...)                                                        \
  namespace versions {                                                                               \
  MOLEX_TARGET("x86-64-v4")                                                                          \
  static MOLEX_VERSION_(NAME##_v4, PARAMETERS, 16, true, __VA_ARGS__)                                \
      MOLEX_TARGET("x86-64-v3") static MOLEX_VERSION_(NAME##_v3, PARAMETERS, 8, false, __VA_ARGS__)  \
          MOLEX_TARGET("x86-64") static MOLEX_VERSION_(NAME##_v1, PARAMETERS, 4, false, __VA_ARGS__) \
  }                                                                                                  \
  void(*const NAME) PARAMETERS = MOLEX_SUPPORTS_V4   ? versions::NAME##_v4                           \
                                 : MOLEX_SUPPORTS_V3 ? versions::NAME##_v3                           \
                                                     : versions::NAME##_v1;
#else
#if defined(__AVX512F__)
#define MOLEX_REGISTERS 16, true
#elif defined(__AVX2__)
#define MOLEX_REGISTERS 8, false
#elif defined(__aarch64__)
#define MOLEX_REGISTERS 4, true
#else
#define MOLEX_REGISTERS 4, false
#endif
#define MOLEX_ONE_VERSION_(...) MOLEX_VERSION_(__VA_ARGS__)
#define MOLEX_VERSIONS(NAME, PARAMETERS, ...)                                     \
  namespace versions {                                                            \
  static MOLEX_ONE_VERSION_(NAME##_any, PARAMETERS, MOLEX_REGISTERS, __VA_ARGS__) \
  }                                                                               \
  void(*const NAME) PARAMETERS = versions::NAME##_any;
#endif
