// The fibers behind cuda_on_cpu.h and what they wait for: of machine.cpp and warp_groups.cpp alone.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "cuda_on_cpu.h"
#include "machine.h"
#include "wgmma_on_cpu.h"

namespace molex::device {

constexpr int kLanes = 32;
constexpr size_t kStack = 64 * 1024;
constexpr int kSharedLimit = 228 * 1024;
constexpr int kGroupThreads = 4 * kLanes;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;  // null for zeros
};

struct Block;

// A product that four warps issue together, by thread.
struct IssuedProduct {
  GroupProduct by[kGroupThreads];
  int threads = 0;  // that have issued it
};
struct WarpGroup {
  std::deque<IssuedProduct> products;
  size_t done = 0;
};

struct Warp {
  Block* block = nullptr;
  int index = 0;
  uint32_t ready = 0;          // lanes that can run
  uint32_t arrived = 0;        // lanes at a warp-wide instruction
  const void* kind = nullptr;  // which one
  void* operands[kLanes];
};

// Those by a warp group that a thread takes part in.
struct Products {
  int issued = 0;
  std::vector<int> committed;                 // of those issued, by group of products
  std::map<float*, std::vector<float>> sums;  // of accumulators that are not there yet
  bool fenced = false;                        // nothing has touched the registers since
};

struct Fiber {
  Warp* warp = nullptr;
  int lane = 0;
  bool done = false;
  int barriers[kKinds];   // passed so far, for leaving one out
  bool left_out = false;  // whether this half of a cluster barrier's is
  int awaited = 0;        // phase of the cluster barrier that it has arrived at
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
  Products products;
  jmp_buf context;
  ucontext_t start;
  std::unique_ptr<char[]> stack;
};

struct Block {
  int64_t index = 0;
  int threads = 0;
  int waiting = 0, phase = 0;  // of the block's barrier
  struct {
    int arrived = 0, phase = 0;
  } turns[2];  // of those of its warp groups
  bool started = false;
  char* shared = nullptr;
  int shared_bytes = 0;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  std::vector<char> fenced;  // shared memory as products see it
  std::vector<WarpGroup> groups;
};

struct Machine {
  Options options;
  uint64_t random = 1;
  std::vector<Block> blocks;
  std::vector<char*> memories;
  int cluster_arrived = 0, cluster_phase = 0, cluster_threads = 0;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  void (*kernel)(const void*) = nullptr;
  const void* params = nullptr;
  int most_barriers[kKinds] = {};
  bool clusters = true, warp_groups = true;

  uint32_t draw(uint32_t below) {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return static_cast<uint32_t>((random >> 32) * below >> 32);
  }
};

extern Machine machine;

inline Fiber& self() { return *machine.current; }

inline void yield() {
  if (!_setjmp(self().context)) _longjmp(machine.scheduler, 1);
}

// Takes this fiber off its warp's ready lanes until somebody puts it back.
inline void block_until_woken() {
  Fiber& fiber = self();
  fiber.warp->ready &= ~(1u << fiber.lane);
  yield();
}

inline void wake(Fiber& fiber) { fiber.warp->ready |= 1u << fiber.lane; }

// Whether this barrier is the one that a test leaves out.
inline bool leaves_out(Kind kind) {
  const int number = self().barriers[kind]++;
  machine.most_barriers[kind] = std::max(machine.most_barriers[kind], number + 1);
  return kind == machine.options.left_out_kind && number == machine.options.left_out_barrier;
}

inline float half_of(uint16_t bits) { return to_float(Half{bits}); }
inline float bfloat_of(uint16_t bits) { return to_float(BFloat{bits}); }

// c + sum of `count` products as tensor cores are known to form it (Fasi et al. 2021, the A100): exact
// products, every term cut off one bit behind the last of the largest one's fp32, their sum cut to fp32.
// Nothing is rounded, so that a long sum in an accumulator drifts towards zero.
inline float cut_sum(float c, const double* products, int count) {
  double top = std::fabs(c), plain = c;
  for (int i = 0; i < count; ++i) {
    top = std::fmax(top, std::fabs(products[i]));
    plain += products[i];
  }
  if (top == 0.0 || !std::isfinite(plain)) return static_cast<float>(plain);
  const uint64_t exponent = std::bit_cast<uint64_t>(top) >> 52;
  const double per_unit = std::bit_cast<double>((2 * 1023 + 24 - exponent) << 52);
  int64_t units = static_cast<int64_t>(c * per_unit);
  for (int i = 0; i < count; ++i) units += static_cast<int64_t>(products[i] * per_unit);
  const double sum = static_cast<double>(units) / per_unit;
  constexpr uint64_t kBehindFloat = (uint64_t{1} << 29) - 1;
  return static_cast<float>(std::bit_cast<double>(std::bit_cast<uint64_t>(sum) & ~kBehindFloat));
}

}  // namespace molex::device
