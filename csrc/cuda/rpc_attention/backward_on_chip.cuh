// RPC attention backward with all iterations of a head on chip, in 16 bits, by warp groups of sm_90a: of
// global memory the inputs and what the forward pass has kept are read, the gradients written.
//
// As in backward.cuh a row is a query of all keys and a key of all queries at once, so that nothing is added
// across warps. A warp group has 64 rows, of which it goes over 64 columns at a time: their gV is in
// registers over all iterations, gu and gu + gk in shared memory, every thread's own. The blocks of a head
// are a cluster and send each other K~, G and D. K~ of an iteration and the sides of its threshold come anew
// from k and every L before. A block is one group where two of them, which may be of two heads, share a
// multiprocessor: one multiplies while the other computes what lies between iterations. Of more rows it is
// two groups that take turns at the tensor cores.
//
// Budget: 255 registers, without spills. What a warp shares (its head and rows, where operands stand) is said
// to be `uniform`, so that no lane keeps it.
// Shared memory, in bytes, for R rows of the head and r of the block: (3 R, with q 4 R) 2 D + 8 r D + 12 R.
// Dropout is left to gradient.cuh: its words would take registers from the products.

#pragma once

#include "cuda/rpc_attention/gradient.cuh"
#include "cuda/rpc_attention/warp_groups.cuh"

namespace molex::rpc {

template <class E, int D>
constexpr bool kGradientOnChip = sizeof(E) == 2 && D == 64;

// How a head's backward pass runs on chip.
template <class E, int D, int Groups, bool HasQ>
struct BackwardOnChip {
  static constexpr int kRows = 64 * Groups, kThreads = 4 * kWarp * Groups;
  static constexpr int kColumns = 64, kTail = 16;  // of a tile, and of a shorter last one
  // Of two blocks that share a multiprocessor, or of one alone.
  static constexpr int kMostShared = (Groups == 1 ? 113 : 227) * 1024;

  int cluster, rows, tail, shared_bytes;  // `rows` of the head, whole tiles
  bool fits;

  explicit BackwardOnChip(const Problem& p) {
    cluster = (p.length + kRows - 1) / kRows;
    tail = p.length % kColumns <= kTail ? p.length % kColumns : 0;
    rows = tail > 0 ? p.length - tail + kTail : (p.length + kColumns - 1) / kColumns * kColumns;
    const int64_t bytes = (HasQ ? 4ll : 3ll) * rows * D * sizeof(E) + 2ll * kRows * D * sizeof(float) +
                          rows * static_cast<int64_t>(sizeof(Softmax) + sizeof(float));
    fits = !p.seed && p.length <= kMostKeys && cluster <= p.cluster_limit && bytes <= kMostShared &&
           bytes <= p.shared_limit;
    shared_bytes = static_cast<int>(fits ? bytes : 0);
  }

  device::Grid grid(const Problem& p) const {
    return {p.all_heads() * cluster, kThreads, shared_bytes, cluster};
  }
};

template <class E, int D, int Groups, bool HasQ>
struct BackwardOnChipLaunch {
  Backward b;
  BackwardOnChip<E, D, Groups, HasQ> plan;
};

// The sides of the threshold of a lane's elements of 16 rows, a bit for each: the first element's is the
// highest.
struct SidesOfRows {
  uint32_t outside, positive, negative;

  MOLEX_DEVICE static uint32_t bit(int n, int e) { return 0x80000000u >> (4 * n + e); }
};

// This lane's elements of a warp's rows of a matrix, of which `first_row` is the first and `width` the width;
// zeros where a row is not `real`. Where pairs are aligned nothing branches, so that all loads are under way
// at once.
template <int D, class T>
MOLEX_DEVICE void load_own_rows(
    float (&c)[D / 8][4], const T* first_row, int64_t stride, int width, const bool (&real)[2]) {
  const bool even =
      width % 2 == 0 && stride % 2 == 0 && reinterpret_cast<uintptr_t>(first_row) % (2 * sizeof(T)) == 0;
  const T* from = first_row + lane_row() * stride + lane_column();
  const int within = width - lane_column();
  MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      c[n][2 * i] = c[n][2 * i + 1] = 0.0f;
      if (even && real[i] && 8 * n < within) {
        const float2 pair = load_pair(from + 8 * i * stride + 8 * n);
        c[n][2 * i] = pair.x;
        c[n][2 * i + 1] = pair.y;
      }
    }
  }
  if (even) return;
  MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
    MOLEX_UNROLL for (int e = 0; e < 4; ++e) {
      if (real[e / 2] && 8 * n + e % 2 < within) {
        c[n][e] = device::to_float(from[8 * (e / 2) * stride + 8 * n + e % 2]);
      }
    }
  }
}

// K~ of iteration t of a warp's rows from `row` on, as the forward pass has computed it.
template <class E, int D>
MOLEX_DEVICE void rebuild_keys(float (&keys)[D / 8][4],
                               SidesOfRows& sides,
                               const Backward& b,
                               int64_t head,
                               int row,
                               const bool (&real)[2],
                               int t) {
  const Problem& p = b.problem;
  float low_rank[D / 8][4], u[D / 8][4];
  uint32_t packed[D / 8][2];
  load_own_rows<D>(u, head_of<E>(p, p.k, head) + row * p.k.row, p.k.row, p.width, real);
  MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) packed[n][i] = device::pack<E>(u[n][2 * i], u[n][2 * i + 1]);
  }
  const float bound[2] = {bound_of(p, head, row + lane_row()), bound_of(p, head, row + lane_row() + 8)};
  MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
    MOLEX_UNROLL for (int e = 0; e < 4; ++e) low_rank[n][e] = u[n][e] = 0.0f;
  }
  const float* low_ranks = b.low_ranks + (head * p.length + row) * p.width;
  MOLEX_NO_UNROLL for (int before = 0; before < t; ++before) {
    float next[D / 8][4];
    load_own_rows<D>(next, low_ranks, p.width, p.width, real);
    MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
      MOLEX_UNROLL for (int e = 0; e < 4; ++e) {
        const float2 pair = unpack<E>(device::opaque(packed[n][e / 2]));  // not unpacked ahead of the loop
        float &l = low_rank[n][e], &dual = u[n][e];
        dual = soft_threshold(e % 2 ? pair.y : pair.x, l, dual, bound[e / 2]).w - next[n][e];
        l = next[n][e];
      }
    }
    low_ranks += p.all_heads() * p.length * p.width;
  }
  static_assert(D / 8 * 4 == 32);  // elements, as bits
  sides = {0, 0, 0};
  uint32_t inside = 0;
  MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
    MOLEX_UNROLL for (int e = 0; e < 4; ++e) {
      const float2 pair = unpack<E>(packed[n][e / 2]);
      const float k = e % 2 ? pair.y : pair.x, l = low_rank[n][e], dual = u[n][e], a = k - l + dual;
      keys[n][e] = soft_threshold(k, l, dual, bound[e / 2]).key;
      inside = device::append_sign(inside, device::absolute(a) - bound[e / 2]);
      // a is never -0: equal numbers differ by +0.
      sides.negative = device::append_sign(sides.negative, a);
      sides.positive = device::append_sign(sides.positive, 0.0f - a);
    }
  }
  // Words, not what the compiler could keep instead: a register for each element.
  sides.outside = device::opaque(~inside);
  sides.negative = device::opaque(sides.negative & ~inside);
  sides.positive = device::opaque(sides.positive & ~inside);
}

// Sends numbers of this warp's rows from `row` on, which the lanes that have column 0 hold, to the same place
// in every block of the cluster.
MOLEX_DEVICE void publish_numbers(float* numbers, const float (&own)[2], int row, int rank, int cluster) {
  MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
    if (lane_column() == 0) numbers[row + lane_row() + 8 * i] = own[i];
  }
  if (cluster == 1) return;
  device::sync_warp();
  if (lane() >= 4) return;
  float* mine = numbers + row + 4 * lane();
  for (int other = 1; other < cluster; ++other) {
    const int peer = (rank + other) % cluster;
    device::store_remote(device::remote(mine, peer), 0, *reinterpret_cast<const uint4*>(mine));
  }
}

template <class E, int D, int Groups, bool HasQ>
MOLEX_WGMMA_KERNEL((BackwardOnChip<E, D, Groups, HasQ>::kThreads), 1)
void rpc_backward_on_chip(MOLEX_PARAMS BackwardOnChipLaunch<E, D, Groups, HasQ> s) {
#if MOLEX_HAS_WGMMA
  using Plan = BackwardOnChip<E, D, Groups, HasQ>;
  using In = Cores<E, D>;
  constexpr int kColumns = Plan::kColumns, kTail = Plan::kTail;
  const Backward& b = s.b;
  const Problem& p = b.problem;
  const Plan& plan = s.plan;
  const int own_head = device::uniform(device::block() / plan.cluster);
  const int rank = device::block() - own_head * plan.cluster, own_warp = device::uniform(warp());
  const int group = own_warp / 4, first = rank * Plan::kRows, own_row = first + 16 * own_warp;

  E* keys = reinterpret_cast<E*>(device::shared());
  E* values = keys + plan.rows * D;
  E* d_out = values + plan.rows * D;
  E* queries = HasQ ? d_out + plan.rows * D : keys;
  Softmax* softmax = reinterpret_cast<Softmax*>(d_out + (HasQ ? 2 : 1) * plan.rows * D);
  float* deltas = reinterpret_cast<float*>(softmax + plan.rows);
  // This thread's, 16 bytes behind those of its warp's last one: gu, and gu + gk. Of the last iteration,
  // which has no gu, there is -gS in its place.
  struct alignas(16) Four {
    float of[4];
  };
  Four* duals = reinterpret_cast<Four*>(deltas + plan.rows) + D / 4 * kWarp * own_warp + lane();
  Four* sums = duals + D / 8 * kWarp;

  In::load(values, p, p.v, own_head, 0, plan.rows);
  In::load(d_out, p, b.grad_out, own_head, 0, plan.rows);
  if (HasQ) In::load(queries, p, p.q, own_head, 0, plan.rows);
  device::commit_copies();
  device::wait_copies<0>();
  device::arrive_cluster();

  const Mask visible(p, own_head, own_row);
  const Dropout keeps(p, own_head, false);
  const float scale2 = score_scale(p);
  const bool real[2] = {visible.exists(own_row + lane_row()), visible.exists(own_row + lane_row() + 8)};
  float of_threshold[2] = {0.0f, 0.0f}, delta[2] = {0.0f, 0.0f};
  float grad_keys[D / 8][4], grad_values[D / 8][4], grad_queries[D / 8][4];
  MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
    MOLEX_UNROLL for (int e = 0; e < 4; ++e) grad_values[n][e] = grad_queries[n][e] = 0.0f;
  }
  // Of this lane's two rows <g, l>: g(n, i) and l(n, i) are pairs.
  const auto pair_of = [](const float (&c)[D / 8][4]) {
    return [&](int n, int i) { return float2{c[n][2 * i], c[n][2 * i + 1]}; };
  };
  float extra[D / 8][4] = {};
  if (b.grad_sparse.data) {
    const float* from = head_of<float>(p, b.grad_sparse, own_head) + own_row * b.grad_sparse.row;
    load_own_rows<D>(extra, from, b.grad_sparse.row, p.width, real);
  }
  MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
    duals[n * kWarp] = {-extra[n][0], -extra[n][1], -extra[n][2], -extra[n][3]};
    sums[n * kWarp] = {};
  }

  MOLEX_NO_UNROLL for (int t = p.iterations - 1; t >= 0; --t) {
    const bool is_first = t == 0, is_last = t + 1 == p.iterations;
    const int64_t rows = p.all_heads() * p.length;
    // Addresses are not kept over the iterations: their registers are the products'.
    const int64_t head = device::uniform(own_head);
    const int row = device::uniform(own_row);
    SidesOfRows sides;
    const bool published = row < plan.rows;  // other rows may take part in products, but no result is used
    device::wait_cluster();  // until every block has started, and read what the later iteration had
    if (is_last && published) {
      const E* mine = d_out + row * D + lane_row() * 8 + lane_column();
      float out[D / 8][4], rest[D / 8][4];
      const int64_t place = (head * p.length + row) * p.width;
      load_own_rows<D>(out, static_cast<const E*>(b.out) + place, p.width, p.width, real);
      load_own_rows<D>(rest, static_cast<const E*>(b.out_rest) + place, p.width, p.width, real);
      MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
        MOLEX_UNROLL for (int e = 0; e < 4; ++e) out[n][e] += rest[n][e];
      }
      inner_products<E, D>(
          delta, [&](int n, int i) { return load_pair(mine + (i * (D / 8) + n) * In::kCore); }, pair_of(out));
    }
    if (published && !is_last) In::publish(d_out, grad_keys, row, rank, plan.cluster);
    if (published) publish_numbers(deltas, delta, row, rank, plan.cluster);
    for (int i = device::thread(); i < plan.rows; i += Plan::kThreads) {
      const float* stats = b.stats + 2 * t * rows + head * p.length + i;
      Softmax of = {0.0f, 0.0f};
      if (visible.exists(i)) of = make_softmax<E>(stats[0], stats[rows], scale2);
      softmax[i] = of;
    }
    // Only now: G of the iteration before has had the registers.
    rebuild_keys<E, D>(grad_keys, sides, b, head, row, real, t);
    if (published) In::publish(keys, grad_keys, row, rank, plan.cluster);
    device::fence_proxy();
    device::arrive_cluster();
    device::wait_cluster();

    OwnRows mine;
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      const int at = row + lane_row() + 8 * i;
      mine.set(i, real[i] ? softmax[at] : Softmax{0.0f, 0.0f}, real[i] ? deltas[at] : 0.0f);
    }
    MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
      MOLEX_UNROLL for (int e = 0; e < 4; ++e) grad_keys[n][e] = 0.0f;
    }
    // Where the products' operands stand, and the group's rows of them.
    const uint32_t bytes = plan.rows * D * static_cast<int>(sizeof(E));
    const uint32_t keys_at = device::uniform(device::shared_address(keys)), values_at = keys_at + bytes;
    const uint32_t d_out_at = values_at + bytes, queries_at = HasQ ? d_out_at + bytes : keys_at;
    const int group_row = first + 64 * group;
    // The group's tile of `N` columns from `other` on. Its weights outlive it: products read them later.
    using Operands = typename Fragments<E>::OperandA[kColumns / 16];
    Operands weights, differences;
    const auto add_tile = [&]<int N>(int first_other) {
      const int other = device::uniform(first_other);
      using Scores = float[1][N / 8][4];
      // c = a b^T of rows of the head, and c += a b.
      const auto multiply_nt = [&](Scores& c, uint32_t a, uint32_t of_b) {
        MOLEX_UNROLL for (int k = 0; k < D; k += 16) {
          const device::Matrix left = In::by_columns(a, group_row, k);
          device::multiply_nt<E, N>(c[0], left, In::by_columns(of_b, other, k), k > 0);
        }
      };
      const auto multiply_nn = [&](float (&c)[D / 8][4], const Operands& a, uint32_t of_b) {
        MOLEX_UNROLL for (int step = 0; step < N / 16; ++step) {
          device::multiply_nn<E, D>(c, a[step].r, In::by_rows(of_b, other + 16 * step), true);
        }
      };
      const auto convert = [](Operands& a, const Scores& c) {
        MOLEX_UNROLL for (int step = 0; step < N / 16; ++step) Fragments<E>::convert(a[step], c[0], step);
      };
      const auto query = [&](Scores& dz, const Scores& z) {
        if (other + N <= visible.seen) {
          as_query<E, false, false>(dz, z, dz, mine, visible, keeps, scale2, row, other);
        } else {
          as_query<E, false, true>(dz, z, dz, mine, visible, keeps, scale2, row, other);
        }
      };
      const auto key = [&](Scores& dz, Scores& z, const Scores& dp) {
        const Softmax* of = softmax + other;
        if (!p.causal || other >= row + 15) {
          as_key<E, false, false, !HasQ>(dz, z, dp, of, deltas + other, visible, keeps, scale2, row, other);
        } else {
          as_key<E, false, true, !HasQ>(dz, z, dp, of, deltas + other, visible, keeps, scale2, row, other);
        }
      };
      Scores z, dz;
      if (Groups > 1) device::wait_turn(group);
      device::fence_products();
      if constexpr (HasQ) {
        multiply_nt(z, queries_at, keys_at);
        multiply_nt(dz, d_out_at, values_at);
        device::commit_products();
        device::wait_products<0>(z[0], dz[0], grad_keys, grad_values, grad_queries);
        query(dz, z);
        convert(differences, dz);
        device::fence_products();
        multiply_nn(grad_queries, differences, keys_at);
        multiply_nt(z, keys_at, queries_at);
        multiply_nt(dz, values_at, d_out_at);
        device::commit_products();
        device::wait_products<0>(z[0], dz[0], grad_queries);
        if (Groups > 1 && (group == 0 || other + N < p.length)) device::give_turn(1 - group);
        key(dz, z, dz);
      } else {
        Scores dp;
        multiply_nt(z, keys_at, keys_at);
        multiply_nt(dz, d_out_at, values_at);
        multiply_nt(dp, values_at, d_out_at);
        device::commit_products();
        device::wait_products<0>(z[0], dz[0], dp[0], grad_keys, grad_values);
        if (Groups > 1 && (group == 0 || other + N < p.length)) device::give_turn(1 - group);
        query(dz, z);
        key(dz, z, dp);
      }
      convert(weights, z);
      convert(differences, dz);
      device::fence_products();
      // They are under way while the next tile's scores are multiplied.
      multiply_nn(grad_values, weights, d_out_at);
      multiply_nn(grad_keys, differences, queries_at);
      device::commit_products();
    };
    if (Groups > 1 && group == 1) device::give_turn(0);
    MOLEX_NO_UNROLL for (int other = 0; other < p.length - plan.tail; other += kColumns) {
      add_tile.template operator()<kColumns>(other);
    }
    if (plan.tail > 0) add_tile.template operator()<kTail>(p.length - plan.tail);
    device::wait_products<0>(grad_keys, grad_values);
    if (!is_first) device::arrive_cluster();

    float of_iteration[2] = {0.0f, 0.0f};  // which another one's may cancel exactly
    const auto step_all = [&]<bool IsFirst>() {
      MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
        Four carried = duals[n * kWarp], sum = sums[n * kWarp];
        MOLEX_UNROLL for (int e = 0; e < 4; ++e) {
          const uint32_t bit = SidesOfRows::bit(n, e);
          const float product = real[e / 2] ? grad_keys[n][e] * p.scale : 0.0f;
          const StepBack step = step_back(product, carried.of[e], sides.outside & bit, IsFirst, is_last);
          if (sides.positive & bit) of_iteration[e / 2] -= step.threshold;
          if (sides.negative & bit) of_iteration[e / 2] += step.threshold;
          carried.of[e] = step.dual;
          sum.of[e] += step.sum;
          grad_keys[n][e] = IsFirst ? sum.of[e] : step.next;
        }
        if (IsFirst) continue;
        duals[n * kWarp] = carried;
        sums[n * kWarp] = sum;
      }
    };
    if (is_first) {
      step_all.template operator()<true>();
    } else {
      step_all.template operator()<false>();
    }
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) of_threshold[i] += of_iteration[i];
    if (!is_first) {
      float low_rank[D / 8][4];
      const float* from = b.low_ranks + ((t - 1) * rows + head * p.length + row) * p.width;
      load_own_rows<D>(low_rank, from, p.width, p.width, real);
      inner_products<E, D>(delta, pair_of(grad_keys), pair_of(low_rank));
    }
  }

  const int row = device::opaque(own_row);
  E* staged = reinterpret_cast<E*>(duals - lane());
  device::sync_warp();  // all have read what is there
  if (b.grad_k) store_tile<D>(p, static_cast<E*>(b.grad_k), own_head, row, grad_keys, staged);
  MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
    MOLEX_UNROLL for (int e = 0; e < 4; ++e) {
      grad_values[n][e] = real[e / 2] ? grad_values[n][e] : 0.0f;
      grad_queries[n][e] = real[e / 2] ? grad_queries[n][e] * p.scale : 0.0f;
    }
  }
  device::sync_warp();  // they use the same place
  if (b.grad_v) store_tile<D>(p, static_cast<E*>(b.grad_v), own_head, row, grad_values, staged);
  if constexpr (HasQ) {
    device::sync_warp();
    if (b.grad_q) store_tile<D>(p, static_cast<E*>(b.grad_q), own_head, row, grad_queries, staged);
  }
  if (!b.grad_threshold) return;
  MOLEX_UNROLL for (int i = 0; i < 2; ++i) of_threshold[i] = row_sum(of_threshold[i]);
  if (p.threshold_row) {
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      const int mine = row + lane_row() + 8 * i;
      if (lane_column() == 0 && mine < p.length)
        b.grad_threshold[own_head * p.length + mine] = of_threshold[i];
    }
    return;
  }
  // The sum of all rows', in a fixed order; nothing reads D any more.
  device::arrive_cluster();
  device::wait_cluster();
  if (row < plan.rows) publish_numbers(deltas, of_threshold, row, rank, plan.cluster);
  device::arrive_cluster();
  device::wait_cluster();
  if (rank > 0 || own_warp > 0) return;
  float sum = 0.0f;
  for (int i = lane(); i < plan.rows; i += kWarp) sum += deltas[i];
  MOLEX_UNROLL for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += device::shuffle_xor(sum, lanes);
  if (lane() == 0) b.grad_threshold[own_head] = sum;
#endif
}

}  // namespace molex::rpc
