// Attention of one iteration on matrix tiles, in bf16 with sums in fp32.
//
// The scores of 32 rows and up to kColumns columns are a strip in the first-level cache; with more columns,
// what has been summed is scaled whenever a row's largest score rises. Probabilities are rounded as exp(score
// - shift), before they are divided by their sum.

#pragma once

#include <cmath>
#include <limits>

#include "cpu/rpc_attention/tile_operands.h"

namespace molex::rpc {

constexpr int64_t kStrip = 32, kColumns = 256;
// A row of scores that is longer than a power of two: rows would share lines of the cache otherwise.
constexpr int64_t kScoresPitch = kColumns + 16;

// What the attention of one iteration reads and writes: operands [rows, padded], results of rows.
struct TiledForward {
  const Tokens* tokens;
  const uint16_t *queries, *keys, *values;  // rows, turned rows, pairs
  bool drops;
  float *low_rank, *shift, *inverse;
  // Of a strip: scores, sums of rows by lane, unfinished results, dropout's factors.
  float *z, *lanes, *unfinished, *kept;
  uint16_t* weights;  // left tiles [kColumns / 32][2]
};

// e^x for x <= 88, of each lane, to 3e-6: a thousandth of what bf16 rounds. 1 for 0, and NaN is kept.
template <class V>
MOLEX_INLINE V coarse_exponential(V x) {
  constexpr float kLowest = -87.33654f, kInverseLog2 = 1.44269504f;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to a whole number
  const V shifted = x * kInverseLog2 + kMagic;
  const V f = x * kInverseLog2 - (shifted - kMagic);
  // 2^f for |f| <= 1/2, by minimax.
  const V p =
      (((f * 9.582852945e-3f + 5.590642616e-2f) * f + 2.402409911e-1f) * f + 6.931241751e-1f) * f + 1.0f;
  // Multiplies by 2 to the whole number, made by shifting the exponent into place.
  const V result = p * float_of<V>((bits_of(shifted) << 23) + 0x3f800000);
  return select(x < kLowest, V{}, result);
}

// The largest of the first `seen` scores of a row.
template <int LANES>
MOLEX_INLINE float largest_score(const float* z, float scale, int64_t seen) {
  Floats<LANES> most = broadcast<LANES>(-std::numeric_limits<float>::infinity());
  const Floats<LANES> none = most;
  int64_t c = 0;
  for (; c + LANES <= seen; c += LANES) most = larger(load<LANES>(z + c) * scale, most);
  if (c < seen) {
    const auto sees = count_from<LANES>(0) < static_cast<int32_t>(seen - c);
    most = larger(sees ? load<LANES>(z + c) * scale : none, most);
  }
  return largest_lane(most);
}

// Adds exp(score - shift) of the first `seen` columns to `lanes` and rounds them, with dropout's factors if
// there are any, into rows of tiles. Further columns up to a multiple of 32 become 0.
template <class Machine>
MOLEX_INLINE void weigh_row(
    const float* z, float scale, float shift, int64_t seen, const float* kept, float* lanes, uint16_t* to) {
  constexpr int kLanes = Machine::kLanes;
  using V = Floats<kLanes>;
  Run<kLanes> sums;
  for (int64_t c = 0; c < seen; c += kTileDepth, to += 2 * kTile) {
    Run<kLanes> weights;
    for (int v = 0; v < weights.kVectors; ++v) {
      V& weight = weights.part[v];
      weight = coarse_exponential(rounded(load<kLanes>(z + c + v * kLanes) * scale) - shift);
    }
    if (c + kTileDepth > seen) {
      for (int v = 0; v < weights.kVectors; ++v) {
        const auto sees = count_from<kLanes>(v * kLanes) < static_cast<int32_t>(seen - c);
        weights.part[v] = sees ? weights.part[v] : V{};
      }
    }
    for (int v = 0; v < weights.kVectors; ++v) {
      sums.part[v] += weights.part[v];
      if (kept) {
        const V by = load<kLanes>(kept + c + v * kLanes);
        weights.part[v] = by == 0.0f ? V{} : weights.part[v] * by;
      }
    }
    store_row<Machine>(weights, to);
  }
  for (int v = 0; v < sums.kVectors; ++v) {
    float* const to_lanes = lanes + v * kLanes;
    store(to_lanes, load<kLanes>(to_lanes) + sums.part[v]);
  }
}

template <int LANES>
MOLEX_INLINE void scale_by(float* x, float by, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) store(x + i, load<LANES>(x + i) * by);
}

// Computes L = softmax(scale queries keys^T) values, and the statistics of its rows.
inline constexpr auto attend_on_tiles = tiled([](auto machine, const TiledForward* f) MOLEX_LAMBDA_INLINE {
  using Machine = decltype(machine);
  constexpr int kLanes = Machine::kLanes;
  typename Machine::Tiles tiles;
  const Tokens& tokens = *f->tokens;
  const Problem& p = tokens.p;
  const int64_t count = tokens.count(), padded = p.padded();
  const int64_t widths = (p.width + kTileRows - 1) / kTileRows, used = widths * kTileRows;
  const TileOperand queries = summed_over_columns(f->queries, padded);
  const TileOperand keys = summed_over_columns(f->keys, padded);
  const TileOperand values = summed_over_rows(f->values, padded);
  const TileOperand weights{f->weights, kTile, 2 * kTile};
  for (int64_t i = 0; i < count; i += kStrip) {
    const int64_t rows = std::min(kStrip, count - i), row_tiles = (rows + kTileRows - 1) / kTileRows;
    const int64_t end = p.causal ? i + rows : count;
    std::fill_n(f->lanes, rows * kTileDepth, 0.0f);
    for (int64_t j = 0; j < end; j += kColumns) {
      const int64_t columns = std::min(kColumns, end - j);
      multiply_tiles(tiles,
                     queries.from(i / kTileRows, 0),
                     row_tiles,
                     keys.from(j / kTileRows, 0),
                     (columns + kTileRows - 1) / kTileRows,
                     padded / kTileDepth,
                     f->z,
                     kScoresPitch,
                     false);
      for (int64_t r = 0; r < rows; ++r) {
        const float* z = f->z + r * kScoresPitch;
        float *lanes = f->lanes + r * kTileDepth, *shift = f->shift + i + r;
        const int64_t seen = p.causal ? std::min(columns, i + r + 1 - j) : columns;
        const float largest = largest_score<kLanes>(z, p.scale, seen);
        if (j == 0) {
          *shift = largest;
        } else if (largest > *shift) {
          const float by = std::exp(*shift - largest);
          *shift = largest;
          scale_by<kLanes>(lanes, by, kTileDepth);
          scale_by<kLanes>(f->unfinished + r * padded, by, used);
        }
        if (f->drops) dropout_row(tokens, i + r, j, columns, f->kept);
        uint16_t* to = f->weights + r / kTileRows * kTile + r % kTileRows * kTileDepth;
        weigh_row<Machine>(z, p.scale, *shift, seen, f->drops ? f->kept : nullptr, lanes, to);
        // Of a row that sees fewer columns than the last one of its strip, under a causal mask.
        for (int64_t c = round_up(seen, kTileDepth); c < columns; c += kTileDepth) {
          store_row<Machine>(Run<kLanes>{}, to + c / kTileDepth * 2 * kTile);
        }
      }
      multiply_tiles(tiles,
                     weights,
                     row_tiles,
                     values.from(0, j / kTileDepth),
                     widths,
                     round_up(columns, kTileDepth) / kTileDepth,
                     f->unfinished,
                     padded,
                     j > 0);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float inverse = 1.0f / sum_of_run(Run<kLanes>::at(f->lanes + r * kTileDepth));
      f->inverse[i + r] = inverse;
      const float* from = f->unfinished + r * padded;
      float* to = f->low_rank + (i + r) * padded;
      for (int64_t c = 0; c < used; c += kLanes) store(to + c, load<kLanes>(from + c) * inverse);
      std::fill(to + used, to + padded, 0.0f);
    }
  }
});

// The operands of one thread's heads, as attend_on_tiles reads them.
inline constexpr auto make_row_tiles =
    tiled([](auto machine, const float* x, int64_t rows, int64_t padded, uint16_t* to)
              MOLEX_LAMBDA_INLINE { rows_of_tiles<decltype(machine)>(x, rows, padded, to); });
inline constexpr auto make_pair_tiles =
    tiled([](auto machine, const float* x, int64_t rows, int64_t padded, uint16_t* to)
              MOLEX_LAMBDA_INLINE { pairs_of_tiles<decltype(machine)>(x, rows, padded, to); });
inline constexpr auto turn_tiles = tiled(
    [](auto machine, const uint16_t* from, int64_t rows, int64_t padded, uint16_t* to) MOLEX_LAMBDA_INLINE {
      for (int64_t at = 0; at < round_up(rows, kTileDepth) * padded; at += kTile)
        decltype(machine)::turn_16(from + at, kTileRows, to + at, kTileRows);
    });

// The counterpart of Attention (forward.cpp) on matrix tiles.
class TiledAttention {
 public:
  TiledAttention(const Problem& p, Scratch& scratch) : p_(p) {
    const int64_t rows = round_up(p.length, kTileDepth), size = rows * p.padded();
    for (uint16_t** operand : {&rows_, &keys_, &values_}) *operand = scratch.take_zeros<uint16_t>(size);
    queries_ = p.q ? scratch.take_zeros<uint16_t>(size) : rows_;
    work_.z = scratch.take_zeros(kStrip * kScoresPitch);
    work_.lanes = scratch.take(kStrip * kTileDepth);
    work_.unfinished = scratch.take_zeros(kStrip * p.padded());
    work_.kept = scratch.take_zeros(p.dropout.on ? kColumns : 0);
    work_.weights = scratch.take_zeros<uint16_t>(kStrip * kColumns);
    work_.shift = scratch.take(rows);
    work_.inverse = scratch.take(rows);
  }

  // Takes what is the same in every iteration of a head; `queries` is null where they are the keys.
  void begin(const Tokens& tokens, const float* v, const float* queries) {
    make_pair_tiles(v, tokens.count(), p_.padded(), values_);
    if (queries) make_row_tiles(queries, tokens.count(), p_.padded(), queries_);
  }

  void operator()(const Tokens& tokens, const float* clean, bool drops, float* low_rank) {
    make_row_tiles(clean, tokens.count(), p_.padded(), rows_);
    turn_tiles(rows_, tokens.count(), p_.padded(), keys_);
    TiledForward f = work_;
    f.tokens = &tokens, f.drops = drops, f.low_rank = low_rank;
    f.queries = queries_, f.keys = keys_, f.values = values_;
    attend_on_tiles(&f);
  }

  const float* shift() const { return work_.shift; }
  const float* inverse() const { return work_.inverse; }

 private:
  const Problem& p_;
  uint16_t *rows_, *queries_, *keys_, *values_;  // rows of the keys, and operands of the products
  TiledForward work_{};
};

}  // namespace molex::rpc
