// Robust attention's backward pass on a CPU.
//
// The iterations run backwards. Each remakes its scores from the saved L of the one before and its
// probabilities from the saved row statistics. With dL for the gradient of an iteration's L, a block of
// rows i and columns j needs dP = dL_i v_j^T, and dZ = P (dP - <dL_i, L_i>); where it serves its columns,
// too, the same with i and j exchanged, kept as the transpose: then (dZ + dZ^T) K~ is one product a side.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "rpc_attention.h"

namespace molex::rpc {
namespace {

// A row's statistics: P = exp(score - shift) * inverse; `along` is <dL, L>.
struct Statistics {
  float *shift, *inverse, *along;

  Statistics at(int64_t row) const { return {shift + row, inverse + row, along + row}; }
};

// Blocks [kBlock, kBlock] of one pair, by row: probabilities, their gradients, what dropout multiplies them
// with (null without), and the gradient of the scores.
struct Pair {
  float *weights, *slopes, *kept;
};

// x y, and 0 where y is, whatever x is.
template <int LANES>
MOLEX_INLINE Floats<LANES> drop(Floats<LANES> x, const float* y) {
  const Floats<LANES> by = load<LANES>(y);
  return by == 0.0f ? Floats<LANES>{} : x * by;
}

// One side of some columns: the gradient of the scores, and the probabilities as the values saw them.
template <int LANES, bool DROPS>
MOLEX_INLINE Floats<LANES> slope(Floats<LANES> weight, const Pair& pair, int64_t at, Floats<LANES> along) {
  Floats<LANES> upstream = load<LANES>(pair.slopes + at), dropped = weight;
  if constexpr (DROPS) {
    upstream = drop<LANES>(upstream, pair.kept + at);
    dropped = drop<LANES>(weight, pair.kept + at);
  }
  store<LANES>(pair.weights + at, dropped);
  return weight * (upstream - along);
}

// The gradient of the scores goes to `by_row.slopes`, that of both sides where there is `by_column`.
template <int LANES, bool PARTIAL, bool TURNED, bool DROPS>
MOLEX_INLINE void differentiate(const Scores& scores,
                                const Statistics& rows,
                                const Statistics& columns,
                                const Pair& by_row,
                                const Pair& by_column) {
  for (int64_t r = 0; r < scores.rows; ++r) {
    const float shift = rows.shift[r], inverse = rows.inverse[r], along = rows.along[r];
    const int32_t seen = scores.seen(r);
    for (int c = 0; c < kBlock; c += LANES) {
      const int64_t at = r * kBlock + c;
      const Floats<LANES> z = load<LANES>(scores.z + at) * scores.scale;
      Floats<LANES> weight = exponential<LANES>(z - shift) * inverse;
      if constexpr (PARTIAL) weight = count_from<LANES>(c) < seen ? weight : Floats<LANES>{};
      Floats<LANES> total = slope<LANES, DROPS>(weight, by_row, at, broadcast<LANES>(along));
      if constexpr (TURNED) {
        weight = exponential<LANES>(z - load<LANES>(columns.shift + c)) * load<LANES>(columns.inverse + c);
        total += slope<LANES, DROPS>(weight, by_column, at, load<LANES>(columns.along + c));
      }
      store<LANES>(by_row.slopes + at, total * scores.scale);
    }
  }
}

MOLEX_VERSIONS(
    differentiate_block,
    (const Scores& scores,
     const Statistics& rows,
     const Statistics& columns,
     const Pair& by_row,
     const Pair& by_column),
    const auto with = [&]<bool PARTIAL, bool TURNED>() MOLEX_LAMBDA_INLINE {
      by_row.kept ? differentiate<kLanes, PARTIAL, TURNED, true>(scores, rows, columns, by_row, by_column)
                  : differentiate<kLanes, PARTIAL, TURNED, false>(scores, rows, columns, by_row, by_column);
    };
    if (by_column.weights) {
      scores.partial() ? with.template operator()<true, true>() : with.template operator()<false, true>();
    } else {
      scores.partial() ? with.template operator()<true, false>() : with.template operator()<false, false>();
    })

// x + x^T in the place of x [count, count].
void symmetrise(float* x, int64_t count) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t c = 0; c < r; ++c) {
      const float sum = x[r * kBlock + c] + x[c * kBlock + r];
      x[r * kBlock + c] = sum;
      x[c * kBlock + r] = sum;
    }
    x[r * kBlock + r] += x[r * kBlock + r];
  }
}

// dL = dlow - du in the place of dlow, dk += du, and <dL, L> of each row.
MOLEX_VERSIONS(
    upstream_row,
    (int64_t width, const float* low, const float* du, float* dlow, float* dk, float* along),
    auto sum = Floats<kLanes>{};
    for (int64_t c = 0; c < width; c += kLanes) {
      const auto dual = load<kLanes>(du + c);
      const auto total = load<kLanes>(dlow + c) - dual;
      store<kLanes>(dlow + c, total);
      store<kLanes>(dk + c, load<kLanes>(dk + c) + dual);
      sum += total * load<kLanes>(low + c);
    } *along = sum_of<kLanes>(sum);)

// Through the shrinkage of a row: da = m (dS - du - dclean) with dS = `push`, what reaches the result from
// outside, or null. dk += dclean + da, dlow = -da, du += da - dclean, and the threshold's own gradient.
MOLEX_VERSIONS(
    shrinkage_row,
    (float bound,
     int64_t width,
     const float* k,
     const float* low,
     const float* u,
     const float* dclean,
     const float* push,
     float* du,
     float* dk,
     float* dlow,
     float* dbound),
    auto sum = Floats<kLanes>{};
    for (int64_t c = 0; c < width; c += kLanes) {
      const auto a = load<kLanes>(k + c) - load<kLanes>(low + c) + load<kLanes>(u + c);
      const auto dual = load<kLanes>(du + c);
      const auto through = load<kLanes>(dclean + c);
      auto da = -dual - through;
      if (push) da += load<kLanes>(push + c);
      da = (a < 0.0f ? -a : a) < bound ? Floats<kLanes>{} : da;
      sum += a > 0.0f ? da : a < 0.0f ? -da : a * da;
      store<kLanes>(dk + c, load<kLanes>(dk + c) + (through + da));
      store<kLanes>(dlow + c, -da);
      store<kLanes>(du + c, dual - through + da);
    } *dbound -= sum_of<kLanes>(sum);)

MOLEX_CLONES void subtract_into(float* to, const float* x, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = x[i] - y[i];
}

// What goes into an iteration's attention and comes out of its gradient; [rows, padded] each. `left` is q or
// the cleaned keys, and its gradient then that of these.
struct Operands {
  const float *left, *clean, *clean_turned, *v, *v_turned, *dlow, *dlow_turned;
  float *dleft, *dclean, *dv;
};

class AttentionBackward {
 public:
  AttentionBackward(const Problem& p, Scratch& scratch) : p_(p), padded_(p.padded()) {
    const auto block = [&](bool wanted) { return wanted ? scratch.take(kBlock * kBlock) : nullptr; };
    const bool both = p.symmetric();
    z_ = block(true);
    by_row_ = {block(true), block(true), block(p.dropout.on)};
    by_column_ = {block(both), block(both), block(both && p.dropout.on)};
  }

  void operator()(const Tokens& tokens, const Operands& o, const Statistics& statistics, bool drops) {
    visit_blocks(p_, tokens.count(), [&](int64_t i, int64_t j) { add_block(tokens, o, statistics, drops, i, j); });
  }

 private:
  void add_block(const Tokens& tokens, const Operands& o, const Statistics& statistics, bool drops, int64_t i, int64_t j) {
    const bool diagonal = i == j, both = p_.symmetric() && !diagonal;
    const Scores scores{z_, p_.scale, tokens.rows_of(i), tokens.rows_of(j), p_.causal && diagonal};
    Pair by_row = by_row_, by_column = both ? by_column_ : Pair{};
    scores_of(o.left + i * padded_, o.clean_turned + j * p_.width, scores.rows, z_);
    scores_of(o.dlow + i * padded_, o.v_turned + j * p_.width, scores.rows, by_row.slopes);
    if (both) scores_of(o.v + i * padded_, o.dlow_turned + j * p_.width, scores.rows, by_column.slopes);
    if (!drops) by_row.kept = by_column.kept = nullptr;
    if (by_row.kept) dropout_block(tokens, i, j, false, by_row.kept);
    if (by_column.kept) dropout_block(tokens, i, j, true, by_column.kept);
    differentiate_block(scores, statistics.at(i), statistics.at(j), by_row, by_column);
    add_turned(scores, by_row.weights, o.dlow, o.dv, i, j);
    if (both) add(scores, by_column.weights, o.dlow, o.dv, i, j);
    if (diagonal && !p_.q) {
      symmetrise(by_row.slopes, scores.rows);
      add(scores, by_row.slopes, o.clean, o.dclean, i, j);
    } else {
      add(scores, by_row.slopes, o.clean, o.dleft, i, j);
      add_turned(scores, by_row.slopes, o.left, o.dclean, i, j);
    }
  }

  void scores_of(const float* left, const float* turned, int64_t rows, float* to) const {
    product(left, padded_, turned, kBlock, to, kBlock, rows, kBlock, p_.width, false);
  }
  // Rows i of `to` += block * rows j of `from`, and the other way round.
  void add(const Scores& s, const float* block, const float* from, float* to, int64_t i, int64_t j) const {
    product(block, kBlock, from + j * padded_, padded_, to + i * padded_, padded_, s.rows, padded_, s.columns, true);
  }
  void add_turned(const Scores& s, const float* block, const float* from, float* to, int64_t i, int64_t j) const {
    product_turned(block, kBlock, from + i * padded_, padded_, to + j * padded_, padded_, s.columns, padded_, s.rows, true);
  }

  const Problem& p_;
  int64_t padded_;
  float* z_;
  Pair by_row_, by_column_;
};

// What the backward pass reads beside the problem, and where it writes; data is null where there is none.
struct Gradients {
  Heads dout, dsparse, out;
  const float *lows, *stats;
  Target dk, dv, dq;
  float* dthreshold;
};

// All of a thread's arrays, and one head at a time.
class HeadBackward {
 public:
  HeadBackward(const Problem& p, const Gradients& g) : p_(p), g_(g), attention_(p, scratch_) {
    const int64_t size = p.length * p.padded(), blocks = round_up(p.length, kBlock);
    for (float** array : {&k_, &v_, &clean_, &low_, &earlier_, &dlow_, &du_, &dk_, &dv_, &dclean_}) {
      *array = scratch_.take(size);
    }
    if (p.q) q_ = scratch_.take(size), dq_ = scratch_.take(size);
    if (g.dsparse) push_ = scratch_.take(size);
    for (int64_t t = 0; t < p.iterations; ++t) duals_.push_back(scratch_.take(size));
    for (float** array : {&clean_turned_, &v_turned_, &dlow_turned_}) *array = scratch_.take(blocks * p.width);
    statistics_ = {scratch_.take(blocks), scratch_.take(blocks), scratch_.take(blocks)};
    for (float* array : {statistics_.shift, statistics_.inverse, statistics_.along}) std::fill_n(array, blocks, 0.0f);
  }

  void operator()(int64_t head) {
    const Tokens tokens(p_, head);
    const int64_t used = tokens.count() * p_.padded();
    tokens.read_rows(p_.k, k_);
    tokens.read_rows(p_.v, v_);
    turn_blocks(v_, tokens.count(), p_.width, p_.padded(), v_turned_);
    if (p_.q) tokens.read_rows(p_.q, q_);
    if (g_.dsparse) tokens.read_rows(g_.dsparse, push_);
    replay_duals(tokens, used);
    tokens.read_rows(g_.dout, dlow_);
    tokens.read_rows(g_.out, low_);
    for (float* array : {du_, dk_, dv_, dq_}) {
      if (array) std::fill_n(array, used, 0.0f);
    }
    std::vector<float> dbound(tokens.count(), 0.0f);
    for (int64_t t = p_.iterations - 1; t >= 0; --t) step(tokens, used, t, dbound);
    if (g_.dk) tokens.write_rows(g_.dk, dk_);
    if (g_.dv) tokens.write_rows(g_.dv, dv_);
    if (g_.dq) tokens.write_rows(g_.dq, dq_);
    if (!g_.dthreshold) return;
    if (p_.by_token) {
      tokens.write_numbers(g_.dthreshold, dbound.data());
    } else {
      double sum = 0.0;
      for (const float row : dbound) sum += row;
      g_.dthreshold[head] = static_cast<float>(sum);
    }
  }

 private:
  // L after `t` iterations, 0 before the first.
  void read_low(const Tokens& tokens, int64_t used, int64_t t, float* to) const {
    const int64_t rows = p_.length * p_.width, heads = rows * p_.heads;
    if (t == 0) {
      std::fill_n(to, used, 0.0f);
    } else {
      Heads saved;
      saved.source = {g_.lows + (t - 1) * heads * p_.batch};
      saved.batch = heads, saved.head = rows, saved.row = p_.width;
      tokens.read_rows(saved, to);
    }
  }

  // u before each iteration, as the forward pass had it.
  void replay_duals(const Tokens& tokens, int64_t used) {
    std::fill_n(duals_[0], used, 0.0f);
    for (int64_t t = 1; t < p_.iterations; ++t) {
      read_low(tokens, used, t - 1, earlier_);
      shrink(tokens, k_, earlier_, duals_[t - 1], clean_, duals_[t], nullptr);
      read_low(tokens, used, t, earlier_);
      subtract_into(duals_[t], duals_[t], earlier_, used);
    }
  }

  void step(const Tokens& tokens, int64_t used, int64_t t, std::vector<float>& dbound) {
    const int64_t count = tokens.count(), padded = p_.padded(), all = p_.all_heads() * p_.length;
    const float* u = duals_[t];
    const bool last = t == p_.iterations - 1;
    read_low(tokens, used, t, earlier_);
    shrink(tokens, k_, earlier_, u, clean_, dclean_, nullptr);
    round_through(p_.dtype, clean_, used);
    turn_blocks(clean_, count, p_.width, padded, clean_turned_);
    tokens.read_numbers(g_.stats + 2 * t * all, statistics_.shift);
    tokens.read_numbers(g_.stats + (2 * t + 1) * all, statistics_.inverse);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = i * padded;
      upstream_row(padded, low_ + at, du_ + at, dlow_ + at, dk_ + at, statistics_.along + i);
    }
    if (p_.symmetric()) turn_blocks(dlow_, count, p_.width, padded, dlow_turned_);
    std::fill_n(dclean_, used, 0.0f);
    const Operands operands{p_.q ? q_ : clean_, clean_, clean_turned_, v_, v_turned_, dlow_, dlow_turned_,
                            p_.q ? dq_ : dclean_, dclean_, dv_};
    attention_(tokens, operands, statistics_, p_.dropout.on && last);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = i * padded;
      shrinkage_row(tokens.bound[i],
                    padded,
                    k_ + at,
                    earlier_ + at,
                    u + at,
                    dclean_ + at,
                    last && g_.dsparse ? push_ + at : nullptr,
                    du_ + at,
                    dk_ + at,
                    dlow_ + at,
                    &dbound[i]);
    }
    std::swap(low_, earlier_);
  }

  const Problem& p_;
  const Gradients& g_;
  Scratch scratch_;
  AttentionBackward attention_;
  float *k_, *v_, *clean_, *low_, *earlier_, *dlow_, *du_, *dk_, *dv_, *dclean_;
  float *q_ = nullptr, *dq_ = nullptr, *push_ = nullptr;
  float *clean_turned_, *v_turned_, *dlow_turned_;
  std::vector<float*> duals_;
  Statistics statistics_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> rpc_attention_bwd_cpu(const Tensor& dout,
                                                                 Optional dsparse,
                                                                 const Tensor& k,
                                                                 const Tensor& v,
                                                                 Optional q,
                                                                 const Tensor& threshold,
                                                                 Optional key_mask,
                                                                 Optional seed,
                                                                 const Tensor& out,
                                                                 const Tensor& lows,
                                                                 const Tensor& stats,
                                                                 int64_t num_iters,
                                                                 double scale,
                                                                 bool is_causal,
                                                                 double dropout_p,
                                                                 std::vector<bool> needs) {
  const Problem p(k, v, q, threshold, key_mask, seed, num_iters, scale, is_causal, dropout_p);
  const auto like = [&](const Tensor& t, bool needed) {
    return needed ? torch::stable::new_empty(t, t.sizes()) : torch::stable::new_empty(t, {0});
  };
  Tensor gradients[] = {like(k, needs[0]), like(k, needs[1]), like(k, needs[2]), like(threshold, needs[3])};
  const auto target = [&](int which) { return needs[which] ? target_of(gradients[which]) : Target{}; };
  const Tensor upstream = dense(dout), result = dense(out);
  const Optional upstream_sparse = dense(dsparse);
  const Gradients g{Heads(upstream),
                    heads_of(upstream_sparse),
                    Heads(result),
                    lows.const_data_ptr<float>(),
                    stats.const_data_ptr<float>(),
                    target(0),
                    target(1),
                    target(2),
                    static_cast<float*>(target(3).data)};
  torch::stable::parallel_for(0, p.all_heads(), 1, [&](int64_t begin, int64_t end) {
    HeadBackward backward(p, g);
    for (int64_t head = begin; head < end; ++head) backward(head);
  });
  return {gradients[0], gradients[1], gradients[2], gradients[3]};
}

}  // namespace
}  // namespace molex::rpc

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("rpc_attention_bwd_cpu", TORCH_BOX(&molex::rpc::rpc_attention_bwd_cpu));
}
