// One iteration of RPC attention's backward pass, for a block of rows in one role or in both.
//
// Budget: 128 threads, at most 255 registers; shared memory (3 * 64 + 6 columns) (D + 8) bytes(E) + 24
// columns, at most 157,056 bytes (fp32, D = 128), so that it runs on sm_80. No spills.

#pragma once

#include "cuda/rpc_attention/backward.cuh"
#include "cuda/rpc_attention/dropout.cuh"
#include "cuda/rpc_attention/mask.cuh"

namespace molex::rpc {

// What the block's rows are: queries, keys, both at once (only without q); or queries of which D is computed.
enum class Role { kQuery, kKey, kBoth, kInner };

template <class E, int D>
struct BackwardTile {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kColumns = sizeof(E) == 2 ? (D <= 64 ? 64 : 32) : (D <= 64 ? 32 : 16);
  static constexpr int kStages = 2;
  static constexpr bool kReloads = sizeof(E) == 4 && D > 64;  // what else the loop would spill
  static constexpr int kAhead = sizeof(E) == 4 ? (D > 64 ? 8 : 16) : D;
  static constexpr int kSharedBytes = (3 * kRows + 3 * kStages * kColumns) * kPitch<D> * sizeof(E) +
                                      kStages * kColumns * (sizeof(Softmax) + sizeof(float));
  static_assert(kRowsMultiple % kRows == 0 && kRowsMultiple % kColumns == 0);

  using Accumulator = float[1][kColumns / 8][4];
};

// This lane's two rows.
struct OwnRows {
  Softmax softmax[2];
  float delta[2];
  float shift[2];  // what a softmax's inverse times D is

  MOLEX_DEVICE void set(int i, const Softmax& of, float inner) {
    softmax[i] = of;
    delta[i] = inner;
    shift[i] = of.inverse * inner;
  }
};

// Row j is a query of keys i: dz = dZ_ji, from z and dp = dP_ji.
template <class E, bool Drops, bool Masked, int N>
MOLEX_DEVICE void as_query(float (&dz)[1][N][4],
                           const float (&z)[1][N][4],
                           const float (&dp)[1][N][4],
                           const OwnRows& own,
                           const Mask& visible,
                           const Dropout& keeps,
                           float scale2,
                           int row,
                           int other) {
  MOLEX_UNROLL for (int n = 0; n < N; ++n) {
    MOLEX_UNROLL for (int e = 0; e < 4; ++e) {
      const int j = row + lane_row() + e / 2 * 8, i = other + 8 * n + lane_column() + e % 2;
      const Softmax& softmax = own.softmax[e / 2];
      const float delta = own.delta[e / 2], power = exponential<E>(z[0][n][e], scale2, softmax.origin);
      float value;
      if constexpr (sizeof(E) == 2 && !Drops) {
        value = power * device::multiply_add(dp[0][n][e], softmax.inverse, -own.shift[e / 2]);
      } else {
        // The product is rounded first, so that the difference is 0 if D is this very product.
        const float kept = Drops ? device::multiply(dp[0][n][e], keeps(j, i)) : dp[0][n][e];
        value = power * softmax.inverse * (kept - delta);
      }
      const bool seen = !Masked || (visible.exists(i) && !visible.later(j, i));
      dz[0][n][e] = seen ? value : 0.0f;
    }
  }
}

// Row j is a key of queries i: dz = dZ_ij, or `Adds` it, and z = P_ij, with what dropout leaves of it.
template <class E, bool Drops, bool Masked, bool Adds, int N>
MOLEX_DEVICE void as_key(float (&dz)[1][N][4],
                         float (&z)[1][N][4],
                         const float (&dp)[1][N][4],
                         const Softmax* softmax,
                         const float* delta,
                         const Mask& visible,
                         const Dropout& keeps,
                         float scale2,
                         int row,
                         int other) {
  MOLEX_UNROLL for (int n = 0; n < N; ++n) {
    const int first = 8 * n + lane_column();
    struct alignas(16) {
      Softmax of[2];
    } pair;
    pair = *reinterpret_cast<const decltype(pair)*>(softmax + first);
    const float2 deltas = load_pair(delta + first);
    MOLEX_UNROLL for (int e = 0; e < 4; ++e) {
      const int j = row + lane_row() + e / 2 * 8, i = other + first + e % 2;
      const Softmax& of = pair.of[e % 2];
      const bool seen = !Masked || !visible.later(i, j);
      const float weight = exponential<E>(z[0][n][e], scale2, of.origin) * of.inverse;
      const float probability = seen ? weight : 0.0f;
      const float keep = Drops ? keeps(i, j) : 1.0f;
      const float kept = Drops ? device::multiply(dp[0][n][e], keep) : dp[0][n][e];
      z[0][n][e] = Drops ? probability * keep : probability;
      const float difference = kept - (e % 2 ? deltas.y : deltas.x);
      if (!Adds) {
        dz[0][n][e] = seen ? probability * difference : 0.0f;
      } else if (seen) {
        dz[0][n][e] += probability * difference;
      }
    }
  }
}

// <G, L> of this lane's two rows.
template <class E, int D>
MOLEX_DEVICE void center(
    float (&result)[2], const BackwardLaunch<E>& s, const E* d_out, int64_t head, int row) {
  const Problem& p = s.b.problem;
  const float* low_ranks = s.low_ranks(s.iteration) + head * p.length * p.width;
  MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
    const int mine = row + lane_row() + 8 * i;
    result[i] = 0.0f;
    for (int column = lane() % 4; mine < p.length && column < p.width; column += 4) {
      result[i] += d_out[mine * D + column] * low_ranks[mine * p.width + column];
    }
  }
  MOLEX_UNROLL for (int i = 0; i < 2; ++i) result[i] = row_sum(result[i]);
}

// Adds what the later iterations have left in `sums` to the accumulator's pair, and leaves it there for the
// earlier ones, but for the first iteration.
template <class E>
MOLEX_DEVICE void carry(const BackwardLaunch<E>& s, float* sums, float& first, float& second) {
  if (!s.is_last()) {
    const float2 later = load_pair(sums);
    first += later.x;
    second += later.y;
  }
  if (!s.is_first()) store_pair(sums, first, second);
}

// From sum_i dZ_ji K~_i and sum_i P_ij G_i of this warp's rows: the recurrences of the dual and of the
// threshold, and the gradients so far. `shared` is this warp's to use.
template <class E, int D, Role R>
MOLEX_DEVICE void finish(const BackwardLaunch<E>& s,
                         float (&grad_own)[D / 8][4],
                         float (&grad_values)[D / 8][4],
                         E* shared,
                         const Mask& visible,
                         int64_t head,
                         int row) {
  constexpr bool kReloads = BackwardTile<E, D>::kReloads;
  const Backward& b = s.b;
  const Problem& p = b.problem;
  const int64_t rows = padded_rows(p), base = head * rows * D, step = p.all_heads() * rows * D;
  const bool is_first = s.is_first(), is_last = s.is_last();
  MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
    const int own_row = row + lane_row() + 8 * i;
    const bool real = visible.exists(own_row);
    float of_threshold = 0.0f;
    MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
      const int mine = kReloads ? device::opaque(own_row) : own_row, column = 8 * n + lane_column();
      const int64_t place = base + static_cast<int64_t>(mine) * D + column;
      float* of_own = grad_own[n] + 2 * i;
      MOLEX_UNROLL for (int c = 0; c < 2; ++c) of_own[c] = real ? of_own[c] * p.scale : 0.0f;
      if constexpr (R == Role::kQuery) {
        carry(s, s.q + place, of_own[0], of_own[1]);
        continue;
      }
      float* of_values = grad_values[n] + 2 * i;
      if (!real) of_values[0] = of_values[1] = 0.0f;
      carry(s, s.v + place, of_values[0], of_values[1]);
      float2 carried = {0.0f, 0.0f};
      if (!is_last) {
        carried = load_pair(s.dual + place);
      } else if (b.grad_sparse.data && real) {
        const float* from = head_of<float>(p, b.grad_sparse, head) + mine * b.grad_sparse.row + column;
        if (column < p.width) carried.x = -from[0];
        if (column + 1 < p.width) carried.y = -from[1];
      }
      const Sides sides = load_sides(s.sides + place);
      Sides beside = sides;  // of the other one of the last two iterations
      if (kSumsInner<E> && is_last && !is_first) beside = load_sides(s.sides + place - step);
      if (kSumsInner<E> && s.iteration + 2 == p.iterations) beside = load_sides(s.sides + place + step);
      float before[2], next[2];
      MOLEX_UNROLL for (int c = 0; c < 2; ++c) {
        const float product = of_own[c];
        const int8_t where = sides.of[c];
        const bool outside = where != kInside;
        const StepBack step = step_back(product, c ? carried.y : carried.x, outside, is_first, is_last);
        float term = step.threshold;
        if constexpr (kSumsInner<E>) {
          // The ga of the last two iterations add up to the difference of their products if they are on the
          // same side of the threshold: the large part cancels, so it is never added.
          const bool same = beside.of[c] == where;
          if (is_last && !is_first && same) term = product;
          if (s.iteration + 2 == p.iterations && same) term = -product;
        }
        of_threshold -= outside ? where * term : 0.0f;
        of_own[c] = step.sum;
        before[c] = step.dual;
        next[c] = step.next;
      }
      carry(s, s.k + place, of_own[0], of_own[1]);
      if (is_first) continue;
      store_pair(s.dual + place, before[0], before[1]);
      store_pair(s.next_d_out + place, next[0], next[1]);
      if constexpr (!kSumsInner<E>) {
        const float* low_ranks = s.low_ranks(s.iteration - 1) + (head * p.length + mine) * p.width;
        const int within = real ? p.width - column : 0;
        const float2 low_rank = load_within(low_ranks + column, within, p.width % 2 == 0);
        of_own[0] = next[0];
        of_own[1] = next[1];
        of_values[0] = low_rank.x;
        of_values[1] = low_rank.y;
      }
    }
    if constexpr (R == Role::kQuery) continue;
    of_threshold = row_sum(of_threshold);
    if (lane_column() != 0) continue;
    float* sum = s.threshold + head * rows + own_row;
    *sum = is_last ? of_threshold : *sum + of_threshold;
  }
  if constexpr (!kSumsInner<E> && R != Role::kQuery) {
    if (!is_first) {  // D of the iteration before
      const auto pair = [](const float (&c)[D / 8][4]) {
        return [&](int n, int i) { return float2{c[n][2 * i], c[n][2 * i + 1]}; };
      };
      float delta[2];
      inner_products<E, D>(delta, pair(grad_own), pair(grad_values));
      float* to = s.next_delta + head * rows + row + lane_row();
      if (lane_column() == 0) to[0] = delta[0];
      if (lane_column() == 0) to[8] = delta[1];
    }
  }
  if (!is_first) return;
  if constexpr (R == Role::kQuery) {
    if (b.grad_q) store_tile<D>(p, static_cast<E*>(b.grad_q), head, row, grad_own, shared);
  } else {
    if (b.grad_k) store_tile<D>(p, static_cast<E*>(b.grad_k), head, row, grad_own, shared);
    if constexpr (sizeof(E) == 2) device::sync_warp();  // both use `shared`
    if (b.grad_v) store_tile<D>(p, static_cast<E*>(b.grad_v), head, row, grad_values, shared);
  }
}

template <class E, int D, Role R, bool Drops>
MOLEX_KERNEL((BackwardTile<E, D>::kThreads), 1)
void rpc_backward_iteration(MOLEX_PARAMS BackwardLaunch<E> s) {
  using T = BackwardTile<E, D>;
  constexpr int kPitchD = kPitch<D>, kTileSize = T::kColumns * kPitchD;
  constexpr bool kInner = R == Role::kInner, kKey = R == Role::kKey || R == Role::kBoth,
                 kQuery = R != Role::kKey;
  const Problem& p = s.b.problem;
  const int tiles = (p.length + T::kRows - 1) / T::kRows;
  const int64_t head = device::block() / tiles;
  const int first = (device::block() - static_cast<int>(head) * tiles) * T::kRows, row = first + 16 * warp();
  const auto matrices = [&] {
    return s.template matrices<D, kKey, kQuery>(T::kReloads ? device::opaque(head) : head);
  };
  const auto kept_matrices = matrices();

  E* own_tile = reinterpret_cast<E*>(device::shared());
  E* own_values = own_tile + T::kRows * kPitchD;
  E* own_d_out = own_values + T::kRows * kPitchD;
  E* stages = own_d_out + T::kRows * kPitchD;
  Softmax* softmax = reinterpret_cast<Softmax*>(stages + 3 * T::kStages * kTileSize);
  float* deltas = reinterpret_cast<float*>(softmax + T::kStages * T::kColumns);
  const auto fetch = [&](int other) {
    const int stage = other / T::kColumns % T::kStages;
    const auto of = T::kReloads ? matrices() : kept_matrices;
    E* to = stages + stage * 3 * kTileSize;
    copy_rows<E, D, T::kColumns, T::kThreads>(to, of.other + other * D);
    if constexpr (kQuery) copy_rows<E, D, T::kColumns, T::kThreads>(to + kTileSize, of.values + other * D);
    if constexpr (kKey) {
      copy_rows<E, D, T::kColumns, T::kThreads>(to + 2 * kTileSize, of.d_out + other * D);
      copy_numbers<T::kColumns>(softmax + stage * T::kColumns, of.softmax + other);
      copy_numbers<T::kColumns>(deltas + stage * T::kColumns, of.delta + other);
    }
  };
  copy_rows<E, D, T::kRows, T::kThreads>(own_tile, kept_matrices.own + first * D);
  if constexpr (kKey) copy_rows<E, D, T::kRows, T::kThreads>(own_values, kept_matrices.values + first * D);
  if constexpr (kQuery) copy_rows<E, D, T::kRows, T::kThreads>(own_d_out, kept_matrices.d_out + first * D);

  // Under a causal mask a key's queries come after it.
  const int begin = p.causal && !kQuery ? first / T::kColumns * T::kColumns : 0;
  const int end = p.causal && !kKey && first + T::kRows < p.length ? first + T::kRows : p.length;
  fetch(begin);
  device::commit_copies();

  const Mask visible(p, head, row);
  const Dropout keeps(p, head, Drops);
  const float scale2 = score_scale(p);
  float centers[2] = {0.0f, 0.0f}, inner[2] = {0.0f, 0.0f};
  if constexpr (kInner) center<E, D>(centers, s, kept_matrices.d_out, head, row);
  const auto load_own = [&] {
    const auto of = T::kReloads ? matrices() : kept_matrices;
    OwnRows own;
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      const int mine = row + lane_row() + 8 * i;
      own.set(i, of.softmax[mine], kInner ? centers[i] : of.delta[mine]);
    }
    return own;
  };
  const OwnRows kept_own = load_own();
  float grad_own[1][D / 8][4], grad_values[1][D / 8][4];
  clear(grad_own);
  clear(grad_values);

  for (int other = begin; other < end; other += T::kColumns) {
    if (other + T::kColumns < end) fetch(other + T::kColumns);
    device::commit_copies();
    device::wait_copies<1>();
    device::sync();
    if (row < p.length) {
      const int stage = other / T::kColumns % T::kStages, warp_row = 16 * warp() * kPitchD;
      const E* tile = stages + stage * 3 * kTileSize;
      const bool query = kQuery && (!p.causal || other < row + 16);
      const bool key = kKey && (!p.causal || other + T::kColumns > row);
      typename T::Accumulator z, dz, dp;
      clear(z);
      clear(dz);
      gemm_nt<E, D, T::kAhead, true>(z, own_tile + warp_row, tile);
      if (query) {
        clear(dp);
        gemm_nt<E, D, T::kAhead, false>(dp, own_d_out + warp_row, tile + kTileSize);
        const OwnRows own = T::kReloads ? load_own() : kept_own;
        if (other + T::kColumns <= visible.seen) {
          as_query<E, Drops, false>(dz, z, dp, own, visible, keeps, scale2, row, other);
        } else {
          as_query<E, Drops, true>(dz, z, dp, own, visible, keeps, scale2, row, other);
        }
      }
      if constexpr (kInner) {
        MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
          float part = 0.0f;
          MOLEX_UNROLL for (int n = 0; n < T::kColumns / 8; ++n) part +=
              dz[0][n][2 * i] + dz[0][n][2 * i + 1];
          inner[i] += part;
        }
      }
      if constexpr (kKey) {
        if (key) {
          clear(dp);
          gemm_nt<E, D, T::kAhead, false>(dp, own_values + warp_row, tile + 2 * kTileSize);
          const Softmax* of = softmax + stage * T::kColumns;
          const float* delta = deltas + stage * T::kColumns;
          if (!p.causal || other >= row + 15) {
            as_key<E, Drops, false, true>(dz, z, dp, of, delta, visible, keeps, scale2, row, other);
          } else {
            as_key<E, Drops, true, true>(dz, z, dp, of, delta, visible, keeps, scale2, row, other);
          }
          gemm_nn<E>(grad_values, z, tile + 2 * kTileSize);
        }
      }
      if constexpr (!kInner) gemm_nn<E>(grad_own, dz, tile);
    }
    if (other + T::kStages * T::kColumns < end) device::sync();  // a fetch overwrites this stage
  }

  if (row >= p.length) return;
  if constexpr (kInner) {
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      const float sum = centers[i] + row_sum(inner[i]);
      if (lane_column() == 0) s.delta[head * padded_rows(p) + row + lane_row() + 8 * i] = sum;
    }
  } else {
    finish<E, D, R>(s, grad_own[0], grad_values[0], own_tile + 16 * warp() * kPitchD, visible, head, row);
  }
}

}  // namespace molex::rpc
