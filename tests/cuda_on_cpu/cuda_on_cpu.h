// The primitives of csrc/cuda/rpc_attention/device.cuh for a CPU: every CUDA thread is a fiber.
//
// A scheduler runs the fibers of a cluster of blocks one at a time, in an order drawn from a seed: it
// picks a warp and stays with it until all its lanes wait, so that warps are as far apart as barriers
// allow. Warp-wide instructions wait for the 32 lanes and are computed from their documented register
// layouts, with the accuracy that tensor cores and ex2.approx have. Shared memory starts as NaN, at the
// start of its block, and ends at a guard page. A block of a cluster may start late. An asynchronous copy
// takes place when it is issued or when it is waited for, by chance. A missing barrier or an unwritten read
// is therefore a wrong number.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#define MOLEX_DEVICE inline
#define MOLEX_HOST_DEVICE inline
#define MOLEX_KERNEL(threads, blocks) inline
#define MOLEX_PARAMS const
#define MOLEX_UNROLL
#define MOLEX_UNROLL_BY(times)
#define MOLEX_NO_UNROLL

struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};

namespace molex::device {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
struct Stream {};
using Status = int;
constexpr Status kSuccess = 0;

int thread();
int threads();
int block();
char* shared();
uint32_t shared_address(const void* pointer);  // in the block's shared memory

void sync();
inline void sync_branches() { sync(); }
void sync_warp();
void arrive_cluster();
void wait_cluster();
inline void arrive_cluster_relaxed() { arrive_cluster(); }
using Remote = char*;
Remote remote(void* mine, int rank);
void store_remote(Remote to, int bytes, uint4 value);

void copy_async_or_zero(void* to, const void* from, bool reads);
inline void copy_async(void* to, const void* from) { copy_async_or_zero(to, from, true); }
void commit_copies();
void wait_copies_but(int pending);
template <int Pending>
inline void wait_copies() {
  wait_copies_but(Pending);
}

float shuffle_xor(float x, int lanes);
int uniform(int x);
inline uint32_t uniform(uint32_t x) { return static_cast<uint32_t>(uniform(static_cast<int>(x))); }
void load_matrices(uint32_t (&r)[4], const void* row);
void load_matrices_transposed(uint32_t (&r)[4], const void* row);
void multiply_half(float* c, const uint32_t* a, const uint32_t* b);
void multiply_bfloat(float* c, const uint32_t* a, const uint32_t* b);
void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

inline float as_float(uint32_t word) { return std::bit_cast<float>(word); }
inline float to_float(float x) { return x; }
inline float to_float(Half x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }
inline float to_float(BFloat x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

template <class E>
inline E from_float(float x) {
  if constexpr (std::is_same_v<E, Half>) {
    return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
  } else if constexpr (std::is_same_v<E, BFloat>) {
    if (x != x) return {0x7fff};
    const uint32_t word = std::bit_cast<uint32_t>(x);
    return {static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
  } else {
    return x;
  }
}

template <class E>
inline uint32_t pack(float low, float high) {
  return from_float<E>(low).bits | static_cast<uint32_t>(from_float<E>(high).bits) << 16;
}

template <class E>
inline void mma_16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<E, Half>) {
    multiply_half(c, a, b);
  } else {
    multiply_bfloat(c, a, b);
  }
}

// To the nearest of 11 significant bits, halves away from zero.
inline uint32_t to_tf32(float x) {
  const uint32_t word = std::bit_cast<uint32_t>(x);
  return std::isfinite(x) ? (word + 0x1000) & 0xffffe000u : word;
}

inline int opaque(int x) { return x; }
inline uint32_t opaque(uint32_t x) { return x; }
inline int64_t opaque(int64_t x) { return x; }

// ex2.approx.ftz: exact for integers, elsewhere off by up to 2^-22.5 of the result, here by a hash of x.
inline float exp2(float x) {
  const float y = std::exp2(x);
  if (x == std::floor(x) || x != x) return y;
  const uint32_t mixed = (std::bit_cast<uint32_t>(x) ^ 0x5bd1e995u) * 0x9E3779B1u;
  const float off = static_cast<float>(static_cast<int32_t>(mixed ^ mixed << 13)) * 0x1p-31f * 1.7e-7f;
  const float result = y + y * off;
  return result < 0x1p-126f ? 0.0f : result;
}
inline float multiply(float x, float y) {
  float product = x * y;
  asm("" : "+m"(product));  // or the compiler adds to it before it rounds
  return product;
}
inline float multiply_add(float x, float y, float z) { return std::fma(x, y, z); }
inline float absolute(float x) { return std::fabs(x); }
inline float larger(float x, float y) { return std::fmax(x, y); }
inline float with_sign(float x, float y) {
  return as_float(std::bit_cast<uint32_t>(x) | (std::bit_cast<uint32_t>(y) & 0x80000000u));
}
inline uint32_t append_sign(uint32_t word, float x) { return word << 1 | std::bit_cast<uint32_t>(x) >> 31; }
inline float infinity() { return std::numeric_limits<float>::infinity(); }

struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes = 0;
  int cluster = 1;
};

Status run(void (*kernel)(const void*), const void* params, const Grid& grid);

// Whether there is room for the grid's clusters, which a test may deny.
bool has_clusters();
template <auto Kernel>
bool clusters_fit(const Grid& grid) {
  return grid.cluster == 1 || has_clusters();
}

template <auto Kernel, class Params>
Status launch(const Grid& grid, const Params& params, Stream) {
  struct Call {
    void (*kernel)(const Params);
    const Params& params;
  } call{Kernel, params};
  return run(
      [](const void* pointer) {
        const Call& c = *static_cast<const Call*>(pointer);
        c.kernel(c.params);
      },
      &call,
      grid);
}

}  // namespace molex::device
