// Robust attention's backward pass on a CPU: the iterations from last to first. Each is recomputed from the
// saved L of the iteration before it.

#include <tuple>

#include "cpu/common/memory.h"
#include "cpu/rpc_attention/tile_backward.h"
#include "registration.h"

namespace molex::rpc {
namespace {

// Replaces dlow_rank by dL = dlow_rank - du.
constexpr auto subtract_duals =
    versions([](auto, const float* du, float* dlow_rank, int64_t count) MOLEX_LAMBDA_INLINE {
      for (int64_t i = 0; i < count; ++i) dlow_rank[i] -= du[i];
    });

// Goes back through the soft threshold of a row. With m = 1 outside the threshold and dS = `push` (the
// gradient that reaches the result's S from outside, or null): da = m (dS - du - dclean), dk += du + dclean +
// da, dlow_rank = -da, du += da - dclean, and the threshold's own gradient.
//
// The accumulator `dk` holds dk + du: du contains -dclean of the later iteration, which dk would otherwise
// have to add and subtract again. Where m = 1, da contains -dclean; the sums are written so that it is never
// added and subtracted.
constexpr auto soft_threshold_row_backward = versions([](auto registers,
                                                         float bound,
                                                         int64_t width,
                                                         bool first,
                                                         const float* k,
                                                         const float* low_rank,
                                                         const float* u,
                                                         const float* dclean,
                                                         const float* push,
                                                         float* du,
                                                         float* dk,
                                                         float* dlow_rank,
                                                         float* dbound) MOLEX_LAMBDA_INLINE {
  constexpr int kLanes = registers.kLanes;
  auto sum = Floats<kLanes>{};
  for (int64_t c = 0; c < width; c += kLanes) {
    const auto a = load<kLanes>(k + c) - load<kLanes>(low_rank + c) + load<kLanes>(u + c);
    const auto dual = load<kLanes>(du + c);
    const auto through = load<kLanes>(dclean + c);
    auto direct = -dual;
    if (push) direct += load<kLanes>(push + c);
    const auto inside = (a < 0.0f ? -a : a) < bound;
    const auto da = inside ? Floats<kLanes>{} : direct - through;
    sum += a > 0.0f ? da : a < 0.0f ? -da : a * da;
    const auto more = first ? (inside ? through : direct) : (inside ? dual : dual + 2.0f * da);
    store(dk + c, load<kLanes>(dk + c) + more);
    store(dlow_rank + c, -da);
    store(du + c, inside ? dual - through : dual + direct - 2.0f * through);
  }
  *dbound -= sum_of_lanes(sum);
});

// What the backward pass reads besides the problem, and where it writes. Data is null for tensors that are
// not given.
struct Gradients {
  Heads dout, dsparse, out;
  const float *low_ranks, *stats;
  Target dk, dv, dq;
  float* dthreshold;
};

// All arrays of a thread; it processes one head at a time.
template <class OneAttention>
class HeadBackward {
 public:
  HeadBackward(const Problem& p, const Gradients& g) : p_(p), g_(g), attention_(p, scratch_) {
    const int64_t size = OneAttention::rows_of(p.length) * p.padded(), blocks = round_up(p.length, kBlock);
    for (float** array : {&k_, &v_, &clean_, &low_rank_, &dlow_rank_, &du_, &dk_, &dv_, &dclean_}) {
      *array = scratch_.take(size);
    }
    if (p.q) q_ = scratch_.take(size), dq_ = scratch_.take(size);
    if (g.dsparse) push_ = scratch_.take(size);
    for (int64_t t = 0; t < p.iterations; ++t) duals_.push_back(scratch_.take(size));
    for (float** array :
         {&statistics_.shift, &statistics_.inverse, &statistics_.center, &statistics_.delta}) {
      *array = scratch_.take(blocks);
      // Values behind the last token only have to be finite.
      std::fill_n(*array, blocks, 0.0f);
    }
    statistics_.lanes = scratch_.take(blocks * kPad);
  }

  void operator()(int64_t head) {
    const Tokens tokens(p_, head);
    const int64_t used = tokens.count() * p_.padded();
    tokens.read_rows(p_.k, k_);
    tokens.read_rows(p_.v, v_);
    if (p_.q) tokens.read_rows(p_.q, q_);
    attention_.begin(tokens, v_, q_);
    if (g_.dsparse) tokens.read_rows(g_.dsparse, push_);
    replay_duals(tokens, used);
    tokens.read_rows(g_.dout, dlow_rank_);
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
  // L after `t` iterations; 0 for t = 0.
  void read_low_rank(const Tokens& tokens, int64_t used, int64_t t, float* to) const {
    const int64_t rows = p_.length * p_.width, heads = rows * p_.heads;
    if (t == 0) {
      std::fill_n(to, used, 0.0f);
    } else if (t == p_.iterations) {
      tokens.read_rows(g_.out, to);
    } else {
      Heads saved;
      saved.source = {g_.low_ranks + (t - 1) * heads * p_.batch};
      saved.batch = heads, saved.head = rows, saved.row = p_.width;
      tokens.read_rows(saved, to);
    }
  }

  // Recomputes u before each iteration as the forward pass had it.
  void replay_duals(const Tokens& tokens, int64_t used) {
    std::fill_n(duals_[0], used, 0.0f);
    read_low_rank(tokens, used, 0, low_rank_);
    for (int64_t t = 1; t < p_.iterations; ++t) {
      soft_threshold(tokens, k_, low_rank_, duals_[t - 1], clean_, duals_[t], nullptr);
      read_low_rank(tokens, used, t, low_rank_);
      subtract(duals_[t], low_rank_, used);
    }
  }

  void step(const Tokens& tokens, int64_t used, int64_t t, std::vector<float>& dbound) {
    const int64_t count = tokens.count(), padded = p_.padded(), all = p_.all_heads() * p_.length;
    const float* u = duals_[t];
    const bool last = t == p_.iterations - 1;
    read_low_rank(tokens, used, t, low_rank_);
    soft_threshold(tokens, k_, low_rank_, u, clean_, dclean_, nullptr);
    tokens.read_numbers(g_.stats + 2 * t * all, statistics_.shift);
    tokens.read_numbers(g_.stats + (2 * t + 1) * all, statistics_.inverse);
    subtract_duals(du_, dlow_rank_, used);
    read_low_rank(tokens, used, t + 1, dclean_);
    for (int64_t i = 0; i < count; ++i) {
      statistics_.center[i] = dot(dlow_rank_ + i * padded, dclean_ + i * padded, padded);
    }
    std::fill_n(dclean_, used, 0.0f);
    const Operands operands{clean_, dlow_rank_, p_.q ? dq_ : dclean_, dclean_, dv_};
    attention_(tokens, operands, statistics_, p_.dropout.on && last);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = i * padded;
      soft_threshold_row_backward(tokens.bound[i],
                                  padded,
                                  t == 0,
                                  k_ + at,
                                  low_rank_ + at,
                                  u + at,
                                  dclean_ + at,
                                  last && g_.dsparse ? push_ + at : nullptr,
                                  du_ + at,
                                  dk_ + at,
                                  dlow_rank_ + at,
                                  &dbound[i]);
    }
  }

  const Problem& p_;
  const Gradients& g_;
  Scratch scratch_;
  OneAttention attention_;
  float *k_, *v_, *clean_, *low_rank_, *dlow_rank_, *du_, *dk_, *dv_, *dclean_;
  float *q_ = nullptr, *dq_ = nullptr, *push_ = nullptr;
  std::vector<float*> duals_;
  Statistics statistics_{};
};

template <class OneAttention>
void run_heads(const Problem& p, const Gradients& g, int64_t begin, int64_t end) {
  HeadBackward<OneAttention> backward(p, g);
  for (int64_t head = begin; head < end; ++head) backward(head);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rpc_attention_bwd(const Tensor& dout,
                                                             Optional dsparse,
                                                             const Tensor& k,
                                                             const Tensor& v,
                                                             Optional q,
                                                             const Tensor& threshold,
                                                             Optional key_mask,
                                                             Optional seed,
                                                             const Tensor& out,
                                                             const Tensor&,  // out_rest
                                                             const Tensor& low_ranks,
                                                             const Tensor& stats,
                                                             int64_t num_iters,
                                                             double scale,
                                                             bool is_causal,
                                                             double dropout_p,
                                                             std::vector<bool> needs) {
  const Problem p(k, v, q, threshold, key_mask, seed, num_iters, scale, is_causal, dropout_p);
  const auto like = [&](const Tensor& t, bool needed) {
    return needed ? molex::new_result(t, t.sizes()) : torch::stable::new_empty(t, {0});
  };
  Tensor gradients[] = {like(k, needs[0]), like(k, needs[1]), like(k, needs[2]), like(threshold, needs[3])};
  const auto target = [&](int which) { return needs[which] ? target_of(gradients[which]) : Target{}; };
  const Tensor upstream = dense(dout);
  const Optional upstream_sparse = dense(dsparse);
  const Gradients g{Heads(upstream),
                    heads_of(upstream_sparse),
                    Heads(out),
                    low_ranks.const_data_ptr<float>(),
                    stats.const_data_ptr<float>(),
                    target(0),
                    target(1),
                    target(2),
                    static_cast<float*>(target(3).data)};
  torch::stable::parallel_for(0, p.all_heads(), 1, [&](int64_t begin, int64_t end) {
    if (p.tiled) {
      const TileScope tiles;
      run_heads<TiledAttentionBackward>(p, g, begin, end);
    } else {
      run_heads<AttentionBackward>(p, g, begin, end);
    }
  });
  return {gradients[0], gradients[1], gradients[2], gradients[3]};
}

}  // namespace
}  // namespace molex::rpc

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("rpc_attention_bwd", molex::cpu_kernel<&molex::rpc::rpc_attention_bwd>);
}
