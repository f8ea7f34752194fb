// The merged linear layer's forward pass in bf16 on matrix tiles. The product is that of the transposes:
// merged rows of the weight are tiles as they are, tokens are packed once for all of them.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cpu/common/matmul.h"
#include "cpu/merging/tile_operands.h"

namespace molex::merging {

constexpr int64_t kHeight = 64;  // rows of the weight that are merged at a time
constexpr int64_t kSums = 128;   // panels of tokens, of all segments of a group, whose sums are kept

// What the layer reads and writes, all of it contiguous: x [S, T, D], base [O, D], deltas [E, O, D],
// gates [S, E], bias [S, O] or null, y [S, T, O].
struct Forward {
  const uint16_t *x, *base, *deltas;
  const float *gates, *bias;
  uint16_t* y;
  int64_t segments, tokens, width, columns, experts;
};

// One task: `height` rows of the weight from `row` on for `members` segments from `first` on.
struct ForwardTask {
  Forward f;
  const uint16_t* packed;  // x [S, panels, tiles of D]
  int64_t row, height, first, members;
  uint16_t *weights, *padded;
  float *gates, *sums, *pairs;
};

// Writes the sums of two tiles of weight rows and one panel of tokens, with the bias of each row.
template <class Machine>
MOLEX_INLINE void write_outputs(const float* sums,
                                bool two,
                                const float* bias,
                                int64_t rows,
                                int64_t tokens,
                                uint32_t* pairs,
                                uint16_t* y,
                                int64_t stride) {
  constexpr int64_t kLanes = Machine::kLanes;
  if (!two) std::memset(pairs + kArea / 2, 0, kArea / 2 * sizeof(uint32_t));
  for (int64_t n = 0; n < (two ? kDeep : kSide); n += 2) {
    const float low = bias && n < rows ? bias[n] : 0.0f, high = bias && n + 1 < rows ? bias[n + 1] : 0.0f;
    for (int64_t t = 0; t < kSide; t += kLanes) {
      const float* const from = sums + n * kSide + t;
      Machine::interleave(load<kLanes>(from) + low,
                          load<kLanes>(from + kSide) + high,
                          reinterpret_cast<uint16_t*>(pairs + n / 2 * kSide + t));
    }
  }
  if (tokens >= kSide && rows >= kDeep && stride % 2 == 0)
    return Machine::turn_16(pairs, kSide, y, stride / 2);
  alignas(64) uint32_t turned[kArea];
  Machine::turn_16(pairs, kSide, turned, kSide);
  for (int64_t t = 0; t < std::min(tokens, kSide); ++t) {
    std::memcpy(y + t * stride, turned + t * kSide, std::min(rows, kDeep) * sizeof(uint16_t));
  }
}

inline constexpr auto forward_task = tiled([](auto machine, const ForwardTask* task) MOLEX_LAMBDA_INLINE {
  using Machine = decltype(machine);
  typename Machine::Tiles tiles;
  const ForwardTask& t = *task;
  const Forward& f = t.f;
  const int64_t panels = parts(f.tokens, kSide), deep = parts(f.width, kDeep);
  const int64_t row_tiles = parts(t.height, kSide), segment = kHeight / kSide * kBlock * kTile;
  const int64_t kept = deep > kBlock ? panels * kHeight * kSide : 0;  // sums of one segment
  const Merged merged{f.base, f.deltas, t.gates, f.columns, f.width, f.experts, t.members, t.padded};
  for (int64_t k = 0; k < deep; k += kBlock) {
    const int64_t depth = std::min(kBlock, deep - k);
    merge_rows<Machine>(merged, t.row, t.height, k * kDeep, depth, t.weights, segment);
    for (int64_t s = 0; s < t.members; ++s) {
      float* const sums = t.sums + s * kept;
      const Strip strip{t.weights + s * segment,
                        kBlock * kTile,
                        t.packed + ((t.first + s) * panels * deep + k) * kTile,
                        deep * kTile,
                        sums,
                        kArea,
                        row_tiles * kArea,
                        kSide,
                        depth,
                        k > 0};
      multiply_strip(tiles, strip, row_tiles, panels, true);
      if (k + depth < deep) continue;
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t token = p * kSide;
        for (int64_t r = 0; r < t.height; r += kDeep) {
          const int64_t column = t.row + r;
          write_outputs<Machine>(sums + (p * row_tiles + r / kSide) * kArea,
                                 r + kSide < t.height,
                                 f.bias ? f.bias + (t.first + s) * f.columns + column : nullptr,
                                 t.height - r,
                                 f.tokens - token,
                                 reinterpret_cast<uint32_t*>(t.pairs),
                                 f.y + ((t.first + s) * f.tokens + token) * f.columns + column,
                                 f.columns);
        }
      }
    }
  }
});

// Packs the matrices [rows, columns] of all segments; `to` has packed_size elements for each.
inline void pack_all(
    Packing packing, const uint16_t* from, int64_t segments, int64_t rows, int64_t columns, uint16_t* to) {
  const int64_t size = packed_size(packing, rows, columns);
  torch::stable::parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      pack(packing, from + s * rows * columns, rows, columns, to + s * size);
    }
  });
}

// The gates of a group of segments side by side, [E, kMembers]; 0 for those that there are not.
inline void turn_gates(const float* gates, int64_t members, int64_t experts, float* to) {
  std::fill_n(to, experts * kMembers, 0.0f);
  for (int64_t s = 0; s < members; ++s) {
    for (int64_t e = 0; e < experts; ++e) to[e * kMembers + s] = gates[s * experts + e];
  }
}

inline void forward_on_tiles(const Forward& f) {
  const int64_t panels = parts(f.tokens, kSide), deep = parts(f.width, kDeep);
  const int64_t size = packed_size(Packing::kTurned, f.tokens, f.width);
  Arena shared(Arena::bytes(f.segments * size, ScalarType::BFloat16));
  const Matrix packed = shared.matrix(f.segments, size, ScalarType::BFloat16);
  uint16_t* const x = static_cast<uint16_t*>(packed.data);
  pack_all(Packing::kTurned, f.x, f.segments, f.tokens, f.width, x);
  // The sums of all members are kept where the width has several blocks.
  const int64_t together = deep > kBlock ? std::clamp<int64_t>(kSums / panels, 1, kMembers) : kMembers;
  const int64_t groups = parts(f.segments, together), strips = parts(f.columns, kHeight);
  const int64_t weights = kMembers * kHeight / kSide * kBlock * kTile, padded = (1 + f.experts) * kDeep;
  const int64_t sums = (deep > kBlock ? together : 1) * panels * kHeight * kSide;
  const int64_t bytes = Arena::bytes(weights, ScalarType::BFloat16) +
                        Arena::bytes(padded, ScalarType::BFloat16) + Arena::bytes(f.experts * kMembers) +
                        Arena::bytes(sums) + Arena::bytes(kArea);
  torch::stable::parallel_for(0, strips * groups, 1, [&](int64_t begin, int64_t end) {
    const TileScope scope;
    Arena arena(bytes);
    const auto narrow = [&](int64_t count) {
      return static_cast<uint16_t*>(arena.matrix(1, count, ScalarType::BFloat16).data);
    };
    ForwardTask task{f, x};
    task.weights = narrow(weights), task.padded = narrow(padded);
    task.gates = arena.floats(f.experts * kMembers), task.sums = arena.floats(sums);
    task.pairs = arena.floats(kArea);
    for (int64_t index = begin; index < end; ++index) {
      task.row = index / groups * kHeight, task.height = std::min(kHeight, f.columns - task.row);
      task.first = index % groups * together;
      task.members = std::min(together, f.segments - task.first);
      turn_gates(f.gates + task.first * f.experts, task.members, f.experts, task.gates);
      forward_task(&task);
    }
  });
}

}  // namespace molex::merging
