// Robust attention's backward pass on a CPU.
//
// The iterations run backwards. Each remakes its scores from the saved L of the one before, and its
// probabilities P from the saved row statistics. With dL for the gradient of an iteration's L, a block of
// rows i and columns j needs dP = dL_i v_j^T and dZ = P (dP - D_i), D_i = sum_j P dP. D is not taken as
// <dL_i, L_i>, which rounds in another way: where P is close to 1 all of dP - D_i would be that. So a
// group of blocks first gets P, dP and D, and then dZ. A block that serves its columns, too, has the same
// with i and j exchanged, kept as the transpose: then (dZ + dZ^T) K~ is one product a side.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "rpc_attention.h"

namespace molex::rpc {
namespace {

constexpr int64_t kWhole = 512;  // tokens up to which the blocks of a head are one group

// P = exp(score - shift) * inverse of a row; its D, which gathers in the lanes of `lanes` [rows, kPad], too.
struct Statistics {
  float *shift, *inverse, *along, *lanes;

  Statistics at(int64_t row) const { return {shift + row, inverse + row, along + row, lanes + row * kPad}; }
};

// Blocks [kBlock, kBlock] of one side: P, dP (in which dropout is undone), and what the values are
// multiplied with: P, or under dropout a block of its own. `kept` is what dropout multiplies with, or null.
struct Side {
  float *weights, *upstream, *dropped, *kept;
};

// P and dP of LANES places, and the sum P dP.
template <int LANES, bool DROPS>
MOLEX_INLINE Floats<LANES> place(const Side& side, int64_t at, Floats<LANES> weight, Floats<LANES> upstream) {
  if constexpr (DROPS) {
    const Floats<LANES> by = load<LANES>(side.kept + at), none{};
    upstream = by == 0.0f ? none : upstream * by;
    store<LANES>(side.upstream + at, upstream);
    store<LANES>(side.dropped + at, by == 0.0f ? none : weight * by);
  }
  store<LANES>(side.weights + at, weight);
  return weight * upstream;
}

template <int LANES, bool PARTIAL, bool TURNED, bool DROPS>
MOLEX_INLINE void weigh(const Scores& scores,
                        const Statistics& rows,
                        const Statistics& columns,
                        const Side& by_row,
                        const Side& by_column) {
  constexpr int kVectors = kBlock / LANES;
  const int vectors = PARTIAL ? scores.width() / LANES : kVectors;
  Floats<LANES> sums[kVectors] = {};
  for (int64_t r = 0; r < scores.rows; ++r) {
    const float shift = rows.shift[r], inverse = rows.inverse[r];
    const int32_t seen = scores.seen(r);
    Floats<LANES> sum = load<LANES>(rows.lanes + r * kPad);
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = r * kBlock + v * LANES;
      const Floats<LANES> z = load<LANES>(scores.z + at) * scores.scale;
      Floats<LANES> weight = exponential<LANES>(z - shift) * inverse, upstream = load<LANES>(by_row.upstream + at);
      if constexpr (PARTIAL) {
        const auto sees = count_from<LANES>(v * LANES) < seen;
        weight = sees ? weight : Floats<LANES>{};
        upstream = sees ? upstream : Floats<LANES>{};
        store<LANES>(by_row.upstream + at, upstream);
      }
      sum += place<LANES, DROPS>(by_row, at, weight, upstream);
      if constexpr (TURNED) {
        weight = exponential<LANES>(z - load<LANES>(columns.shift + v * LANES));
        weight *= load<LANES>(columns.inverse + v * LANES);
        sums[v] += place<LANES, DROPS>(by_column, at, weight, load<LANES>(by_column.upstream + at));
      }
    }
    store<LANES>(rows.lanes + r * kPad, sum);
  }
  if constexpr (TURNED) {
    for (int v = 0; v < vectors; ++v) {
      store<LANES>(columns.along + v * LANES, load<LANES>(columns.along + v * LANES) + sums[v]);
    }
  }
}

// P and what a block adds to D; on both sides where there is `by_column`.
MOLEX_VERSIONS(
    weigh_block,
    (const Scores& scores,
     const Statistics& rows,
     const Statistics& columns,
     const Side& by_row,
     const Side& by_column),
    const auto with = [&]<bool PARTIAL, bool TURNED>() MOLEX_LAMBDA_INLINE {
      by_row.kept ? weigh<kLanes, PARTIAL, TURNED, true>(scores, rows, columns, by_row, by_column)
                  : weigh<kLanes, PARTIAL, TURNED, false>(scores, rows, columns, by_row, by_column);
    };
    if (by_column.weights) {
      scores.partial() ? with.template operator()<true, true>() : with.template operator()<false, true>();
    } else {
      scores.partial() ? with.template operator()<true, false>() : with.template operator()<false, false>();
    })

// scale dZ by row, or of both sides.
MOLEX_VERSIONS(
    differentiate_block,
    (const Scores& scores,
     const Statistics& rows,
     const Statistics& columns,
     const Side& by_row,
     const Side& by_column,
     float* slopes),
    for (int64_t r = 0; r < scores.rows; ++r) {
      const float along = rows.along[r];
      for (int64_t c = 0; c < scores.width(); c += kLanes) {
        const int64_t at = r * kBlock + c;
        auto slope = load<kLanes>(by_row.weights + at) * (load<kLanes>(by_row.upstream + at) - along);
        if (by_column.weights) {
          const auto upstream = load<kLanes>(by_column.upstream + at) - load<kLanes>(columns.along + c);
          slope += load<kLanes>(by_column.weights + at) * upstream;
        }
        store<kLanes>(slopes + at, slope * scores.scale);
      }
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

// dL = dlow - du in the place of dlow, dk += du.
MOLEX_CLONES void add_duals(const float* du, float* dlow, float* dk, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    dlow[i] -= du[i];
    dk[i] += du[i];
  }
}

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
        for (int64_t lane = 0; lane < kPad; ++lane) statistics.along[i] += statistics.lanes[i * kPad + lane];
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
    const Side by_row = side_at(blocks), by_column = both(i, j) ? side_at(blocks + 2 * kBlock * kBlock) : Side{};
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
    product(left, padded_, turned, kBlock, to, kBlock, s.rows, s.width(), p_.width, false);
  }

  // Rows i of `to` += block * rows j of `from`.
  void add(const Tokens& tokens, const float* block, const float* from, float* to, int64_t i, int64_t j) const {
    const int64_t rows = tokens.rows_of(i), depth = tokens.rows_of(j);
    product(block, kBlock, from + j * padded_, padded_, to + i * padded_, padded_, rows, padded_, depth, true);
  }

  // Rows j of `to` += block^T * rows i of `from`.
  void add_turned(const Tokens& tokens, const float* block, const float* from, float* to, int64_t i, int64_t j) const {
    const int64_t rows = tokens.rows_of(j), depth = tokens.rows_of(i);
    product_turned(block, kBlock, from + i * padded_, padded_, to + j * padded_, padded_, rows, padded_, depth, true);
  }

  const Problem& p_;
  int64_t padded_;
  bool whole_;
  float *z_, *store_;
  Side spare_row_{}, spare_column_{};
};

// What the backward pass reads beside the problem, and where it writes; data is null where there is none.
struct Gradients {
  Heads dout, dsparse;
  const float *lows, *stats;
  Target dk, dv, dq;
  float* dthreshold;
};

// All of a thread's arrays, and one head at a time.
class HeadBackward {
 public:
  HeadBackward(const Problem& p, const Gradients& g) : p_(p), g_(g), attention_(p, scratch_) {
    const int64_t size = p.length * p.padded(), blocks = round_up(p.length, kBlock);
    for (float** array : {&k_, &v_, &clean_, &low_, &dlow_, &du_, &dk_, &dv_, &dclean_}) {
      *array = scratch_.take(size);
    }
    if (p.q) q_ = scratch_.take(size), dq_ = scratch_.take(size);
    if (g.dsparse) push_ = scratch_.take(size);
    for (int64_t t = 0; t < p.iterations; ++t) duals_.push_back(scratch_.take(size));
    for (float** array : {&clean_turned_, &v_turned_, &dlow_turned_}) *array = scratch_.take(blocks * p.width);
    statistics_ = {
        scratch_.take(blocks), scratch_.take(blocks), scratch_.take(blocks), scratch_.take(blocks * kPad)};
    // What stands behind the last token only has to be a number.
    for (float* array : {statistics_.shift, statistics_.inverse}) std::fill_n(array, blocks, 0.0f);
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
    read_low(tokens, used, 0, low_);
    for (int64_t t = 1; t < p_.iterations; ++t) {
      shrink(tokens, k_, low_, duals_[t - 1], clean_, duals_[t], nullptr);
      read_low(tokens, used, t, low_);
      subtract(duals_[t], low_, used);
    }
  }

  void step(const Tokens& tokens, int64_t used, int64_t t, std::vector<float>& dbound) {
    const int64_t count = tokens.count(), padded = p_.padded(), all = p_.all_heads() * p_.length;
    const float* u = duals_[t];
    const bool last = t == p_.iterations - 1;
    read_low(tokens, used, t, low_);
    shrink(tokens, k_, low_, u, clean_, dclean_, nullptr);
    round_through(p_.dtype, clean_, used);
    turn_blocks(clean_, count, p_.width, padded, clean_turned_);
    tokens.read_numbers(g_.stats + 2 * t * all, statistics_.shift);
    tokens.read_numbers(g_.stats + (2 * t + 1) * all, statistics_.inverse);
    add_duals(du_, dlow_, dk_, used);
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
                    low_ + at,
                    u + at,
                    dclean_ + at,
                    last && g_.dsparse ? push_ + at : nullptr,
                    du_ + at,
                    dk_ + at,
                    dlow_ + at,
                    &dbound[i]);
    }
  }

  const Problem& p_;
  const Gradients& g_;
  Scratch scratch_;
  AttentionBackward attention_;
  float *k_, *v_, *clean_, *low_, *dlow_, *du_, *dk_, *dv_, *dclean_;
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
  const Tensor upstream = dense(dout);
  const Optional upstream_sparse = dense(dsparse);
  const Gradients g{Heads(upstream),
                    heads_of(upstream_sparse),
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
