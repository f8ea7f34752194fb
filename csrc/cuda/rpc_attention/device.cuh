// The only place where kernels touch the hardware: thread indices, barriers, warp-wide matrix
// instructions, asynchronous copies, clusters and launches. Without nvcc the same names come from
// <cuda_on_cpu.h>, which runs every CUDA thread as a fiber, so that kernels are tested on a CPU.

#pragma once

#include <cstdint>

#ifndef __CUDACC__
#include <cuda_on_cpu.h>
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define MOLEX_DEVICE __device__ __forceinline__
#define MOLEX_HOST_DEVICE __host__ __device__ __forceinline__
// `blocks` of `threads` threads have to fit on a multiprocessor, which bounds the registers.
#define MOLEX_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)
#define MOLEX_PARAMS const __grid_constant__
#define MOLEX_UNROLL _Pragma("unroll")
#define MOLEX_PRAGMA(text) _Pragma(#text)
#define MOLEX_UNROLL_BY(times) MOLEX_PRAGMA(unroll(times))
#define MOLEX_NO_UNROLL MOLEX_UNROLL_BY(1)

namespace molex::device {

using Half = __half;
using BFloat = __nv_bfloat16;
using Stream = cudaStream_t;
using Status = cudaError_t;
constexpr Status kSuccess = cudaSuccess;

MOLEX_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
MOLEX_DEVICE int threads() { return static_cast<int>(blockDim.x); }
MOLEX_DEVICE int64_t block() { return blockIdx.x; }

MOLEX_DEVICE void sync() { __syncthreads(); }
MOLEX_DEVICE void sync_warp() { __syncwarp(); }

// The block's dynamic shared memory, 16-byte aligned.
MOLEX_DEVICE char* shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

MOLEX_DEVICE float to_float(Half x) { return __half2float(x); }
MOLEX_DEVICE float to_float(BFloat x) { return __bfloat162float(x); }
MOLEX_DEVICE float to_float(float x) { return x; }

template <class E>
MOLEX_DEVICE E from_float(float x) {
  if constexpr (sizeof(E) == 4) {
    return x;
  } else if constexpr (std::is_same_v<E, Half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Two values side by side, `low` at the lower address.
template <class E>
MOLEX_DEVICE uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<E, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

MOLEX_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x * y, rounded before anything is added to it.
MOLEX_DEVICE float multiply(float x, float y) { return __fmul_rn(x, y); }

MOLEX_DEVICE float infinity() { return __int_as_float(0x7f800000); }

MOLEX_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

MOLEX_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Returns x, hidden from the compiler, so that it computes nothing with it ahead of a loop: addresses that
// are computed again take time, but addresses that are kept take registers.
MOLEX_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
MOLEX_DEVICE int64_t opaque(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

// Four 8x8 matrices of 16-bit elements; lane i names the row i % 8 of the matrix i / 8.
MOLEX_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

MOLEX_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b for 16x16 times 16x8, fp32 accumulators.
template <class E>
MOLEX_DEVICE void mma_16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<E, Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// c += a b for 16x8 times 8x8 in TF32, fp32 accumulators.
MOLEX_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// x rounded to the 11 significant bits of TF32, as an fp32 pattern.
MOLEX_DEVICE uint32_t to_tf32(float x) {
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(x));
  return word;
}
MOLEX_DEVICE float as_float(uint32_t word) { return __uint_as_float(word); }

// 16 bytes from global to shared memory, both aligned to 16; visible to the issuing thread after
// `wait_copies`, to the block after a barrier that follows it.
MOLEX_DEVICE void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
MOLEX_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
MOLEX_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// A barrier of all blocks of a cluster in two halves. Before sm_90 a cluster is one block.
MOLEX_DEVICE void arrive_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
MOLEX_DEVICE void wait_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// Stores 16 bytes at the place of `mine` in the shared memory of block `rank` of the cluster.
MOLEX_DEVICE void store_remote(void* mine, int rank, uint4 value) {
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(mine)), "r"(rank));
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(value.x),
               "r"(value.y),
               "r"(value.z),
               "r"(value.w)
               : "memory");
#endif
}

struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes = 0;
  int cluster = 1;
};

// Enqueues the kernel. Nothing waits for it, and a stream that is being captured records it.
template <class Params>
Status launch(void (*kernel)(const Params), const Grid& grid, const Params& params, Stream stream) {
  if (grid.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  constexpr int kWithoutAsking = 48 * 1024;
  if (grid.shared_bytes > kWithoutAsking) {
    const Status status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = grid.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = grid.cluster > 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace molex::device

#endif
