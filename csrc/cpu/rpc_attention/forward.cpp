// Robust attention's forward pass on a CPU.

#include <cmath>
#include <limits>
#include <tuple>

#include "cpu/common/memory.h"
#include "cpu/rpc_attention/tile_forward.h"
#include "registration.h"

namespace molex::rpc {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Returns how far a score exceeds the shift of its row and, if columns are served too, of its column.
constexpr float kSlack = 10.0f;

// Rows of an unfinished softmax: low_rank = sum exp(score - shift) v. The sum of exp(score - shift) is kept
// in `sums` and in the lanes of `lanes` [rows, kPad]. The shift of a row is one of its scores, close to the
// largest.
struct Rows {
  float *low_rank, *shift, *sums, *lanes;

  Rows at(int64_t row, int64_t padded) const {
    return {low_rank + row * padded, shift + row, sums + row, lanes + row * kPad};
  }
};

// Finds the largest score of each column, and calls `visit` with each row's largest per lane.
template <int LANES, bool PARTIAL, class Visit>
MOLEX_INLINE void find_largest(const Scores& scores, float* by_column, const Visit& visit) {
  constexpr int kVectors = kBlock / LANES;
  const int vectors = PARTIAL ? scores.width() / LANES : kVectors;
  Floats<LANES> columns[kVectors];
  for (int v = 0; v < kVectors; ++v) columns[v] = broadcast<LANES>(-kInfinity);
  for (int64_t r = 0; r < scores.rows; ++r) {
    const int32_t seen = scores.seen(r);
    Floats<LANES> row = broadcast<LANES>(-kInfinity);
    for (int v = 0; v < vectors; ++v) {
      Floats<LANES> z = rounded(load<LANES>(scores.z + r * kBlock + v * LANES) * scores.scale);
      if constexpr (PARTIAL) z = count_from<LANES>(v * LANES) < seen ? z : broadcast<LANES>(-kInfinity);
      row = larger(z, row);
      columns[v] = larger(z, columns[v]);
    }
    visit(r, row);
  }
  for (int v = 0; v < vectors; ++v) store(by_column + v * LANES, columns[v]);
}

// How far a score exceeds the shift of its row and, where it serves them, of its column.
constexpr auto excess_of =
    versions([](auto registers, const Scores& scores, const float* row_shift, const float* column_shift)
                 MOLEX_LAMBDA_INLINE {
                   constexpr int kLanes = registers.kLanes;
                   auto most = broadcast<kLanes>(-kInfinity);
                   float columns[kBlock];
                   const auto visit = [&](int64_t r, Floats<kLanes> row)
                                          MOLEX_LAMBDA_INLINE { most = larger(row - row_shift[r], most); };
                   scores.partial() ? find_largest<kLanes, true>(scores, columns, visit)
                                    : find_largest<kLanes, false>(scores, columns, visit);
                   for (int64_t c = 0; column_shift && c < scores.width(); c += kLanes) {
                     most = larger(load<kLanes>(columns + c) - load<kLanes>(column_shift + c), most);
                   }
                   return largest_lane(most);
                 });

constexpr auto largest_block =
    versions([](auto registers, const Scores& scores, float* by_row, float* by_column) MOLEX_LAMBDA_INLINE {
      constexpr int kLanes = registers.kLanes;
      const auto visit = [&](int64_t r, Floats<kLanes> row)
                             MOLEX_LAMBDA_INLINE { by_row[r] = largest_lane(row); };
      scores.partial() ? find_largest<kLanes, true>(scores, by_column, visit)
                       : find_largest<kLanes, false>(scores, by_column, visit);
    });

template <int LANES, bool PARTIAL, bool BOTH_SIDES>
MOLEX_INLINE void probabilities(
    const Scores& scores, const Rows& rows, const Rows& columns, float* by_row, float* by_column) {
  constexpr int kVectors = kBlock / LANES;
  const int vectors = PARTIAL ? scores.width() / LANES : kVectors;
  Floats<LANES> sums[kVectors] = {};
  for (int64_t r = 0; r < scores.rows; ++r) {
    const float shift = rows.shift[r];
    const int32_t seen = scores.seen(r);
    Floats<LANES> sum = load<LANES>(rows.lanes + r * kPad);
    for (int v = 0; v < vectors; ++v) {
      const Floats<LANES> z = rounded(load<LANES>(scores.z + r * kBlock + v * LANES) * scores.scale);
      Floats<LANES> above = z - shift;
      if constexpr (PARTIAL)
        above = count_from<LANES>(v * LANES) < seen ? above : broadcast<LANES>(-kInfinity);
      Floats<LANES> weight = exponential(above);
      store(by_row + r * kBlock + v * LANES, weight);
      sum += weight;
      if constexpr (BOTH_SIDES) {
        weight = exponential(z - load<LANES>(columns.shift + v * LANES));
        store(by_column + r * kBlock + v * LANES, weight);
        sums[v] += weight;
      }
    }
    store(rows.lanes + r * kPad, sum);
  }
  if constexpr (BOTH_SIDES) {
    for (int v = 0; v < vectors; ++v) {
      store(columns.sums + v * LANES, load<LANES>(columns.sums + v * LANES) + sums[v]);
    }
  }
}

// Computes exp(score - shift) by row and, if `by_column` is given, with the shifts of the columns.
constexpr auto probabilities_block = versions([](auto registers,
                                                 const Scores& scores,
                                                 const Rows& rows,
                                                 const Rows& columns,
                                                 float* by_row,
                                                 float* by_column) MOLEX_LAMBDA_INLINE {
  constexpr int kLanes = registers.kLanes;
  if (by_column) {
    scores.partial() ? probabilities<kLanes, true, true>(scores, rows, columns, by_row, by_column)
                     : probabilities<kLanes, false, true>(scores, rows, columns, by_row, by_column);
  } else {
    scores.partial() ? probabilities<kLanes, true, false>(scores, rows, columns, by_row, by_column)
                     : probabilities<kLanes, false, false>(scores, rows, columns, by_row, by_column);
  }
});

// Computes x / sum with the inverse in two parts: the rounding of a single inverse would shift all elements
// of the row the same way.
constexpr auto divide_row = versions([](auto, float* x, double sum, int64_t count) MOLEX_LAMBDA_INLINE {
  const float by = static_cast<float>(1.0 / sum), rest = static_cast<float>(1.0 / sum - by);
  for (int64_t i = 0; i < count; ++i) x[i] = x[i] * by + x[i] * rest;
});

constexpr auto scale_row = versions([](auto, float* x, float by, int64_t count) MOLEX_LAMBDA_INLINE {
  for (int64_t i = 0; i < count; ++i) x[i] *= by;
});

// Makes `largest` the shift of a row if it is above the present one.
void raise(const Rows& row, float largest, int64_t padded) {
  if (!(largest > *row.shift)) return;
  const float by = std::exp(*row.shift - largest);
  *row.shift = largest;
  *row.sums *= by;
  scale_row(row.lanes, by, kPad);
  scale_row(row.low_rank, by, padded);
}

void raise_shifts(const Scores& scores, const Rows& rows, const Rows* columns, int64_t padded) {
  float by_row[kBlock], by_column[kBlock];
  largest_block(scores, by_row, by_column);
  for (int64_t r = 0; r < scores.rows; ++r) raise(rows.at(r, padded), by_row[r], padded);
  for (int64_t c = 0; columns && c < scores.columns; ++c) raise(columns->at(c, padded), by_column[c], padded);
}

// Computes low_rank = softmax(scale queries K~^T) v. Blocks of scores and probabilities are kBlock x kBlock.
class Attention {
 public:
  Attention(const Problem& p, Scratch& scratch)
      : p_(p),
        padded_(p.padded()),
        z_(scratch.take(kBlock * kBlock)),
        by_row_(scratch.take(kBlock * kBlock)),
        by_column_(scratch.take(kBlock * kBlock)),
        kept_(scratch.take(p.dropout.on ? kBlock * kBlock : 0)) {
    const int64_t rows = round_up(p.length, kBlock);
    keys_transposed_ = scratch.take(rows * p.width);
    rows_ = {nullptr, scratch.take(rows), scratch.take(rows), scratch.take(rows * kPad)};
  }

  // Takes what is the same in every iteration of a head; `queries` is null where they are the keys.
  void begin(const Tokens&, const float* v, const float* queries) { v_ = v, queries_ = queries; }

  // Rounds the cleaned keys to the dtype of the products.
  void operator()(const Tokens& tokens, float* clean, bool drops, float* low_rank) {
    const int64_t count = tokens.count(), rows = round_up(count, kBlock);
    round_through(p_.dtype, clean, count * padded_);
    transpose_blocks(clean, count, p_.width, padded_, keys_transposed_);
    const float* queries = queries_ ? queries_ : clean;
    rows_.low_rank = low_rank;
    std::fill_n(low_rank, count * padded_, 0.0f);
    std::fill_n(rows_.shift, rows, -kInfinity);
    std::fill_n(rows_.sums, rows, 0.0f);
    std::fill_n(rows_.lanes, rows * kPad, 0.0f);
    visit_blocks(p_, count, [&](int64_t i, int64_t j) { add_block(tokens, queries, drops, i, j); });
    for (int64_t i = 0; i < count; ++i) {
      double sum = rows_.sums[i];
      for (int64_t lane = 0; lane < kPad; ++lane) sum += rows_.lanes[i * kPad + lane];
      rows_.sums[i] = static_cast<float>(1.0 / sum);
      divide_row(low_rank + i * padded_, sum, padded_);
    }
  }

  // Statistics of the last call: probabilities are exp(score - shift) times the inverse.
  const float* shift() const { return rows_.shift; }
  const float* inverse() const { return rows_.sums; }

 private:
  void add_block(const Tokens& tokens, const float* queries, bool drops, int64_t i, int64_t j) {
    const Scores scores{z_, p_.scale, tokens.rows_of(i), tokens.rows_of(j), p_.causal && i == j};
    const Rows rows = rows_.at(i, padded_), columns = rows_.at(j, padded_);
    float* by_column = p_.symmetric() && i != j ? by_column_ : nullptr;
    product({queries + i * padded_,
             padded_,
             keys_transposed_ + j * p_.width,
             kBlock,
             z_,
             kBlock,
             scores.rows,
             scores.width(),
             p_.width,
             false});
    // The block on the diagonal is the first of its rows.
    const bool raises = i == j || excess_of(scores, rows.shift, by_column ? columns.shift : nullptr) > kSlack;
    if (raises) raise_shifts(scores, rows, by_column ? &columns : nullptr, padded_);
    probabilities_block(scores, rows, columns, by_row_, by_column);
    if (drops) {
      drop(tokens, i, j, false, by_row_);
      if (by_column) drop(tokens, i, j, true, by_column);
    }
    product({by_row_,
             kBlock,
             v_ + j * padded_,
             padded_,
             rows.low_rank,
             padded_,
             scores.rows,
             padded_,
             scores.columns,
             true});
    if (by_column) {
      product_transposed({by_column,
                          kBlock,
                          v_ + i * padded_,
                          padded_,
                          columns.low_rank,
                          padded_,
                          scores.columns,
                          padded_,
                          scores.rows,
                          true});
    }
  }

  void drop(const Tokens& tokens, int64_t i, int64_t j, bool transposed, float* weights) {
    dropout_block(tokens, i, j, transposed, kept_);
    for (int64_t e = 0; e < kBlock * kBlock; ++e)
      weights[e] = kept_[e] != 0.0f ? weights[e] * kept_[e] : 0.0f;
  }

  const Problem& p_;
  int64_t padded_;
  float *z_, *by_row_, *by_column_, *kept_, *keys_transposed_;
  const float *v_ = nullptr, *queries_ = nullptr;
  Rows rows_;
};

// Where the results go. What is not wanted is null.
struct Results {
  Target out, sparse;
  float *low_ranks, *stats;
};

// Runs all iterations of the heads from `begin` to `end`.
template <class OneAttention>
void run_heads(const Problem& p, const Results& to, int64_t begin, int64_t end) {
  Scratch scratch;
  OneAttention attention(p, scratch);
  const int64_t size = p.length * p.padded(), all = p.all_heads() * p.length;
  const auto take = [&](bool wanted) { return wanted ? scratch.take(size) : nullptr; };
  float *keys = take(true), *values = take(true), *queries = take(static_cast<bool>(p.q));
  float *low_rank = take(true), *u = take(true), *clean = take(true);
  float* sparse = take(static_cast<bool>(to.sparse));
  for (int64_t head = begin; head < end; ++head) {
    const Tokens tokens(p, head);
    const int64_t used = tokens.count() * p.padded();
    tokens.read_rows(p.k, keys);
    tokens.read_rows(p.v, values);
    if (queries) tokens.read_rows(p.q, queries);
    attention.begin(tokens, values, queries);
    std::fill_n(low_rank, used, 0.0f);
    std::fill_n(u, used, 0.0f);
    for (int64_t t = 0; t < p.iterations; ++t) {
      const bool last = t == p.iterations - 1;
      soft_threshold(tokens, keys, low_rank, u, clean, u, last ? sparse : nullptr);
      attention(tokens, clean, p.dropout.on && last, low_rank);
      if (!last) subtract(u, low_rank, used);
      if (!to.stats) continue;
      tokens.write_numbers(to.stats + 2 * t * all, attention.shift());
      tokens.write_numbers(to.stats + (2 * t + 1) * all, attention.inverse());
      if (!last) tokens.write_rows({to.low_ranks + t * all * p.width}, low_rank);
    }
    tokens.write_rows(to.out, low_rank);
    if (sparse) tokens.write_rows(to.sparse, sparse);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rpc_attention_fwd(const Tensor& k,
                                                                     const Tensor& v,
                                                                     Optional q,
                                                                     const Tensor& threshold,
                                                                     Optional key_mask,
                                                                     Optional seed,
                                                                     int64_t num_iters,
                                                                     double scale,
                                                                     bool is_causal,
                                                                     double dropout_p,
                                                                     bool keeps_state,
                                                                     bool returns_sparse) {
  const Problem p(k, v, q, threshold, key_mask, seed, num_iters, scale, is_causal, dropout_p);
  const int64_t b = p.batch, h = p.heads, n = p.length, d = p.width;
  const auto floats = [&](bool wanted, std::initializer_list<int64_t> sizes) {
    return wanted ? molex::new_result(k, sizes, ScalarType::Float)
                  : molex::new_result(k, {0}, ScalarType::Float);
  };
  Tensor out = molex::new_result(k, {b, h, n, d});
  Tensor sparse = floats(returns_sparse, {b, h, n, d});
  // The backward pass sums D anew: it needs nothing of what rounding takes from L.
  Tensor out_rest = keeps_state && k.scalar_type() != ScalarType::Float ? molex::new_result(k, k.sizes())
                                                                        : molex::new_result(k, {0});
  torch::stable::fill_(out_rest, 0.0);
  Tensor low_ranks = floats(keeps_state, {num_iters - 1, b, h, n, d});
  Tensor stats = floats(keeps_state, {num_iters, 2, b, h, n});
  const Results to{target_of(out),
                   returns_sparse ? target_of(sparse) : Target{},
                   keeps_state ? low_ranks.mutable_data_ptr<float>() : nullptr,
                   keeps_state ? stats.mutable_data_ptr<float>() : nullptr};
  torch::stable::parallel_for(0, p.all_heads(), 1, [&](int64_t begin, int64_t end) {
    if (p.tiled) {
      const TileScope tiles;
      run_heads<TiledAttention>(p, to, begin, end);
    } else {
      run_heads<Attention>(p, to, begin, end);
    }
  });
  return {out, sparse, out_rest, low_ranks, stats};
}

}  // namespace
}  // namespace molex::rpc

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("rpc_attention_fwd", molex::cpu_kernel<&molex::rpc::rpc_attention_fwd>);
}
