// The primitives of csrc/cuda/rpc_attention/wgmma.cuh for a CPU: products that four warps issue together.
//
// A product has its result when its group has been waited for, by a wait that names its accumulator, and
// until then that is NaN. It reads its operands as soon as all four warps have issued it or only when it is
// waited for, by chance, and through the descriptor, from what the threads have fenced: what was written to
// shared memory since is not there for it. A group of warps that is not complete never ends.

#pragma once

#include <initializer_list>
#include <span>

#include "cuda_on_cpu.h"

#define MOLEX_HAS_WGMMA 1
#define MOLEX_WGMMA_KERNEL(threads, blocks) MOLEX_KERNEL(threads, blocks)

namespace molex::device {

// Whether the device has these instructions, which a test may deny.
bool has_warp_groups();
template <auto Kernel>
bool has_wgmma(int) {
  return has_warp_groups();
}

struct GroupProduct {
  float* c;
  int columns;
  const uint32_t* a_registers;  // null: a stands in shared memory, too
  uint64_t a, b;
  bool is_half, b_by_rows, adds;
};

void fence_proxy();
void fence_products();
void commit_products();
void wait_products_but(int pending, std::initializer_list<std::span<const float>> named);
void wait_turn(int group);
void give_turn(int group);
void issue(const GroupProduct& product);

template <int Pending, int... N>
inline void wait_products(float (&... c)[N][4]) {
  wait_products_but(Pending, {std::span<const float>(&c[0][0], 4 * N)...});
}

template <class E, int Columns>
inline void multiply_nt(float (*c)[4], uint64_t a, uint64_t b, bool adds) {
  issue({&c[0][0], Columns, nullptr, a, b, std::is_same_v<E, Half>, false, adds});
}

template <class E, int Columns>
inline void multiply_nn(float (*c)[4], const uint32_t (&a)[4], uint64_t b, bool adds) {
  issue({&c[0][0], Columns, a, 0, b, std::is_same_v<E, Half>, true, adds});
}

}  // namespace molex::device
