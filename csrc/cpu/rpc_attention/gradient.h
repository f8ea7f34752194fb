// The gradient of one iteration's attention, in blocks of scores.
//
// Scores are remade from the cleaned keys, and probabilities P from the saved row statistics. With dL for
// the gradient of the iteration's L, a block of rows i and columns j needs dP = dL_i v_j^T and
// dZ = P (dP - D_i), D_i = sum_j P dP. D is not taken as c = <dL_i, L_i>, which rounds in another way: where
// P is close to 1, all of dP - D_i would be that. It is c + sum_j P (dP - c), whose terms are small where P
// is, and where it is not. So a group of blocks first gets P, dP and D, and then dZ.
// A block that serves its columns, too, has the same with i and j exchanged, kept as the transpose: then
// (dZ + dZ^T) K~ is one product a side.

#pragma once

#include "cpu/rpc_attention/steps.h"

namespace molex::rpc {

constexpr int64_t kWhole = 512;  // tokens up to which the blocks of a head are one group

// P = exp(score - shift) * inverse of a row; its c; and D, of which sum P (dP - c) gathers in `along` and in
// the lanes of `lanes` [rows, kPad].
struct Statistics {
  float *shift, *inverse, *center, *along, *lanes;

  Statistics at(int64_t row) const {
    return {shift + row, inverse + row, center + row, along + row, lanes + row * kPad};
  }
};

// Blocks [kBlock, kBlock] of one side: P, dP (in which dropout is undone), and what the values are
// multiplied with: P, or under dropout a block of its own. `kept` is what dropout multiplies with, or null.
struct Side {
  float *weights, *upstream, *dropped, *kept;
};

// P and dP of LANES places, and P (dP - c).
template <int LANES, bool DROPS, class Center>
MOLEX_INLINE Floats<LANES> place(
    const Side& side, int64_t at, Floats<LANES> weight, Floats<LANES> upstream, Center center) {
  if constexpr (DROPS) {
    const Floats<LANES> by = load<LANES>(side.kept + at), none{};
    upstream = by == 0.0f ? none : upstream * by;
    store(side.upstream + at, upstream);
    store(side.dropped + at, by == 0.0f ? none : weight * by);
  }
  store(side.weights + at, weight);
  return weight * (upstream - center);
}

template <int LANES, bool PARTIAL, bool TURNED, bool DROPS>
MOLEX_INLINE void weigh(const Scores& scores,
                        const Statistics& rows,
                        const Statistics& columns,
                        const Side& by_row,
                        const Side& by_column) {
  constexpr int kVectors = kBlock / LANES;
  const int vectors = PARTIAL ? scores.width() / LANES : kVectors;
  // Sums of short runs: a large term would round every one that follows.
  constexpr int64_t kRun = 8;
  Floats<LANES> sums[kVectors] = {}, totals[kVectors] = {};
  for (int64_t r = 0; r < scores.rows; ++r) {
    const float shift = rows.shift[r], inverse = rows.inverse[r], center = rows.center[r];
    const int32_t seen = scores.seen(r);
    Floats<LANES> sum = load<LANES>(rows.lanes + r * kPad);
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = r * kBlock + v * LANES;
      const Floats<LANES> z = load<LANES>(scores.z + at) * scores.scale;
      Floats<LANES> weight = exponential(z - shift) * inverse, upstream = load<LANES>(by_row.upstream + at);
      if constexpr (PARTIAL) {
        const auto sees = count_from<LANES>(v * LANES) < seen;
        weight = sees ? weight : Floats<LANES>{};
        upstream = sees ? upstream : Floats<LANES>{};
        store(by_row.upstream + at, upstream);
      }
      sum += place<LANES, DROPS>(by_row, at, weight, upstream, center);
      if constexpr (TURNED) {
        weight = exponential(z - load<LANES>(columns.shift + v * LANES));
        weight *= load<LANES>(columns.inverse + v * LANES);
        sums[v] += place<LANES, DROPS>(by_column,
                                       at,
                                       weight,
                                       load<LANES>(by_column.upstream + at),
                                       load<LANES>(columns.center + v * LANES));
      }
    }
    store(rows.lanes + r * kPad, sum);
    if (TURNED && (r % kRun == kRun - 1 || r == scores.rows - 1)) {
      for (int v = 0; v < vectors; ++v) {
        totals[v] += sums[v];
        sums[v] = Floats<LANES>{};
      }
    }
  }
  if constexpr (TURNED) {
    for (int v = 0; v < vectors; ++v) {
      store(columns.along + v * LANES, load<LANES>(columns.along + v * LANES) + totals[v]);
    }
  }
}

// P and what a block adds to D; on both sides where there is `by_column`.
inline constexpr auto weigh_block = versions([](auto registers,
                                                const Scores& scores,
                                                const Statistics& rows,
                                                const Statistics& columns,
                                                const Side& by_row,
                                                const Side& by_column) MOLEX_LAMBDA_INLINE {
  constexpr int kLanes = registers.kLanes;
  const auto with = [&]<bool PARTIAL, bool TURNED>() MOLEX_LAMBDA_INLINE {
    by_row.kept ? weigh<kLanes, PARTIAL, TURNED, true>(scores, rows, columns, by_row, by_column)
                : weigh<kLanes, PARTIAL, TURNED, false>(scores, rows, columns, by_row, by_column);
  };
  if (by_column.weights) {
    scores.partial() ? with.template operator()<true, true>() : with.template operator()<false, true>();
  } else {
    scores.partial() ? with.template operator()<true, false>() : with.template operator()<false, false>();
  }
});

// scale dZ by row, or of both sides.
inline constexpr auto differentiate_block = versions([](auto registers,
                                                        const Scores& scores,
                                                        const Statistics& rows,
                                                        const Statistics& columns,
                                                        const Side& by_row,
                                                        const Side& by_column,
                                                        float* slopes) MOLEX_LAMBDA_INLINE {
  constexpr int kLanes = registers.kLanes;
  for (int64_t r = 0; r < scores.rows; ++r) {
    const float along = rows.along[r];
    for (int64_t c = 0; c < scores.width(); c += kLanes) {
      const int64_t at = r * kBlock + c;
      auto slope = load<kLanes>(by_row.weights + at) * (load<kLanes>(by_row.upstream + at) - along);
      if (by_column.weights) {
        const auto upstream = load<kLanes>(by_column.upstream + at) - load<kLanes>(columns.along + c);
        slope += load<kLanes>(by_column.weights + at) * upstream;
      }
      store(slopes + at, slope * scores.scale);
    }
  }
});

// x + x^T in the place of x [count, count].
inline void symmetrise(float* x, int64_t count) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t c = 0; c < r; ++c) {
      const float sum = x[r * kBlock + c] + x[c * kBlock + r];
      x[r * kBlock + c] = sum;
      x[c * kBlock + r] = sum;
    }
    x[r * kBlock + r] += x[r * kBlock + r];
  }
}

// What goes into an iteration's attention and comes out of its gradient; [rows, padded] each. `left` is q or
// the cleaned keys, and its gradient then that of these.
struct Operands {
  const float *left, *clean, *clean_turned, *v, *v_turned, *dlow, *dlow_turned;
  float *dleft, *dclean, *dv;
};

class AttentionBackward {
 public:
  AttentionBackward(const Problem& p, Scratch& scratch)
      : p_(p), padded_(p.padded()), whole_(p.symmetric() && p.length <= kWhole) {
    const auto blocks = [&](int64_t count) { return scratch.take(count * kBlock * kBlock); };
    const int64_t side = (p.length + kBlock - 1) / kBlock;
    z_ = blocks(1);
    for (Side* side : {&spare_row_, &spare_column_}) {
      side->dropped = p.dropout.on ? blocks(1) : nullptr;
      side->kept = p.dropout.on ? blocks(1) : nullptr;
    }
    store_ = blocks(whole_ ? 2 * side * (side + 1) : 2 * side);
  }

  void operator()(const Tokens& tokens, const Operands& o, const Statistics& statistics, bool drops) const {
    const int64_t count = tokens.count(), group = whole_ ? std::max<int64_t>(count, 1) : kBlock;
    std::fill_n(statistics.along, round_up(count, kBlock), 0.0f);
    std::fill_n(statistics.lanes, count * kPad, 0.0f);
    for (int64_t first = 0; first < count; first += group) {
      const int64_t end = std::min(first + group, count);
      visit(first, end, count, [&](int64_t i, int64_t j, float* blocks) {
        weigh(tokens, o, statistics, drops, i, j, blocks);
      });
      for (int64_t i = first; i < end; ++i) {
        double sum = statistics.along[i];
        for (int64_t lane = 0; lane < kPad; ++lane) sum += statistics.lanes[i * kPad + lane];
        statistics.along[i] = static_cast<float>(statistics.center[i] + sum);
      }
      visit(first, end, count, [&](int64_t i, int64_t j, float* blocks) {
        differentiate(tokens, o, statistics, i, j, blocks);
      });
    }
  }

 private:
  // The blocks of a group, each with its place for P and dP, of both sides where it has two.
  template <class Visit>
  void visit(int64_t first, int64_t end, int64_t count, const Visit& visit) const {
    float* blocks = store_;
    for (int64_t i = first; i < end; i += kBlock) {
      for (int64_t j = whole_ ? i : 0; j < (p_.causal ? i + 1 : count); j += kBlock) {
        visit(i, j, blocks);
        blocks += (both(i, j) ? 4 : 2) * kBlock * kBlock;
      }
    }
  }

  bool both(int64_t i, int64_t j) const { return whole_ && i != j; }

  Scores scores_at(const Tokens& tokens, int64_t i, int64_t j) const {
    return {z_, p_.scale, tokens.rows_of(i), tokens.rows_of(j), p_.causal && i == j};
  }

  // P and dP at `blocks`.
  static Side side_at(float* blocks) { return {blocks, blocks + kBlock * kBlock, blocks, nullptr}; }

  void weigh(const Tokens& tokens,
             const Operands& o,
             const Statistics& statistics,
             bool drops,
             int64_t i,
             int64_t j,
             float* blocks) const {
    const Scores scores = scores_at(tokens, i, j);
    Side by_row = side_at(blocks), by_column = both(i, j) ? side_at(blocks + 2 * kBlock * kBlock) : Side{};
    if (drops) {
      by_row.dropped = spare_row_.dropped, by_row.kept = spare_row_.kept;
      dropout_block(tokens, i, j, false, by_row.kept);
      if (both(i, j)) {
        by_column.dropped = spare_column_.dropped, by_column.kept = spare_column_.kept;
        dropout_block(tokens, i, j, true, by_column.kept);
      }
    }
    scores_of(o.left + i * padded_, o.clean_turned + j * p_.width, scores, z_);
    scores_of(o.dlow + i * padded_, o.v_turned + j * p_.width, scores, by_row.upstream);
    if (both(i, j)) scores_of(o.v + i * padded_, o.dlow_turned + j * p_.width, scores, by_column.upstream);
    weigh_block(scores, statistics.at(i), statistics.at(j), by_row, by_column);
    add_turned(tokens, by_row.dropped, o.dlow, o.dv, i, j);
    if (both(i, j)) add(tokens, by_column.dropped, o.dlow, o.dv, i, j);
  }

  void differentiate(const Tokens& tokens,
                     const Operands& o,
                     const Statistics& statistics,
                     int64_t i,
                     int64_t j,
                     float* blocks) const {
    const Side by_row = side_at(blocks),
               by_column = both(i, j) ? side_at(blocks + 2 * kBlock * kBlock) : Side{};
    const Scores scores = scores_at(tokens, i, j);
    differentiate_block(scores, statistics.at(i), statistics.at(j), by_row, by_column, z_);
    if (i == j && !p_.q) {
      symmetrise(z_, scores.rows);
      add(tokens, z_, o.clean, o.dclean, i, j);
    } else {
      add(tokens, z_, o.clean, o.dleft, i, j);
      add_turned(tokens, z_, o.left, o.dclean, i, j);
    }
  }

  void scores_of(const float* left, const float* turned, const Scores& s, float* to) const {
    product({left, padded_, turned, kBlock, to, kBlock, s.rows, s.width(), p_.width, false});
  }

  // Rows i of `to` += block * rows j of `from`.
  void add(
      const Tokens& tokens, const float* block, const float* from, float* to, int64_t i, int64_t j) const {
    const int64_t rows = tokens.rows_of(i), depth = tokens.rows_of(j);
    product(
        {block, kBlock, from + j * padded_, padded_, to + i * padded_, padded_, rows, padded_, depth, true});
  }

  // Rows j of `to` += block^T * rows i of `from`.
  void add_turned(
      const Tokens& tokens, const float* block, const float* from, float* to, int64_t i, int64_t j) const {
    const int64_t rows = tokens.rows_of(j), depth = tokens.rows_of(i);
    product_turned(
        {block, kBlock, from + i * padded_, padded_, to + j * padded_, padded_, rows, padded_, depth, true});
  }

  const Problem& p_;
  int64_t padded_;
  bool whole_;
  float *z_, *store_;
  Side spare_row_{}, spare_column_{};
};

}  // namespace molex::rpc
