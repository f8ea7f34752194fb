// The only place where kernels touch the hardware: thread indices, barriers, warp-wide matrix
// instructions, asynchronous copies, clusters and launches. Without nvcc the same names come from
// <cuda_on_cpu.h>, which runs every CUDA thread as a fiber, so that kernels are tested on a CPU.

#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

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
MOLEX_DEVICE int block() { return static_cast<int>(blockIdx.x); }

MOLEX_DEVICE void sync() { __syncthreads(); }
// The same, where some warps come from another line of the code than the others.
MOLEX_DEVICE void sync_branches() { asm volatile("barrier.sync 1, %0;" : : "r"(threads()) : "memory"); }
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

MOLEX_DEVICE float absolute(float x) { return fabsf(x); }
// The larger; of NaN and a number the number.
MOLEX_DEVICE float larger(float x, float y) { return fmaxf(x, y); }
// x y + z, rounded once.
MOLEX_DEVICE float multiply_add(float x, float y, float z) { return __fmaf_rn(x, y, z); }
// x, at least 0, with the sign of y.
MOLEX_DEVICE float with_sign(float x, float y) {
  return __uint_as_float(__float_as_uint(x) | (__float_as_uint(y) & 0x80000000u));
}
// The bits behind the first one of `word`, and behind them the sign of x.
MOLEX_DEVICE uint32_t append_sign(uint32_t word, float x) {
  return __funnelshift_l(__float_as_uint(x), word, 1);
}
// x * y, rounded before anything is added to it.
MOLEX_DEVICE float multiply(float x, float y) { return __fmul_rn(x, y); }

MOLEX_DEVICE float infinity() { return __int_as_float(0x7f800000); }

MOLEX_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

// Returns x, which all lanes of the warp have to share, so that the compiler knows that they do: it is kept,
// and computed with, once for the warp. As with `opaque`, that is not done ahead of a loop.
MOLEX_DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
MOLEX_DEVICE uint32_t uniform(uint32_t x) { return __shfl_sync(0xffffffffu, x, 0); }

MOLEX_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Returns x, hidden from the compiler, so that it computes nothing with it ahead of a loop: addresses that
// are computed again take time, but addresses that are kept take registers.
MOLEX_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
MOLEX_DEVICE uint32_t opaque(uint32_t x) {
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
// The same, or 16 bytes of 0 and nothing is read.
MOLEX_DEVICE void copy_async_or_zero(void* to, const void* from, bool reads) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from),
               "r"(reads ? 16 : 0)
               : "memory");
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

// Says that this block has come so far, but not that what it has written is there to see.
MOLEX_DEVICE void arrive_cluster_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

// The place of `mine` in the shared memory of block `rank` of the cluster, and a store of 16 bytes to it.
using Remote = uint32_t;
MOLEX_DEVICE Remote remote(void* mine, int rank) {
  Remote address = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(mine)), "r"(rank));
#endif
  return address;
}
MOLEX_DEVICE void store_remote(Remote to, int bytes, uint4 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to + bytes),
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

// Lets the kernel's blocks have as much shared memory as the device gives, once for each device: a limit that
// followed the launches could fall between another thread's limit and its launch.
template <auto Kernel>
Status allow_shared_memory() {
  static std::atomic<uint64_t> allowed = 0;  // a bit for a device; those above 63 are asked every time
  int device = 0, limit = 0;
  Status status = cudaGetDevice(&device);
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (status != cudaSuccess || allowed.load() & bit) return status;
  status = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  status = cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (status == cudaSuccess) allowed |= bit;
  return status;
}

struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute cluster = {};

  Launch(const Grid& grid, Stream stream) {
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(grid.threads);
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = stream;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = grid.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = grid.cluster > 1;
  }
  Launch(const Launch&) = delete;  // it points into itself
};

// Whether the device has room for the grid's clusters: a part of one may have too few multiprocessors.
template <auto Kernel>
bool clusters_fit(const Grid& grid) {
  if (grid.cluster == 1) return true;
  int clusters = 0;
  const Launch launch(grid, nullptr);
  Status status = allow_shared_memory<Kernel>();
  if (status == cudaSuccess) status = cudaOccupancyMaxActiveClusters(&clusters, Kernel, &launch.config);
  if (status != cudaSuccess) cudaGetLastError();  // or a later launch would seem to have failed
  return clusters > 0;
}

// Enqueues the kernel. Nothing waits for it, and a stream that is being captured records it.
template <auto Kernel, class Params>
Status launch(const Grid& grid, const Params& params, Stream stream) {
  if (grid.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  constexpr int kWithoutAsking = 48 * 1024;
  if (grid.shared_bytes > kWithoutAsking) {
    const Status status = allow_shared_memory<Kernel>();
    if (status != cudaSuccess) return status;
  }
  const Launch launch(grid, stream);
  return cudaLaunchKernelEx(&launch.config, Kernel, params);
}

}  // namespace molex::device

#endif
