// Products by warp groups: see wgmma_on_cpu.h.

#include <algorithm>
#include <cstring>
#include <limits>

#include "fibers.h"

namespace molex::device {
namespace {

constexpr int kRows = 64, kDepth = 16;

WarpGroup& group_of(const Fiber& fiber) {
  return fiber.warp->block->groups[fiber.warp->index * kLanes / kGroupThreads];
}

// The element in row r of the direction that is summed over and row i of the other one, by a descriptor of
// core matrices: 8 rows of 16 bytes without a swizzle, `along` bytes to the next one in the first direction,
// `across` in the second (PTX ISA, "Matrix Descriptor Format"). The 8 elements of a core's row follow one
// another in the second direction if `by_rows`, else in the first.
uint16_t element(const Block& block, uint64_t matrix, int r, int i, bool by_rows) {
  if (matrix >> 49) fail("wgmma: a swizzle or an offset of the base, which are not emulated");
  const auto bytes = [&](int shift) { return static_cast<int64_t>(matrix >> shift & 0x3fff) * 16; };
  const int row = by_rows ? r % 8 : i % 8, column = by_rows ? i % 8 : r % 8;
  const int64_t place = bytes(0) + r / 8 * bytes(16) + i / 8 * bytes(32) + row * 16 + column * 2;
  if (place + 2 > block.shared_bytes) fail("wgmma: reads behind the block's shared memory");
  uint16_t bits;
  std::memcpy(&bits, block.fenced.data() + place, sizeof bits);
  return bits;
}

void perform(Block& block, int group, const IssuedProduct& product) {
  const GroupProduct& first = product.by[0];
  const auto value = [&](uint16_t bits) { return first.is_half ? half_of(bits) : bfloat_of(bits); };
  float a[kRows][kDepth];
  std::vector<float> b(first.columns * kDepth);
  for (int i = 0; i < kGroupThreads; ++i) {
    const GroupProduct& mine = product.by[i];
    const bool same = mine.columns == first.columns && mine.a == first.a && mine.b == first.b &&
                      mine.adds == first.adds && !mine.a_registers == !first.a_registers;
    if (!same) fail("wgmma: the threads of a warp group name different products");
    if (!mine.a_registers) continue;
    // Lane 4 g + t of a warp holds rows g and g + 8 of its 16, columns 2 t, 2 t + 1 and those + 8.
    const int row = i / kLanes * 16 + i % kLanes / 4, column = i % 4 * 2;
    for (int r = 0; r < 4; ++r) {
      float* place = &a[row + r % 2 * 8][column + r / 2 * 8];
      place[0] = value(static_cast<uint16_t>(mine.a_registers[r]));
      place[1] = value(static_cast<uint16_t>(mine.a_registers[r] >> 16));
    }
  }
  for (int k = 0; k < kDepth; ++k) {
    for (int row = 0; row < kRows && !first.a_registers; ++row) {
      a[row][k] = value(element(block, first.a, k, row, false));
    }
    for (int n = 0; n < first.columns; ++n) {
      b[n * kDepth + k] = value(element(block, first.b, k, n, first.b_by_rows));
    }
  }
  for (int i = 0; i < kGroupThreads; ++i) {
    std::vector<float>& sums = block.fibers[group * kGroupThreads + i].products.sums[product.by[i].c];
    for (int n = 0; n < first.columns / 8; ++n) {
      for (int e = 0; e < 4; ++e) {
        const float* a_row = a[i / kLanes * 16 + i % kLanes / 4 + e / 2 * 8];
        const float* b_row = &b[(8 * n + i % 4 * 2 + e % 2) * kDepth];
        double products[kDepth];
        for (int k = 0; k < kDepth; ++k) products[k] = static_cast<double>(a_row[k]) * b_row[k];
        float& sum = sums[4 * n + e];
        if (!first.adds) sum = 0.0f;
        for (int k = 0; k < kDepth; k += 8) sum = cut_sum(sum, products + k, 8);
      }
    }
  }
}

// The first `count` of the group's products, in their order.
void perform_up_to(Block& block, WarpGroup& group, size_t count) {
  for (; group.done < count; ++group.done) {
    perform(block, static_cast<int>(&group - block.groups.data()), group.products[group.done]);
  }
}

}  // namespace

void fence_proxy() {
  if (leaves_out(kFences)) return;
  for (Block& block : machine.blocks) {
    if (block.started) std::memcpy(block.fenced.data(), block.shared, block.shared_bytes);
  }
}

void fence_products() { self().products.fenced = true; }

// A turn that is not kept changes no number, so that none can be left out; one that is not given is waited
// for without end.
void give_turn(int group) {
  Block& block = *self().warp->block;
  if (++block.turns[group].arrived < block.threads) return;
  block.turns[group].arrived = 0;
  ++block.turns[group].phase;
  for (Fiber& other : block.fibers) {
    if (!other.done && !(other.warp->arrived >> other.lane & 1)) wake(other);
  }
}

void wait_turn(int group) {
  Block& block = *self().warp->block;
  const int now = block.turns[group].phase;
  give_turn(group);
  while (block.turns[group].phase == now) block_until_woken();
}

void issue(const GroupProduct& product) {
  Fiber& fiber = self();
  Products& mine = fiber.products;
  WarpGroup& group = group_of(fiber);
  if (!mine.fenced) fail("wgmma: no fence since other instructions have had its registers");
  const size_t number = mine.issued++;
  if (group.products.size() <= number) group.products.resize(number + 1);
  IssuedProduct& issued = group.products[number];
  issued.by[(fiber.warp->index * kLanes + fiber.lane) % kGroupThreads] = product;
  const int count = product.columns / 2;
  std::vector<float>& sums = mine.sums[product.c];
  if (sums.empty()) sums.assign(product.c, product.c + count);
  std::fill_n(product.c, count, std::numeric_limits<float>::quiet_NaN());
  if (++issued.threads < kGroupThreads) return;
  Block& block = *fiber.warp->block;
  // The hardware may be quick or slow.
  if (machine.draw(2)) perform_up_to(block, group, number + 1);
  for (Fiber& other : block.fibers) {
    if (&group_of(other) == &group && !other.done && !(other.warp->arrived >> other.lane & 1)) wake(other);
  }
}

void commit_products() { self().products.committed.push_back(self().products.issued); }

void wait_products_but(int pending, std::initializer_list<std::span<const float>> named) {
  if (leaves_out(kProducts)) return;
  Fiber& fiber = self();
  Products& mine = fiber.products;
  WarpGroup& group = group_of(fiber);
  const size_t groups = mine.committed.size();
  const int count = groups > static_cast<size_t>(pending) ? mine.committed[groups - 1 - pending] : 0;
  if (count < mine.issued) fail("wgmma: a wait that leaves products under way is not emulated");
  while (group.products[count - 1].threads < kGroupThreads) block_until_woken();
  perform_up_to(*fiber.warp->block, group, count);
  for (auto& [c, sums] : mine.sums) {
    const auto holds = [c = c](std::span<const float> of) {
      return of.data() <= c && c < of.data() + of.size();
    };
    if (std::any_of(named.begin(), named.end(), holds)) {
      std::copy(sums.begin(), sums.end(), c);
    } else if (machine.options.left_out_barrier < 0) {
      fail("wgmma: a wait does not name the accumulator of a product that it ends");
    }  // else it may be gone with the function that had it, whose wait was left out
  }
  mine.sums.clear();
  mine.fenced = false;
}

}  // namespace molex::device
