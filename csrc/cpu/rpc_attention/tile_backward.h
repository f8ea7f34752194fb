// The gradient of one iteration's attention on matrix tiles, in bf16 with sums in fp32; gradient.h has the
// equations.
//
// A strip of 32 rows gets its scores and dP for all columns, then D, then dZ, which is written twice: as a
// left operand, for the queries' gradient, and in pairs of rows as a right one. Products over the rows, dZ^T
// q and P^T dL, are transposed and run over several strips at once: over one alone, they would load and store
// as many sums as they add terms.

#pragma once

#include "cpu/rpc_attention/gradient.h"
#include "cpu/rpc_attention/tile_forward.h"

namespace molex::rpc {

// Elements of dZ that wait for the products over the rows; half a megabyte, as P beside them.
constexpr int64_t kWaiting = int64_t{1} << 18, kMostRows = 256;

// What the gradient of one iteration's attention reads and writes. Operands are [rows, padded].
struct TiledBackward {
  const Tokens* tokens;
  const uint16_t *queries, *keys, *key_pairs, *query_columns;  // rows, turned rows, pairs, turned pairs
  const uint16_t *values, *gradients, *gradient_columns;       // turned rows; of dL: rows, turned pairs
  const float *shift, *inverse, *center;                       // of rows
  bool drops;
  int64_t group;                         // rows whose products over the rows run at once
  int64_t pitch;                         // of scores and of transposed gradients
  float *z, *upstream, *dropped, *kept;  // of a strip
  uint16_t *slopes, *slope_pairs, *weight_pairs;
  float *dqueries, *dclean, *dv;             // are added to
  float *dclean_transposed, *dv_transposed;  // [padded, pitch]
};

// Replaces the scores of a row by P, and with dropout makes dropped P of it and undoes it in dP. Columns from
// `seen` on, up to a multiple of 32, become 0. Returns D.
template <class Machine, bool DROPS>
MOLEX_INLINE float weigh_row_backward(float* z,
                                      float* upstream,
                                      float* dropped,
                                      const float* kept,
                                      float scale,
                                      float shift,
                                      float inverse,
                                      float center,
                                      int64_t seen) {
  constexpr int kLanes = Machine::kLanes;
  using V = Floats<kLanes>;
  Run<kLanes> sums;
  for (int64_t c = 0; c < seen; c += kTileDepth) {
    for (int v = 0; v < sums.kVectors; ++v) {
      const int64_t at = c + v * kLanes;
      V weight = coarse_exponential(rounded(load<kLanes>(z + at) * scale) - shift) * inverse;
      V slope = load<kLanes>(upstream + at);
      if (c + kTileDepth > seen) {
        const auto sees = count_from<kLanes>(v * kLanes) < static_cast<int32_t>(seen - c);
        weight = sees ? weight : V{};
        slope = sees ? slope : V{};
      }
      if constexpr (DROPS) {
        const V by = load<kLanes>(kept + at);
        slope = by == 0.0f ? V{} : slope * by;
        store(dropped + at, by == 0.0f ? V{} : weight * by);
      }
      store(z + at, weight);
      store(upstream + at, slope);
      sums.part[v] += weight * (slope - center);
    }
  }
  return center + sum_of_run(sums);
}

// Adds x^T [width, count] to rows.
inline constexpr auto add_turned = tiled(
    [](auto machine, const float* x, int64_t pitch, int64_t count, int64_t width, int64_t padded, float* to)
        MOLEX_LAMBDA_INLINE {
          alignas(64) float block[kTileRows * kTileRows];
          for (int64_t r = 0; r < count; r += kTileRows) {
            for (int64_t c = 0; c < width; c += kTileRows) {
              decltype(machine)::turn_16(x + c * pitch + r, pitch, block, kTileRows);
              for (int64_t i = 0; i < std::min(kTileRows, count - r); ++i) {
                float* const row = to + (r + i) * padded + c;
                for (int64_t e = 0; e < kTileRows; ++e) row[e] += block[i * kTileRows + e];
              }
            }
          }
        });

inline constexpr auto differentiate_on_tiles = tiled([](auto machine,
                                                        const TiledBackward* b) MOLEX_LAMBDA_INLINE {
  using Machine = decltype(machine);
  constexpr int kLanes = Machine::kLanes;
  using Floats32 = Run<kLanes>;
  typename Machine::Tiles tiles;
  const Tokens& tokens = *b->tokens;
  const Problem& p = tokens.p;
  const int64_t count = tokens.count(), padded = p.padded(), pitch = b->pitch;
  const int64_t widths = (p.width + kTileRows - 1) / kTileRows, depths = padded / kTileDepth;
  const int64_t across = round_up(count, kTileDepth);  // columns of waiting tiles
  const TileOperand queries = summed_over_columns(b->queries, padded);
  const TileOperand keys = summed_over_columns(b->keys, padded);
  const TileOperand values = summed_over_columns(b->values, padded);
  const TileOperand gradients = summed_over_columns(b->gradients, padded);
  const TileOperand key_pairs = summed_over_rows(b->key_pairs, padded);
  const TileOperand query_columns = summed_over_rows(b->query_columns, padded);
  const TileOperand gradient_columns = summed_over_rows(b->gradient_columns, padded);
  const TileOperand slopes{b->slopes, kTile, 2 * kTile};
  const TileOperand slope_pairs = summed_over_rows(b->slope_pairs, across);
  const TileOperand weight_pairs = summed_over_rows(b->weight_pairs, across);
  const float* const dropped = b->drops ? b->dropped : b->z;
  for (int64_t first = 0; first < count; first += b->group) {
    const int64_t last = std::min(first + b->group, count);
    for (int64_t i = first; i < last; i += kStrip) {
      const int64_t rows = std::min(kStrip, count - i), row_tiles = (rows + kTileRows - 1) / kTileRows;
      const int64_t end = p.causal ? i + rows : count, column_tiles = (end + kTileRows - 1) / kTileRows;
      const int64_t whole = round_up(end, kTileDepth);
      multiply_tiles(
          tiles, queries.from(i / kTileRows, 0), row_tiles, keys, column_tiles, depths, b->z, pitch, false);
      multiply_tiles(tiles,
                     gradients.from(i / kTileRows, 0),
                     row_tiles,
                     values,
                     column_tiles,
                     depths,
                     b->upstream,
                     pitch,
                     false);
      float delta[kStrip];
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t seen = p.causal ? i + r + 1 : count, at = r * pitch, row = i + r;
        float *z = b->z + at, *upstream = b->upstream + at;
        if (b->drops) {
          dropout_row(tokens, row, 0, end, b->kept);
          delta[r] = weigh_row_backward<Machine, true>(z,
                                                       upstream,
                                                       b->dropped + at,
                                                       b->kept,
                                                       p.scale,
                                                       b->shift[row],
                                                       b->inverse[row],
                                                       b->center[row],
                                                       seen);
        } else {
          delta[r] = weigh_row_backward<Machine, false>(
              z, upstream, nullptr, nullptr, p.scale, b->shift[row], b->inverse[row], b->center[row], seen);
        }
        // Columns of the strip that this row does not see, under a causal mask.
        for (int64_t c = round_up(seen, kTileDepth); c < whole; c += kLanes) {
          store(z + c, Floats<kLanes>{});
          store(upstream + c, Floats<kLanes>{});
          if (b->drops) store(b->dropped + at + c, Floats<kLanes>{});
        }
      }
      const int64_t waiting = (i - first) / kTileDepth * kTileDepth * across;
      for (int64_t r = 0; r < kStrip; r += 2) {
        const int64_t at = r * pitch;
        uint16_t* row_to = b->slopes + r / kTileRows * kTile + r % kTileRows * kTileDepth;
        uint16_t* slopes_to = b->slope_pairs + waiting + r * kTileRows;
        uint16_t* weights_to = b->weight_pairs + waiting + r * kTileRows;
        for (int64_t c = 0; c < whole; c += kTileDepth) {
          Floats32 slope[2], weight[2];
          for (int k = 0; k < 2; ++k) {
            if (r + k >= rows) continue;  // rows that complete the tiles are 0
            const int64_t from = at + k * pitch + c;
            weight[k] = Floats32::at(dropped + from);
            for (int v = 0; v < Floats32::kVectors; ++v) {
              const auto chance = load<kLanes>(b->z + from + v * kLanes);
              const auto above = load<kLanes>(b->upstream + from + v * kLanes) - delta[r + k];
              slope[k].part[v] = chance * above * p.scale;
            }
          }
          store_row<Machine>(slope[0], row_to);
          store_row<Machine>(slope[1], row_to + kTileDepth);
          store_pairs<Machine>(slope[0], slope[1], slopes_to);
          store_pairs<Machine>(weight[0], weight[1], weights_to);
          row_to += 2 * kTile, slopes_to += 2 * kTile, weights_to += 2 * kTile;
        }
      }
      multiply_tiles(tiles,
                     slopes,
                     row_tiles,
                     key_pairs,
                     widths,
                     whole / kTileDepth,
                     b->dqueries + i * padded,
                     padded,
                     true);
    }
    const int64_t strips = (last - first + kStrip - 1) / kStrip;
    for (int64_t j = 0; j < (p.causal ? last : count); j += kStrip) {
      // Under a causal mask, rows before j do not see column j.
      const int64_t before = p.causal ? std::max<int64_t>(j - first, 0) / kStrip : 0;
      const bool add = p.causal ? j < first : first > 0;
      const auto multiply_columns = [&](TileOperand left, TileOperand right, float* to) MOLEX_LAMBDA_INLINE {
        multiply_tiles(tiles,
                       left.from(0, first / kStrip + before),
                       widths,
                       right.from(j / kTileRows, before),
                       2,
                       strips - before,
                       to + j,
                       pitch,
                       add);
      };
      multiply_columns(query_columns, slope_pairs, b->dclean_transposed);
      multiply_columns(gradient_columns, weight_pairs, b->dv_transposed);
    }
  }
  add_turned(b->dclean_transposed, pitch, count, widths * kTileRows, padded, b->dclean);
  add_turned(b->dv_transposed, pitch, count, widths * kTileRows, padded, b->dv);
});

// The counterpart of AttentionBackward on matrix tiles.
class TiledAttentionBackward {
 public:
  // The gradients that are added to have as many rows.
  static int64_t rows_of(int64_t length) { return round_up(length, kTileDepth); }

  TiledAttentionBackward(const Problem& p, Scratch& scratch) : p_(p), padded_(p.padded()) {
    const int64_t rows = rows_of(p.length), size = rows * padded_;
    for (uint16_t** operand :
         {&rows_, &keys_, &pairs_, &key_pairs_, &query_columns_, &values_, &gradients_, &gradient_columns_})
      *operand = scratch.take_zeros<uint16_t>(size);
    queries_ = p.q ? scratch.take_zeros<uint16_t>(size) : rows_;
    TiledBackward& w = work_;
    w.group = std::clamp(kWaiting / std::max<int64_t>(rows, 1) / kStrip * kStrip, kStrip, kMostRows);
    w.pitch = rows + kPad;
    for (float** strip : {&w.z, &w.upstream}) *strip = scratch.take_zeros(kStrip * w.pitch);
    w.dropped = scratch.take_zeros(p.dropout.on ? kStrip * w.pitch : 0);
    w.kept = scratch.take_zeros(p.dropout.on ? rows : 0);
    w.slopes = scratch.take_zeros<uint16_t>(kStrip * rows);
    w.slope_pairs = scratch.take_zeros<uint16_t>(w.group * rows);
    w.weight_pairs = scratch.take_zeros<uint16_t>(w.group * rows);
    w.dclean_transposed = scratch.take_zeros(padded_ * w.pitch);
    w.dv_transposed = scratch.take_zeros(padded_ * w.pitch);
  }

  // Takes what is the same in every iteration of a head; `queries` is null where they are the keys.
  void begin(const Tokens& tokens, const float* v, const float* queries) {
    const int64_t count = tokens.count();
    make_row_tiles(v, count, padded_, rows_);
    turn_tiles(rows_, count, padded_, values_);
    if (!queries) return;
    make_row_tiles(queries, count, padded_, queries_);
    make_pair_tiles(queries, count, padded_, pairs_);
    turn_tiles(pairs_, count, padded_, query_columns_);
  }

  void operator()(const Tokens& tokens, const Operands& o, const Statistics& statistics, bool drops) {
    const int64_t count = tokens.count();
    make_row_tiles(o.clean, count, padded_, rows_);
    turn_tiles(rows_, count, padded_, keys_);
    make_pair_tiles(o.clean, count, padded_, key_pairs_);
    if (!p_.q) turn_tiles(key_pairs_, count, padded_, query_columns_);
    make_row_tiles(o.dlow_rank, count, padded_, gradients_);
    make_pair_tiles(o.dlow_rank, count, padded_, pairs_);
    turn_tiles(pairs_, count, padded_, gradient_columns_);
    TiledBackward b = work_;
    b.tokens = &tokens, b.drops = drops;
    b.queries = queries_, b.keys = keys_, b.key_pairs = key_pairs_, b.query_columns = query_columns_;
    b.values = values_, b.gradients = gradients_, b.gradient_columns = gradient_columns_;
    b.shift = statistics.shift, b.inverse = statistics.inverse, b.center = statistics.center;
    b.dqueries = o.dqueries, b.dclean = o.dclean, b.dv = o.dv;
    differentiate_on_tiles(&b);
  }

 private:
  const Problem& p_;
  int64_t padded_;
  uint16_t *rows_, *queries_, *keys_, *pairs_, *key_pairs_, *query_columns_;
  uint16_t *values_, *gradients_, *gradient_columns_;
  TiledBackward work_{};
};

}  // namespace molex::rpc
