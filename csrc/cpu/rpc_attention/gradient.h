// The gradient of one iteration's attention, in blocks of scores.
//
// Scores are recomputed from the cleaned keys, and probabilities P from the saved row statistics. With dL for
// the gradient of the iteration's L, a block of rows i and columns j needs dP = dL_i v_j^T and dZ = P (dP -
// D_i), where D_i = sum_j P dP. In exact arithmetic D_i is c = <dL_i, L_i>, but that is rounded differently,
// and where P is close to 1 the difference dP - D_i would consist of this error. So D_i is computed as c +
// sum_j P (dP - c): its terms are small both where P is small and where P is close to 1. A group of blocks
// therefore gets P, dP and D first, and dZ afterwards. A block that also serves its columns has the same for
// i and j exchanged, stored transposed: (dZ + dZ^T) K~ is then one product for each side.

#pragma once

#include "cpu/rpc_attention/steps.h"

namespace molex::rpc {

constexpr int64_t kWhole = 512;  // tokens up to which the blocks of a head are one group

// The statistics of rows: P = exp(score - shift) * inverse; center is c; delta becomes D. The sum P (dP - c)
// is gathered in `delta` and in the lanes of `lanes` [rows, kPad].
struct Statistics {
  float *shift, *inverse, *center, *delta, *lanes;

  Statistics at(int64_t row) const {
    return {shift + row, inverse + row, center + row, delta + row, lanes + row * kPad};
  }
};

// The blocks [kBlock, kBlock] of one side: P, dP (with dropout undone), and what the values are multiplied
// with, which is P or, under dropout, a block of its own. `kept` holds dropout's factors, or is null.
struct Side {
  float *weights, *upstream, *dropped, *kept;
};

// Stores P and dP of LANES elements and returns P (dP - c).
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

template <int LANES, bool PARTIAL, bool BOTH_SIDES, bool DROPS>
MOLEX_INLINE void probabilities(const Scores& scores,
                                const Statistics& rows,
                                const Statistics& columns,
                                const Side& by_row,
                                const Side& by_column) {
  constexpr int kVectors = kBlock / LANES;
  const int vectors = PARTIAL ? scores.width() / LANES : kVectors;
  // Short runs are summed separately: after one large term every later term would be rounded.
  constexpr int64_t kRun = 8;
  Floats<LANES> sums[kVectors] = {}, totals[kVectors] = {};
  for (int64_t r = 0; r < scores.rows; ++r) {
    const float shift = rows.shift[r], inverse = rows.inverse[r], center = rows.center[r];
    const int32_t seen = scores.seen(r);
    Floats<LANES> sum = load<LANES>(rows.lanes + r * kPad);
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = r * kBlock + v * LANES;
      const Floats<LANES> z = rounded(load<LANES>(scores.z + at) * scores.scale);
      Floats<LANES> weight = exponential(z - shift) * inverse, upstream = load<LANES>(by_row.upstream + at);
      if constexpr (PARTIAL) {
        const auto sees = count_from<LANES>(v * LANES) < seen;
        weight = sees ? weight : Floats<LANES>{};
        upstream = sees ? upstream : Floats<LANES>{};
        store(by_row.upstream + at, upstream);
      }
      sum += place<LANES, DROPS>(by_row, at, weight, upstream, center);
      if constexpr (BOTH_SIDES) {
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
    if (BOTH_SIDES && (r % kRun == kRun - 1 || r == scores.rows - 1)) {
      for (int v = 0; v < vectors; ++v) {
        totals[v] += sums[v];
        sums[v] = Floats<LANES>{};
      }
    }
  }
  if constexpr (BOTH_SIDES) {
    for (int v = 0; v < vectors; ++v) {
      store(columns.delta + v * LANES, load<LANES>(columns.delta + v * LANES) + totals[v]);
    }
  }
}

// Computes P and what a block adds to D; for both sides if `by_column` is given.
inline constexpr auto probabilities_block = versions([](auto registers,
                                                        const Scores& scores,
                                                        const Statistics& rows,
                                                        const Statistics& columns,
                                                        const Side& by_row,
                                                        const Side& by_column) MOLEX_LAMBDA_INLINE {
  constexpr int kLanes = registers.kLanes;
  const auto with = [&]<bool PARTIAL, bool BOTH_SIDES>() MOLEX_LAMBDA_INLINE {
    by_row.kept ? probabilities<kLanes, PARTIAL, BOTH_SIDES, true>(scores, rows, columns, by_row, by_column)
                : probabilities<kLanes, PARTIAL, BOTH_SIDES, false>(scores, rows, columns, by_row, by_column);
  };
  if (by_column.weights) {
    scores.partial() ? with.template operator()<true, true>() : with.template operator()<false, true>();
  } else {
    scores.partial() ? with.template operator()<true, false>() : with.template operator()<false, false>();
  }
});

// Computes scale dZ of the rows' side, or the sum of both sides'.
inline constexpr auto differentiate_block = versions([](auto registers,
                                                        const Scores& scores,
                                                        const Statistics& rows,
                                                        const Statistics& columns,
                                                        const Side& by_row,
                                                        const Side& by_column,
                                                        float* slopes) MOLEX_LAMBDA_INLINE {
  constexpr int kLanes = registers.kLanes;
  for (int64_t r = 0; r < scores.rows; ++r) {
    const float delta = rows.delta[r];
    for (int64_t c = 0; c < scores.width(); c += kLanes) {
      const int64_t at = r * kBlock + c;
      auto slope = load<kLanes>(by_row.weights + at) * (load<kLanes>(by_row.upstream + at) - delta);
      if (by_column.weights) {
        const auto upstream = load<kLanes>(by_column.upstream + at) - load<kLanes>(columns.delta + c);
        slope += load<kLanes>(by_column.weights + at) * upstream;
      }
      store(slopes + at, slope * scores.scale);
    }
  }
});

// Replaces x [count, count] by x + x^T.
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

// What an iteration's attention reads, and the gradients that it adds to; [rows, padded] each. dqueries
// belongs to q or, without one, to the cleaned keys.
struct Operands {
  float* clean;  // is rounded to the dtype of the products
  const float* dlow_rank;
  float *dqueries, *dclean, *dv;
};

class AttentionBackward {
 public:
  // As many rows are written of the gradients that are added to.
  static int64_t rows_of(int64_t length) { return length; }

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
    for (float** array : {&clean_transposed_, &v_transposed_, &dlow_rank_transposed_})
      *array = scratch.take(side * kBlock * p.width);
  }

  // Takes what is the same in every iteration of a head; `queries` is null where they are the keys.
  void begin(const Tokens& tokens, const float* v, const float* queries) {
    v_ = v, queries_ = queries;
    transpose_blocks(v, tokens.count(), p_.width, padded_, v_transposed_);
  }

  void operator()(const Tokens& tokens, const Operands& o, const Statistics& statistics, bool drops) const {
    const int64_t count = tokens.count(), group = whole_ ? std::max<int64_t>(count, 1) : kBlock;
    round_through(p_.dtype, o.clean, count * padded_);
    transpose_blocks(o.clean, count, p_.width, padded_, clean_transposed_);
    if (p_.symmetric()) transpose_blocks(o.dlow_rank, count, p_.width, padded_, dlow_rank_transposed_);
    std::fill_n(statistics.delta, round_up(count, kBlock), 0.0f);
    std::fill_n(statistics.lanes, count * kPad, 0.0f);
    for (int64_t first = 0; first < count; first += group) {
      const int64_t end = std::min(first + group, count);
      visit(first, end, count, [&](int64_t i, int64_t j, float* blocks) {
        recompute(tokens, o, statistics, drops, i, j, blocks);
      });
      for (int64_t i = first; i < end; ++i) {
        double sum = statistics.delta[i];
        for (int64_t lane = 0; lane < kPad; ++lane) sum += statistics.lanes[i * kPad + lane];
        statistics.delta[i] = static_cast<float>(statistics.center[i] + sum);
      }
      visit(first, end, count, [&](int64_t i, int64_t j, float* blocks) {
        differentiate(tokens, o, statistics, i, j, blocks);
      });
    }
  }

 private:
  // Visits the blocks of a group, each with its memory for P and dP, of both sides if it has two.
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

  const float* queries(const Operands& o) const { return queries_ ? queries_ : o.clean; }

  bool both(int64_t i, int64_t j) const { return whole_ && i != j; }

  Scores scores_at(const Tokens& tokens, int64_t i, int64_t j) const {
    return {z_, p_.scale, tokens.rows_of(i), tokens.rows_of(j), p_.causal && i == j};
  }

  // P and dP in the memory at `blocks`.
  static Side side_at(float* blocks) { return {blocks, blocks + kBlock * kBlock, blocks, nullptr}; }

  void recompute(const Tokens& tokens,
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
    scores_of(queries(o) + i * padded_, clean_transposed_ + j * p_.width, scores, z_);
    scores_of(o.dlow_rank + i * padded_, v_transposed_ + j * p_.width, scores, by_row.upstream);
    if (both(i, j))
      scores_of(v_ + i * padded_, dlow_rank_transposed_ + j * p_.width, scores, by_column.upstream);
    probabilities_block(scores, statistics.at(i), statistics.at(j), by_row, by_column);
    add_transposed(tokens, by_row.dropped, o.dlow_rank, o.dv, i, j);
    if (both(i, j)) add(tokens, by_column.dropped, o.dlow_rank, o.dv, i, j);
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
      add(tokens, z_, o.clean, o.dqueries, i, j);
      add_transposed(tokens, z_, queries(o), o.dclean, i, j);
    }
  }

  void scores_of(const float* a, const float* b_transposed, const Scores& s, float* to) const {
    product({a, padded_, b_transposed, kBlock, to, kBlock, s.rows, s.width(), p_.width, false});
  }

  // Adds block * (rows j of `from`) to rows i of `to`.
  void add(
      const Tokens& tokens, const float* block, const float* from, float* to, int64_t i, int64_t j) const {
    const int64_t rows = tokens.rows_of(i), depth = tokens.rows_of(j);
    product(
        {block, kBlock, from + j * padded_, padded_, to + i * padded_, padded_, rows, padded_, depth, true});
  }

  // Adds block^T * (rows i of `from`) to rows j of `to`.
  void add_transposed(
      const Tokens& tokens, const float* block, const float* from, float* to, int64_t i, int64_t j) const {
    const int64_t rows = tokens.rows_of(j), depth = tokens.rows_of(i);
    product_transposed(
        {block, kBlock, from + i * padded_, padded_, to + j * padded_, padded_, rows, padded_, depth, true});
  }

  const Problem& p_;
  int64_t padded_;
  bool whole_;
  float *z_, *store_, *clean_transposed_, *v_transposed_, *dlow_rank_transposed_;
  const float *v_ = nullptr, *queries_ = nullptr;
  Side spare_row_{}, spare_column_{};
};

}  // namespace molex::rpc
