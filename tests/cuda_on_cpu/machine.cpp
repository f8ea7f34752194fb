// The machine behind cuda_on_cpu.h: fibers, barriers, shared memory, warp-wide instructions.

#include "machine.h"

#include <sys/mman.h>

#include <cstring>
#include <utility>

#include "fibers.h"

namespace molex::device {

Machine machine;

namespace {

// Memory that ends where a page begins that nobody may touch.
char* guarded_memory() {
  const size_t page = 4096;
  char* memory = static_cast<char*>(
      mmap(nullptr, kSharedLimit + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED || mprotect(memory + kSharedLimit, page, PROT_NONE)) fail("no memory");
  return memory;
}

// The last of the 32 lanes computes for all of them.
template <class Operands, class Compute>
void together(Operands& mine, const Compute& compute) {
  static const char kind = 0;
  Fiber& fiber = self();
  Warp& warp = *fiber.warp;
  if (warp.arrived && warp.kind != &kind) fail("the lanes of a warp are at different instructions");
  warp.kind = &kind;
  warp.operands[fiber.lane] = &mine;
  warp.arrived |= 1u << fiber.lane;
  if (warp.arrived != ~0u) return block_until_woken();
  Operands* all[kLanes];
  for (int i = 0; i < kLanes; ++i) all[i] = static_cast<Operands*>(warp.operands[i]);
  compute(all);
  warp.arrived = 0;
  warp.ready = ~0u;
}

void enter() {
  machine.kernel(machine.params);
  Fiber& fiber = self();
  fiber.done = true;
  fiber.warp->ready &= ~(1u << fiber.lane);
  _longjmp(machine.scheduler, 1);
}

void resume(Fiber& fiber, bool fresh) {
  machine.current = &fiber;
  if (_setjmp(machine.scheduler)) return;
  if (fresh) {
    setcontext(&fiber.start);
  } else {
    _longjmp(fiber.context, 1);
  }
}

void set_up(Block& block, int64_t index, int rank, const Grid& grid) {
  block.index = index;
  block.threads = grid.threads;
  block.waiting = block.phase = 0;
  for (auto& turn : block.turns) turn = {};
  while (static_cast<int>(machine.memories.size()) <= rank) machine.memories.push_back(guarded_memory());
  block.shared_bytes = (grid.shared_bytes + 15) / 16 * 16;
  block.shared = machine.memories[rank] + kSharedLimit - block.shared_bytes;
  block.started = false;
  block.warps.assign(grid.threads / kLanes, Warp{});
  block.groups.assign(grid.threads / kGroupThreads, WarpGroup{});
  block.fibers.resize(grid.threads);
  for (int i = 0; i < grid.threads; ++i) {
    Fiber& fiber = block.fibers[i];
    Warp& warp = block.warps[i / kLanes];
    warp.block = &block;
    warp.index = i / kLanes;
    warp.ready = ~0u;
    fiber.warp = &warp;
    fiber.lane = i % kLanes;
    fiber.done = fiber.left_out = false;
    fiber.awaited = 0;
    std::fill_n(fiber.barriers, int{kKinds}, 0);
    fiber.groups.clear();
    fiber.open.clear();
    fiber.products = {};
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStack);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
  }
}

void run_cluster(int64_t first, const Grid& grid) {
  machine.blocks.resize(grid.cluster);
  machine.cluster_arrived = machine.cluster_phase = 0;
  machine.cluster_threads = grid.cluster * grid.threads;
  std::vector<Warp*> warps;
  std::vector<uint32_t> fresh;
  for (int rank = 0; rank < grid.cluster; ++rank) {
    set_up(machine.blocks[rank], first + rank, rank, grid);
    for (Warp& warp : machine.blocks[rank].warps) warps.push_back(&warp);
  }
  fresh.assign(warps.size(), ~0u);
  // One block, or none, starts when the others can do no more.
  Block* late =
      machine.draw(2) ? &machine.blocks[machine.draw(static_cast<uint32_t>(grid.cluster))] : nullptr;
  for (;;) {
    std::vector<size_t> runnable;
    for (size_t i = 0; i < warps.size(); ++i) {
      if (warps[i]->ready && warps[i]->block != late) runnable.push_back(i);
    }
    if (runnable.empty()) {
      if (!std::exchange(late, nullptr)) break;
      continue;
    }
    const size_t chosen = runnable[machine.draw(static_cast<uint32_t>(runnable.size()))];
    Warp& warp = *warps[chosen];
    if (!warp.block->started) {
      // NaN in every floating type, whatever another block has written before.
      std::memset(warp.block->shared, 0xff, warp.block->shared_bytes);
      warp.block->fenced.assign(warp.block->shared_bytes, static_cast<char>(0xff));
      warp.block->started = true;
    }
    while (warp.ready) {
      const int rotation = static_cast<int>(machine.draw(kLanes));
      const int lane = (std::countr_zero(std::rotr(warp.ready, rotation)) + rotation) % kLanes;
      const bool is_fresh = fresh[chosen] >> lane & 1;
      fresh[chosen] &= ~(1u << lane);
      resume(warp.block->fibers[warp.index * kLanes + lane], is_fresh);
    }
  }
  for (Block& block : machine.blocks) {
    for (Fiber& fiber : block.fibers) {
      if (!fiber.done) fail("a barrier that not all threads reach");
    }
  }
}

// a b of 16 x Depth times Depth x 8, added to the lanes' accumulators `Together` products at a time.
template <int Depth, int Together, class Lanes>
void accumulate(Lanes** lanes, const float (&a)[16][Depth], const float (&b)[8][Depth]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const float* a_row = a[lane / 4 + i / 2 * 8];
      const float* b_row = b[lane % 4 * 2 + i % 2];
      double products[Depth];
      for (int k = 0; k < Depth; ++k) products[k] = static_cast<double>(a_row[k]) * b_row[k];
      float& c = lanes[lane]->c[i];
      for (int k = 0; k < Depth; k += Together) c = cut_sum(c, products + k, Together);
    }
  }
}

struct Product {
  float* c;
  const uint32_t *a, *b;
};

// Lane 4 g + t holds, of a [16 x 16]: rows g and g + 8, columns 2 t, 2 t + 1 and those + 8; of
// b [16 x 8]: column g, the same k; of c [16 x 8]: rows g and g + 8, columns 2 t and 2 t + 1.
template <float (*Convert)(uint16_t)>
void multiply_16(Product** lanes) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = lanes[lane]->a[i];
      float* place = &a[g + i % 2 * 8][2 * t + i / 2 * 8];
      place[0] = Convert(static_cast<uint16_t>(word));
      place[1] = Convert(static_cast<uint16_t>(word >> 16));
    }
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = lanes[lane]->b[i];
      b[g][2 * t + i * 8] = Convert(static_cast<uint16_t>(word));
      b[g][2 * t + i * 8 + 1] = Convert(static_cast<uint16_t>(word >> 16));
    }
  }
  accumulate<16, 8>(lanes, a, b);
}

struct Rows {
  const void* row;
  uint32_t* r;
};

template <bool Transposed>
void read_matrices(Rows** lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t x[8][8];
    for (int i = 0; i < 8; ++i) {
      const void* row = lanes[8 * matrix + i]->row;
      if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: a row is not aligned to 16 bytes");
      std::memcpy(x[i], row, sizeof x[i]);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint16_t low = Transposed ? x[t][g] : x[g][t], high = Transposed ? x[t + 1][g] : x[g][t + 1];
      lanes[lane]->r[matrix] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

void perform(const Copy& copy) {
  if (copy.from) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

}  // namespace

void set_options(const Options& options) {
  machine.options = options;
  machine.random = options.seed * 0x9E3779B97F4A7C15u + 1;
  std::fill_n(machine.most_barriers, int{kKinds}, 0);
}
void set_clusters(bool fit) { machine.clusters = fit; }
bool has_clusters() { return machine.clusters; }
void set_warp_groups(bool exist) { machine.warp_groups = exist; }
bool has_warp_groups() { return machine.warp_groups; }
int most_barriers(int kind) { return machine.most_barriers[kind]; }

int thread() { return self().warp->index * kLanes + self().lane; }
int threads() { return self().warp->block->threads; }
int block() { return static_cast<int>(self().warp->block->index); }
char* shared() { return self().warp->block->shared; }
uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - shared());
}

void sync() {
  if (leaves_out(kBlock)) return;
  Block& block = *self().warp->block;
  if (++block.waiting < block.threads) {
    const int now = block.phase;
    while (block.phase == now) block_until_woken();
    return;
  }
  block.waiting = 0;
  ++block.phase;
  for (Fiber& fiber : block.fibers) wake(fiber);
}

void sync_warp() {
  if (leaves_out(kWarpLanes)) return;
  struct Nothing {
  } nothing;
  together(nothing, [](Nothing**) {});
}

void arrive_cluster() {
  Fiber& fiber = self();
  fiber.left_out = leaves_out(kBlock);
  if (fiber.left_out) return;
  fiber.awaited = machine.cluster_phase + 1;
  if (++machine.cluster_arrived < machine.cluster_threads) return;
  machine.cluster_arrived = 0;
  ++machine.cluster_phase;
  for (Block& block : machine.blocks) {
    for (Fiber& other : block.fibers) {
      // Lanes at a warp-wide instruction wait for their warp, not for this.
      if (!other.done && !(other.warp->arrived >> other.lane & 1)) wake(other);
    }
  }
}

void wait_cluster() {
  Fiber& fiber = self();
  if (fiber.left_out) return;
  while (machine.cluster_phase < fiber.awaited) block_until_woken();
}

Remote remote(void* mine, int rank) {
  if (rank < 0 || rank >= static_cast<int>(machine.blocks.size())) fail("no such block in the cluster");
  return machine.blocks[rank].shared + (static_cast<char*>(mine) - shared());
}

void store_remote(Remote to, int bytes, uint4 value) {
  to += bytes;
  const Block& block = *std::find_if(machine.blocks.begin(), machine.blocks.end(), [&](const Block& b) {
    return to >= b.shared && to < b.shared + b.shared_bytes;
  });
  if (block.started &&
      std::all_of(block.fibers.begin(), block.fibers.end(), [](const Fiber& f) { return f.done; })) {
    if (machine.options.left_out_barrier >= 0) return;
    fail("a store to the shared memory of a block that has ended");
  }
  if (reinterpret_cast<uintptr_t>(to) % 16) fail("a remote store is not aligned to 16 bytes");
  std::memcpy(to, &value, sizeof value);
}

void copy_async_or_zero(void* to, const void* from, bool reads) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) {
    fail("cp.async: not aligned to 16 bytes");
  }
  const Copy copy{to, reads ? from : nullptr};
  // The hardware may be quick or slow.
  if (machine.draw(2)) {
    perform(copy);
  } else {
    self().open.push_back(copy);
  }
}

void commit_copies() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

void wait_copies_but(int pending) {
  if (leaves_out(kCopies)) return;
  auto& groups = self().groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) perform(copy);
    groups.erase(groups.begin());
  }
}

float shuffle_xor(float x, int lanes) {
  struct Operands {
    float value;
    int lanes;
  } mine{x, lanes};
  together(mine, [](Operands** all) {
    float values[kLanes];
    for (int i = 0; i < kLanes; ++i) values[i] = all[i]->value;
    for (int i = 0; i < kLanes; ++i) all[i]->value = values[i ^ all[i]->lanes];
  });
  return mine.value;
}

int uniform(int x) {
  together(x, [](int** all) {
    for (int i = 1; i < kLanes; ++i) {
      if (*all[i] != *all[0]) fail("uniform: the lanes of a warp differ");
    }
  });
  return x;
}

void load_matrices(uint32_t (&r)[4], const void* row) {
  Rows mine{row, r};
  together(mine, [](Rows** all) { read_matrices<false>(all); });
}

void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  Rows mine{row, r};
  together(mine, [](Rows** all) { read_matrices<true>(all); });
}

void multiply_half(float* c, const uint32_t* a, const uint32_t* b) {
  Product mine{c, a, b};
  together(mine, [](Product** all) { multiply_16<half_of>(all); });
}

void multiply_bfloat(float* c, const uint32_t* a, const uint32_t* b) {
  Product mine{c, a, b};
  together(mine, [](Product** all) { multiply_16<bfloat_of>(all); });
}

// Lane 4 g + t holds, of a [16 x 8]: rows g and g + 8, columns t and t + 4; of b [8 x 8]: column g,
// rows t and t + 4; c as above. The hardware reads the upper 19 bits of an operand.
void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Product mine{c, a, b};
  together(mine, [](Product** lanes) {
    const auto value = [](uint32_t word) { return as_float(word & 0xffffe000u); };
    float x[16][8], y[8][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) x[g + i % 2 * 8][t + i / 2 * 4] = value(lanes[lane]->a[i]);
      for (int i = 0; i < 2; ++i) y[g][t + i * 4] = value(lanes[lane]->b[i]);
    }
    accumulate<8, 4>(lanes, x, y);
  });
}

Status run(void (*kernel)(const void*), const void* params, const Grid& grid) {
  if (grid.blocks == 0) return kSuccess;
  if (grid.blocks > INT32_MAX || grid.threads % kLanes || grid.blocks % grid.cluster ||
      grid.shared_bytes > kSharedLimit)
    return 1;
  machine.kernel = kernel;
  machine.params = params;
  // Clusters run in a random order too: one may not wait for another.
  std::vector<int64_t> order(grid.blocks / grid.cluster);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  for (size_t i = order.size(); i > 1; --i) {
    std::swap(order[i - 1], order[machine.draw(static_cast<uint32_t>(i))]);
  }
  for (int64_t cluster : order) run_cluster(cluster * grid.cluster, grid);
  return kSuccess;
}

}  // namespace molex::device
