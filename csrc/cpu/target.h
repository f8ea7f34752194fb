// What functions are compiled for: a copy for each level of the instruction set, the machine's taken.

#pragma once

// One copy of a function for each level of the instruction set, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(MOLEX_SANITIZE)
#define MOLEX_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
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
