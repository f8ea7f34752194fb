// The merged linear layer's backward pass in bf16 on matrix tiles. Rows of the weight are merged in pairs,
// which are tiles as they are; gradients of the weight are made for some rows and columns at a time, and
// leave the cache as those of base, deltas and gates only.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cpu/common/gemm.h"
#include "cpu/common/matmul.h"
#include "cpu/merging/tile_forward.h"

namespace molex::merging {

constexpr int64_t kWidth = 64;   // columns of the weight that are merged at a time
constexpr int64_t kSquare = 32;  // rows and columns of the weight's gradient that are made at a time
constexpr int64_t kElements = kSquare * kSquare;
constexpr int64_t kChunkWidth = 512;  // columns of one task, and of one partial sum of the gates' gradient

// What the backward pass reads, all of it contiguous: dy [S, T, O], x [S, T, D], base [O, D],
// deltas [E, O, D], gates [S, E].
struct Backward {
  const uint16_t *dy, *x, *base, *deltas;
  const float* gates;
  int64_t segments, tokens, width, columns, experts;
};

// `used` columns of the weight from `column` on, for `members` segments from `first` on.
struct InputTask {
  Backward b;
  const uint16_t* packed;  // dy [S, panels, tiles of O]
  int64_t column, used, first, members;
  uint16_t *weights, *padded, *dx;
  float *gates, *sums;
};

// dx_s = dy_s W_s.
inline constexpr auto input_task = tiled([](auto machine, const InputTask* task) MOLEX_LAMBDA_INLINE {
  using Machine = decltype(machine);
  constexpr int64_t kLanes = Machine::kLanes;
  typename Machine::Tiles tiles;
  const InputTask& t = *task;
  const Backward& b = t.b;
  const int64_t panels = parts(b.tokens, kSide), deep = parts(b.columns, kDeep);
  const int64_t column_tiles = parts(t.used, kSide), segment = kWidth / kSide * kBlock * kTile;
  const int64_t kept = deep > kBlock ? panels * kSide * kWidth : 0;  // sums of one segment
  const Merged merged{b.base, b.deltas, t.gates, b.columns, b.width, b.experts, t.members, t.padded};
  for (int64_t k = 0; k < deep; k += kBlock) {
    const int64_t depth = std::min(kBlock, deep - k);
    merge_pairs<Machine>(merged, k * kDeep, depth, t.column, column_tiles, t.weights, segment);
    for (int64_t s = 0; s < t.members; ++s) {
      float* const sums = t.sums + s * kept;
      const Strip strip{t.packed + ((t.first + s) * panels * deep + k) * kTile,
                        deep * kTile,
                        t.weights + s * segment,
                        kBlock * kTile,
                        sums,
                        kSide * kWidth,
                        kSide,
                        kWidth,
                        depth,
                        k > 0};
      multiply_strip(tiles, strip, panels, column_tiles, false);
      if (k + depth < deep) continue;
      for (int64_t i = 0; i < b.tokens; ++i) {
        const float* const from = sums + i * kWidth;
        uint16_t* const to = t.dx + ((t.first + s) * b.tokens + i) * b.width + t.column;
        alignas(64) uint16_t whole[kWidth];
        uint16_t* const made = t.used == kWidth ? to : whole;
        for (int64_t c = 0; c < column_tiles * kSide; c += 2 * kLanes) {
          // Of an odd number of tiles the last vector's second half may be one of which there are no sums.
          const bool both = c + kLanes < column_tiles * kSide;
          const auto low = load<kLanes>(from + c);
          Machine::narrow(low, both ? load<kLanes>(from + c + kLanes) : low, made + c);
        }
        if (made != to) std::memcpy(to, whole, t.used * sizeof(uint16_t));
      }
    }
  }
});

// kSquare rows of the weight's gradient from `row` on, and columns [column, end).
struct WeightTask {
  Backward b;
  const uint16_t *dy, *x;  // packed, [S, tiles of O, tiles of T] and [S, tiles of D, tiles of T]
  int64_t row, column, end;
  const float* turned;  // gates [E + 1, S], the last row ones
  uint16_t *dbase, *ddeltas;
  double* dgates;                           // [S, E], added to
  float *gradients, *sums, *deltas, *dots;  // scratch
};

// Number (i, j) of a square is at this place of its four tiles.
MOLEX_INLINE int64_t in_square(int64_t i, int64_t j) {
  return (i / kSide * 2 + j / kSide) * kArea + i % kSide * kSide + j % kSide;
}

// Reads some rows and columns of the deltas as floats, by tiles, with zeros behind their ends.
template <class Machine>
MOLEX_INLINE void read_square(const Backward& b, int64_t row, int64_t column, float* to) {
  constexpr int64_t kLanes = Machine::kLanes;
  const int64_t rows = std::min(kSquare, b.columns - row), columns = std::min(kSquare, b.width - column);
  if (rows < kSquare) std::memset(to, 0, b.experts * kElements * sizeof(float));
  for (int64_t e = 0; e < b.experts; ++e, to += kElements) {
    for (int64_t i = 0; i < rows; ++i) {
      const uint16_t* from = b.deltas + (e * b.columns + row + i) * b.width + column;
      uint16_t whole[kSquare] = {};
      if (columns < kSquare) {
        std::memcpy(whole, from, columns * sizeof(uint16_t));
        from = whole;
      }
      for (int64_t j = 0; j < kSquare; j += kLanes) {
        store(to + in_square(i, j), widened<Machine>(from + j));
      }
    }
  }
}

// Rounds a square of sums into a matrix.
template <class Machine>
MOLEX_INLINE void write_square(
    const float* from, int64_t rows, int64_t columns, uint16_t* to, int64_t stride) {
  constexpr int64_t kLanes = Machine::kLanes;
  for (int64_t i = 0; i < std::min(rows, kSquare); ++i) {
    uint16_t whole[kSquare];
    uint16_t* const made = columns < kSquare ? whole : to + i * stride;
    for (int64_t j = 0; j < kSquare; j += 2 * kLanes) {
      const int64_t second = j + kLanes;
      Machine::narrow(
          load<kLanes>(from + in_square(i, j)), load<kLanes>(from + in_square(i, second)), made + j);
    }
    if (columns < kSquare) std::memcpy(to + i * stride, whole, columns * sizeof(uint16_t));
  }
}

// With dW_s = dy_s^T x_s: dbase = sum_s dW_s, ddeltas_e = sum_s gates_se dW_s and dgates_se = <dW_s,
// deltas_e>. Sums run in the order of segments.
inline constexpr auto weight_task = tiled([](auto machine, const WeightTask* task) MOLEX_LAMBDA_INLINE {
  using Machine = decltype(machine);
  typename Machine::Tiles tiles;
  const WeightTask& t = *task;
  const Backward& b = t.b;
  const int64_t deep = parts(b.tokens, kDeep), all_rows = parts(b.columns, kSide);
  const int64_t all_columns = parts(b.width, kSide), row_tile = t.row / kSide;
  const int64_t row_tiles = std::min<int64_t>(2, all_rows - row_tile), left = b.columns - t.row;
  const bool sums_up = t.dbase || t.ddeltas;
  for (int64_t column = t.column; column < t.end; column += kSquare) {
    const int64_t column_tile = column / kSide;
    const int64_t column_tiles = std::min<int64_t>(2, all_columns - column_tile);
    if (t.dgates) read_square<Machine>(b, t.row, column, t.deltas);
    for (int64_t first = 0; first < b.segments; first += kMembers) {
      const int64_t members = std::min(kMembers, b.segments - first);
      if (row_tiles + column_tiles < 4) std::memset(t.gradients, 0, members * kElements * sizeof(float));
      for (int64_t s = 0; s < members; ++s) {
        const Strip strip{t.dy + ((first + s) * all_rows + row_tile) * deep * kTile,
                          deep * kTile,
                          t.x + ((first + s) * all_columns + column_tile) * deep * kTile,
                          deep * kTile,
                          t.gradients + s * kElements,
                          2 * kArea,
                          kArea,
                          kSide,
                          deep,
                          false};
        multiply_strip(tiles, strip, row_tiles, column_tiles, true);
      }
      if (sums_up) {
        product({t.turned + first,
                 b.segments,
                 t.gradients,
                 kElements,
                 t.sums,
                 kElements,
                 b.experts + 1,
                 kElements,
                 members,
                 first > 0});
      }
      if (!t.dgates) continue;
      product_inner({t.gradients,
                     kElements,
                     t.deltas,
                     kElements,
                     t.dots,
                     b.experts,
                     members,
                     b.experts,
                     kElements,
                     false});
      for (int64_t i = 0; i < members * b.experts; ++i) t.dgates[first * b.experts + i] += t.dots[i];
    }
    const int64_t at = t.row * b.width + column, columns = b.width - column;
    for (int64_t e = 0; e < b.experts && t.ddeltas; ++e) {
      uint16_t* const to = t.ddeltas + e * b.columns * b.width + at;
      write_square<Machine>(t.sums + e * kElements, left, columns, to, b.width);
    }
    if (!t.dbase) continue;
    write_square<Machine>(t.sums + b.experts * kElements, left, columns, t.dbase + at, b.width);
  }
});

inline void input_gradient_on_tiles(const Backward& b, uint16_t* dx) {
  const int64_t panels = parts(b.tokens, kSide), deep = parts(b.columns, kDeep);
  const int64_t size = packed_size(Packing::kRows, b.tokens, b.columns);
  Arena shared(Arena::bytes(b.segments * size, ScalarType::BFloat16));
  const Matrix packed = shared.matrix(b.segments, size, ScalarType::BFloat16);
  uint16_t* const dy = static_cast<uint16_t*>(packed.data);
  pack_all(Packing::kRows, b.dy, b.segments, b.tokens, b.columns, dy);
  const int64_t together = deep > kBlock ? std::clamp<int64_t>(kSums / panels, 1, kMembers) : kMembers;
  const int64_t groups = parts(b.segments, together), strips = parts(b.width, kWidth);
  const int64_t weights = kMembers * kWidth / kSide * kBlock * kTile, padded = (1 + b.experts) * kDeep;
  const int64_t sums = (deep > kBlock ? together : 1) * panels * kSide * kWidth;
  const int64_t bytes = Arena::bytes(weights, ScalarType::BFloat16) +
                        Arena::bytes(padded, ScalarType::BFloat16) + Arena::bytes(b.experts * kMembers) +
                        Arena::bytes(sums);
  torch::stable::parallel_for(0, strips * groups, 1, [&](int64_t begin, int64_t end) {
    const TileScope scope;
    Arena arena(bytes);
    const auto narrow = [&](int64_t count) {
      return static_cast<uint16_t*>(arena.matrix(1, count, ScalarType::BFloat16).data);
    };
    InputTask task{b, dy};
    task.dx = dx;
    task.weights = narrow(weights), task.padded = narrow(padded);
    task.gates = arena.floats(b.experts * kMembers), task.sums = arena.floats(sums);
    for (int64_t index = begin; index < end; ++index) {
      task.column = index / groups * kWidth, task.used = std::min(kWidth, b.width - task.column);
      task.first = index % groups * together;
      task.members = std::min(together, b.segments - task.first);
      turn_gates(b.gates + task.first * b.experts, task.members, b.experts, task.gates);
      input_task(&task);
    }
  });
}

// A null pointer means that a gradient is not wanted.
inline void weight_gradients_on_tiles(const Backward& b, uint16_t* dbase, uint16_t* ddeltas, float* dgates) {
  const int64_t dy_size = packed_size(Packing::kTurnedPairs, b.tokens, b.columns);
  const int64_t x_size = packed_size(Packing::kPairs, b.tokens, b.width);
  Arena shared(Arena::bytes(b.segments * dy_size, ScalarType::BFloat16) +
               Arena::bytes(b.segments * x_size, ScalarType::BFloat16));
  const auto take = [&](int64_t size) {
    return static_cast<uint16_t*>(shared.matrix(b.segments, size, ScalarType::BFloat16).data);
  };
  uint16_t *const dy = take(dy_size), *const x = take(x_size);
  pack_all(Packing::kTurnedPairs, b.dy, b.segments, b.tokens, b.columns, dy);
  pack_all(Packing::kPairs, b.x, b.segments, b.tokens, b.width, x);
  const int64_t chunks = parts(b.width, kChunkWidth), tasks = parts(b.columns, kSquare) * chunks;
  const int64_t pairs = dgates ? b.segments * b.experts : 0, rows = b.experts + 1;
  std::vector<double> partial(tasks * pairs, 0.0);
  std::vector<float> turned(rows * b.segments, 1.0f);
  for (int64_t s = 0; s < b.segments; ++s) {
    for (int64_t e = 0; e < b.experts; ++e) turned[e * b.segments + s] = b.gates[s * b.experts + e];
  }
  const int64_t bytes = Arena::bytes(kMembers * kElements) + Arena::bytes(rows * kElements) +
                        Arena::bytes(b.experts * kElements) + Arena::bytes(kMembers * b.experts);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const TileScope scope;
    Arena arena(bytes);
    WeightTask task{b, dy, x};
    task.turned = turned.data(), task.dbase = dbase, task.ddeltas = ddeltas;
    task.gradients = arena.floats(kMembers * kElements), task.sums = arena.floats(rows * kElements);
    task.deltas = arena.floats(b.experts * kElements), task.dots = arena.floats(kMembers * b.experts);
    for (int64_t index = begin; index < end; ++index) {
      task.row = index / chunks * kSquare, task.column = index % chunks * kChunkWidth;
      task.end = std::min(task.column + kChunkWidth, b.width);
      task.dgates = dgates ? partial.data() + index * pairs : nullptr;
      weight_task(&task);
    }
  });
  std::vector<double> sums(pairs, 0.0);
  for (int64_t task = 0; task < tasks; ++task) {
    for (int64_t i = 0; i < pairs; ++i) sums[i] += partial[task * pairs + i];
  }
  std::copy(sums.begin(), sums.end(), dgates);
}

}  // namespace molex::merging
