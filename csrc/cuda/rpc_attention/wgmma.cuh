// Matrix products by a warp group, four warps side by side: wgmma of sm_90a, with fp32 accumulators.
//
// A product has 64 rows, of which each warp has 16, in the accumulator's layout of fragments.cuh. b is in
// shared memory, a there or in registers. Shared memory is read through the asynchronous proxy: what threads
// have written is to be fenced by them with `fence_proxy`, and then to be waited for by a barrier. A product
// is done, and its accumulator may be touched, when the group of products that `commit_products` has closed
// has been waited for. Without nvcc the same names come from <wgmma_on_cpu.h>.

#pragma once

#include "cuda/rpc_attention/device.cuh"

namespace molex::device {

// Where a matrix of 16-bit elements stands in shared memory, as the instruction wants it told: core matrices
// of 8 rows of 16 bytes, one row behind the other, 128 bytes each, without a swizzle (PTX ISA, "Matrix
// Descriptor Format").
using Matrix = uint64_t;

// `along_k` bytes from a core matrix to the next one in the direction that is summed over, `across` in the
// other one; all are multiples of 16.
MOLEX_DEVICE Matrix matrix(uint32_t address, int along_k, int across) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(along_k >> 4) << 16 |
         static_cast<uint64_t>(across >> 4) << 32;
}
// The same, so many bytes further. Of the two words only the lower one changes: the other is a constant.
MOLEX_DEVICE Matrix moved(Matrix m, int bytes) {
  return (m & ~uint64_t{0xffffffffu}) | (static_cast<uint32_t>(m) + static_cast<uint32_t>(bytes >> 4));
}

}  // namespace molex::device

#ifndef __CUDACC__
#include <wgmma_on_cpu.h>
#else

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define MOLEX_HAS_WGMMA 1
#define MOLEX_WGMMA_KERNEL(threads, blocks) MOLEX_KERNEL(threads, blocks)
#else
#define MOLEX_HAS_WGMMA 0
// For other chips the kernel is empty. A block of one warp at most makes its launch an error.
#define MOLEX_WGMMA_KERNEL(threads, blocks) MOLEX_KERNEL(32, 1)
#endif

namespace molex::device {

// Whether what is loaded for the current device is more than the empty kernel; asked once for each device.
template <auto Kernel>
bool has_wgmma(int threads) {
  static std::atomic<uint64_t> asked = 0,
                               found = 0;  // a bit for a device; those above 63 are asked every time
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (asked.load() & bit) return found.load() & bit;
  cudaFuncAttributes attributes = {};
  const bool has = cudaFuncGetAttributes(&attributes, Kernel) == cudaSuccess;
  if (!has) cudaGetLastError();  // or a later launch would seem to have failed
  if (!has || attributes.maxThreadsPerBlock < threads) {
    asked |= bit;
    return false;
  }
  found |= bit;
  asked |= bit;
  return true;
}

#if MOLEX_HAS_WGMMA

// Makes what this thread has written to shared memory, its block's or another's of the cluster, visible to
// products that follow a barrier.
MOLEX_DEVICE void fence_proxy() { asm volatile("fence.proxy.async.shared::cluster;" ::: "memory"); }
// Comes before products whose registers other instructions have written.
MOLEX_DEVICE void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MOLEX_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Two warp groups of a block take turns at something: each waits for its own, which the other gives it.
MOLEX_DEVICE void wait_turn(int group) {
  asm volatile("bar.sync %0, %1;" : : "r"(2 + group), "r"(threads()) : "memory");
}
MOLEX_DEVICE void give_turn(int group) {
  asm volatile("bar.arrive %0, %1;" : : "r"(2 + group), "r"(threads()) : "memory");
}

// Waits for all groups but the last `Pending`, of which the accumulators c were.
template <int Pending, int... N>
MOLEX_DEVICE void wait_products(float (&... c)[N][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
  // Or the compiler would read them ahead of the wait.
  const auto keep = [](float (*numbers)[4], int count) {
    MOLEX_UNROLL for (int n = 0; n < count; ++n) {
      MOLEX_UNROLL for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(numbers[n][e])::"memory");
    }
  };
  (keep(c, N), ...);
}

// Operands of one instruction: the accumulator's numbers, 4 for each 8 columns, and what they stand for.
#define MOLEX_NUMBERS_2 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MOLEX_NUMBERS_4 MOLEX_NUMBERS_2 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MOLEX_NUMBERS_8 \
  MOLEX_NUMBERS_4       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MOLEX_NUMBERS_13 \
  MOLEX_NUMBERS_8        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51"
#define MOLEX_NUMBERS_16 MOLEX_NUMBERS_13 ", %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MOLEX_TILES_1(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define MOLEX_TILES_2(n) MOLEX_TILES_1(n), MOLEX_TILES_1(n + 1)
#define MOLEX_TILES_4(n) MOLEX_TILES_2(n), MOLEX_TILES_2(n + 2)
#define MOLEX_TILES_8(n) MOLEX_TILES_4(n), MOLEX_TILES_4(n + 4)
#define MOLEX_TILES_13(n) MOLEX_TILES_8(n), MOLEX_TILES_4(n + 8), MOLEX_TILES_1(n + 12)
#define MOLEX_TILES_16(n) MOLEX_TILES_8(n), MOLEX_TILES_8(n + 8)

// `type` is that of both operands, `rest` the numbers of what follows the accumulator, `adds` that of
// whether the accumulator counts.
#define MOLEX_WGMMA(columns, type, tiles, rest, adds, ...)                                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " adds ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns \
               "k16.f32." type "." type " {" MOLEX_NUMBERS_##tiles "}, " rest ";\n}"                       \
               : MOLEX_TILES_##tiles(0)                                                                    \
               : __VA_ARGS__)
#define MOLEX_WGMMA_OF_TYPE(columns, tiles, rest, adds, ...)      \
  if constexpr (std::is_same_v<E, Half>) {                        \
    MOLEX_WGMMA(columns, "f16", tiles, rest, adds, __VA_ARGS__);  \
  } else {                                                        \
    MOLEX_WGMMA(columns, "bf16", tiles, rest, adds, __VA_ARGS__); \
  }

// c = a b^T, or c += a b^T: 64 rows and 16 columns of a, `Columns` rows and 16 columns of b.
template <class E, int Columns>
MOLEX_DEVICE void multiply_nt(float (*c)[4], Matrix a, Matrix b, bool adds) {
  static_assert(Columns == 16 || Columns == 64 || Columns == 104 || Columns == 128);
#define MOLEX_OPERANDS "l"(a), "l"(b), "r"(static_cast<int>(adds))
  if constexpr (Columns == 16) {
    MOLEX_WGMMA_OF_TYPE(16, 2, "%8, %9, p, 1, 1, 0, 0", "%10", MOLEX_OPERANDS)
  } else if constexpr (Columns == 64) {
    MOLEX_WGMMA_OF_TYPE(64, 8, "%32, %33, p, 1, 1, 0, 0", "%34", MOLEX_OPERANDS)
  } else if constexpr (Columns == 104) {
    MOLEX_WGMMA_OF_TYPE(104, 13, "%52, %53, p, 1, 1, 0, 0", "%54", MOLEX_OPERANDS)
  } else {
    MOLEX_WGMMA_OF_TYPE(128, 16, "%64, %65, p, 1, 1, 0, 0", "%66", MOLEX_OPERANDS)
  }
#undef MOLEX_OPERANDS
}

// c = a b, or c += a b: a as the operand of a 16x16 tile in fragments.cuh, 16 rows and `Columns` columns of
// b.
template <class E, int Columns>
MOLEX_DEVICE void multiply_nn(float (*c)[4], const uint32_t (&a)[4], Matrix b, bool adds) {
  static_assert(Columns == 16 || Columns == 32 || Columns == 64);
#define MOLEX_OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds))
  if constexpr (Columns == 16) {
    MOLEX_WGMMA_OF_TYPE(16, 2, "{%8, %9, %10, %11}, %12, p, 1, 1, 1", "%13", MOLEX_OPERANDS)
  } else if constexpr (Columns == 32) {
    MOLEX_WGMMA_OF_TYPE(32, 4, "{%16, %17, %18, %19}, %20, p, 1, 1, 1", "%21", MOLEX_OPERANDS)
  } else {
    MOLEX_WGMMA_OF_TYPE(64, 8, "{%32, %33, %34, %35}, %36, p, 1, 1, 1", "%37", MOLEX_OPERANDS)
  }
#undef MOLEX_OPERANDS
}

#endif  // MOLEX_HAS_WGMMA

}  // namespace molex::device

#endif
