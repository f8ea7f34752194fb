// RPC attention backward: the iterations from last to first, one launch each (two where q is given, and
// in fp32 one more).
//
// A block owns 64 rows j of a head in every role, so nothing is added across blocks and the result
// does not depend on the order in which they run. With Z = K~ K~^T, which is symmetric, one product
// serves row j as a query of all keys i and as a key of all queries i:
//   gK~_j = scale sum_i (dZ_ji + dZ_ij) K~_i ,   gV_j += sum_i P_ij G_i ,   G = gL - gu
// and the recurrences of the dual and the threshold follow for the same rows in the epilogue.
//
// dZ_ji = P_ji (dP_ji - D_j) with dP = G V^T and D_j = <G_j, L_j>. For peaked attention the difference is
// small, so in fp32 a separate launch computes D_j from the same rounded numbers: with c = <G_j, L_j> it is c
// + sum_i P_ji (dP_ji - c), whose terms are small both where P is small and where P is close to 1.
//
// Budget. gradient: 128 threads, at most 255 registers; shared memory (3 * 64 + 6 columns) (D + 8)
// bytes(E) + 24 columns, at most 157,056 bytes (fp32, D = 128), so that it runs on sm_80. No spills.

#pragma once

#include "cuda/rpc_attention/equations.cuh"

namespace molex::rpc {

// Whether D needs a launch of its own.
template <class E>
constexpr bool kSumsInner = sizeof(E) == 4;

template <class E>
struct BackwardScratch {
  E* clean;       // K~_1 ... K~_n, packed
  int8_t* sides;  // side(a_t), likewise
  E *values, *queries;
  E* upstream[2];           // G of this iteration, and of the one before, which this one writes
  float* delta[2];          // D, their rows' inner products with L
  float *dual, *k, *v, *q;  // gu, gu + gk, and what the other gradients have come to
  float* threshold;         // a row's gradient of its threshold
  int64_t bytes;

  BackwardScratch(const Problem& p, void* base, int columns) {
    const int64_t rows = p.all_heads() * padded_rows(p), count = rows * columns;
    const int64_t carried = p.iterations > 1 ? count : 0;
    Arena arena{static_cast<char*>(base)};
    clean = arena.take<E>(p.iterations * count);
    sides = arena.take<int8_t>(p.iterations * count);
    values = arena.take<E>(count);
    queries = arena.take<E>(p.q.data ? count : 0);
    upstream[0] = arena.take<E>(count);
    upstream[1] = arena.take<E>(carried);
    delta[0] = arena.take<float>(rows);
    delta[1] = arena.take<float>(p.iterations > 1 ? rows : 0);
    dual = arena.take<float>(carried);
    k = arena.take<float>(carried);
    v = arena.take<float>(carried);
    q = arena.take<float>(p.q.data ? carried : 0);
    threshold = arena.take<float>(rows);
    bytes = arena.used;
  }
};

// The parameters of one launch. `iteration` counts from 0; the rebuilding launch has the number of
// iterations.
template <class E>
struct BackwardStep {
  Backward b;
  int32_t iteration;
  bool as_query = false, as_key = false;  // the roles of a block's rows; both at once only without q
  E* clean;                               // of this iteration; of all of them to rebuild
  int8_t* sides;
  E *values, *queries, *upstream, *next_upstream;
  float *delta, *next_delta, *dual, *k, *v, *q, *threshold;

  BackwardStep(const Backward& backward, const BackwardScratch<E>& scratch, int t, int columns)
      : b(backward),
        iteration(t),
        values(scratch.values),
        queries(scratch.queries),
        upstream(scratch.upstream[t & 1]),
        next_upstream(scratch.upstream[(t + 1) & 1]),
        delta(scratch.delta[t & 1]),
        next_delta(scratch.delta[(t + 1) & 1]),
        dual(scratch.dual),
        k(scratch.k),
        v(scratch.v),
        q(scratch.q),
        threshold(scratch.threshold) {
    const Problem& p = b.problem;
    const int64_t before = t == p.iterations ? 0 : t * p.all_heads() * padded_rows(p) * columns;
    clean = scratch.clean + before;
    sides = scratch.sides + before;
  }
};

constexpr int kRebuildThreads = 256;

// K~_t and the sides of the threshold for every t, from L_1 ... L_{n-1}; packed copies of v, q and the
// upstream gradient; D of the last iteration. A warp takes a row.
template <class E, int D>
MOLEX_KERNEL(kRebuildThreads, 1)
void rebuild(MOLEX_PARAMS BackwardStep<E> s) {
  const Backward& b = s.b;
  const Problem& p = b.problem;
  const int64_t rows = padded_rows(p), all_rows = p.all_heads() * rows;
  const int64_t packed = device::block() * (kRebuildThreads / kWarp) + warp();
  if (packed >= all_rows) return;
  const int64_t head = packed / rows;
  const int row = static_cast<int>(packed % rows);
  const bool real = exists(p, head, row);
  const float bound = bound_of(p, head, row);
  const int64_t plain = (head * p.length + row) * p.width;
  const E zero = device::from_float<E>(0.0f);
  float delta = 0.0f;
  for (int column = lane(); column < D; column += kWarp) {
    const bool inside = real && column < p.width;
    const int64_t place = packed * D + column;
    const float k = inside ? device::to_float(head_of<E>(p, p.k, head)[row * p.k.row + column]) : 0.0f;
    float low_rank = 0.0f, u = 0.0f;
    for (int t = 0; t < p.iterations; ++t) {
      const Step step = soft_threshold(k, low_rank, u, bound);
      s.clean[t * all_rows * D + place] = device::from_float<E>(step.clean);
      s.sides[t * all_rows * D + place] = side(k - low_rank + u, bound);
      if (t + 1 == p.iterations) break;
      low_rank = inside ? b.low_ranks[t * p.all_heads() * p.length * p.width + plain + column] : 0.0f;
      u = step.w - low_rank;
    }
    s.values[place] = inside ? head_of<E>(p, p.v, head)[row * p.v.row + column] : zero;
    if (p.q.data) s.queries[place] = inside ? head_of<E>(p, p.q, head)[row * p.q.row + column] : zero;
    const E g = inside ? head_of<E>(p, b.grad_out, head)[row * b.grad_out.row + column] : zero;
    s.next_upstream[place] = g;
    if (!kSumsInner<E> && inside) {
      delta += device::to_float(g) * device::to_float(static_cast<const E*>(b.out)[plain + column]);
    }
  }
  if constexpr (!kSumsInner<E>) {
    MOLEX_UNROLL for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) delta +=
        device::shuffle_xor(delta, lanes);
    if (lane() == 0) s.next_delta[packed] = delta;
  }
}

template <class E, int D>
struct GradientTile {
  static constexpr int kWarps = 4;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kColumns = sizeof(E) == 2 ? (D <= 64 ? 64 : 32) : (D <= 64 ? 32 : 16);
  static constexpr int kStages = 2;
  static constexpr bool kReloads = sizeof(E) == 4 && D > 64;  // what else the loop would spill
  static constexpr int kAhead = sizeof(E) == 4 ? (D > 64 ? 8 : 16) : D;
  static constexpr int kStatistics = 3 * kStages * kColumns;  // floats: largest, 1 / sum, D
  static constexpr int kSharedBytes =
      (3 * kRows + 3 * kStages * kColumns) * kPitch<D> * sizeof(E) + kStatistics * sizeof(float);
  static_assert(kRowsMultiple % kRows == 0 && kRowsMultiple % kColumns == 0);
};

// With `Sums` it computes only D of a block's rows, as queries.
template <class E, int D, bool Sums>
MOLEX_KERNEL((GradientTile<E, D>::kWarps * kWarp), 1)
void gradient(MOLEX_PARAMS BackwardStep<E> s) {
  using T = GradientTile<E, D>;
  constexpr int kPitchD = kPitch<D>, kTileSize = T::kColumns * kPitchD;
  const Backward& b = s.b;
  const Problem& p = b.problem;
  const int tiles = (p.length + T::kRows - 1) / T::kRows, t = s.iteration;
  const int64_t head = device::block() / tiles, rows = padded_rows(p), base = head * rows * D;
  const int first = static_cast<int>(device::block() % tiles) * T::kRows, row = first + 16 * warp();
  // A head's matrices: this block's rows of the product, the rows that run past them, and so on.
  struct Matrices {
    const E *own, *other, *values, *upstream;
    const float *largest, *total;
    float* delta;
  };
  const auto matrices = [&] {
    const int64_t at = T::kReloads ? device::opaque(head) : head, place = at * rows * D;
    const E* clean = s.clean + place;
    const E* queries = p.q.data ? s.queries + place : clean;
    const float* largest = b.stats + (2 * t * p.all_heads() + at) * p.length;
    return Matrices{s.as_key ? clean : queries,
                    s.as_key ? queries : clean,
                    s.values + place,
                    s.upstream + place,
                    largest,
                    largest + p.all_heads() * p.length,
                    s.delta + at * rows};
  };
  const Matrices kept_matrices = matrices();

  E* own_tile = reinterpret_cast<E*>(device::shared());
  E* own_values = own_tile + T::kRows * kPitchD;
  E* own_upstream = own_values + T::kRows * kPitchD;
  E* stages = own_upstream + T::kRows * kPitchD;
  float* statistics = reinterpret_cast<float*>(stages + 3 * T::kStages * kTileSize);
  const auto fetch = [&](int other) {
    const int stage = other / T::kColumns % T::kStages;
    const Matrices of = T::kReloads ? matrices() : kept_matrices;
    E* to = stages + stage * 3 * kTileSize;
    copy_rows<E, D>(to, of.other + other * D, T::kColumns);
    copy_rows<E, D>(to + kTileSize, of.values + other * D, T::kColumns);
    if constexpr (Sums) return;
    copy_rows<E, D>(to + 2 * kTileSize, of.upstream + other * D, T::kColumns);
    for (int i = device::thread(); i < T::kColumns; i += device::threads()) {
      float* numbers = statistics + stage * 3 * T::kColumns + i;
      const bool inside = other + i < p.length;
      numbers[0] = inside ? of.largest[other + i] : 0.0f;
      numbers[T::kColumns] = inside ? 1.0f / of.total[other + i] : 0.0f;
      numbers[2 * T::kColumns] = of.delta[other + i];
    }
  };
  copy_rows<E, D>(own_tile, kept_matrices.own + first * D, T::kRows);
  if constexpr (!Sums) copy_rows<E, D>(own_values, kept_matrices.values + first * D, T::kRows);
  copy_rows<E, D>(own_upstream, kept_matrices.upstream + first * D, T::kRows);

  // Under a causal mask a key's queries come after it.
  const int begin = p.causal && !s.as_query ? first / T::kColumns * T::kColumns : 0;
  const int end = p.causal && !s.as_key && first + T::kRows < p.length ? first + T::kRows : p.length;
  fetch(begin);
  device::commit_copies();

  const Mask visible(p, head);
  const Dropout keeps(p, head, t + 1 == p.iterations);
  const float scale2 = score_scale(p);
  struct Own {
    float largest[2], inverse[2], delta[2];
    bool real[2];
  };
  float center[2] = {0.0f, 0.0f};  // <G, L>
  if constexpr (Sums) {
    const float* low_ranks = t + 1 == p.iterations ? static_cast<const float*>(b.out)
                                                   : b.low_ranks + t * p.all_heads() * p.length * p.width;
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      const int mine = row + lane_row() + 8 * i;
      if (mine >= p.length) continue;
      const float* low_rank = low_ranks + (head * p.length + mine) * p.width;
      for (int column = lane() % 4; column < p.width; column += 4) {
        center[i] += kept_matrices.upstream[mine * D + column] * low_rank[column];
      }
    }
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) center[i] = row_sum(center[i]);
  }
  const auto load_own = [&] {
    const Matrices of = T::kReloads ? matrices() : kept_matrices;
    Own own;
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      const int mine = row + lane_row() + 8 * i;
      own.largest[i] = mine < p.length ? of.largest[mine] : 0.0f;
      own.inverse[i] = mine < p.length ? 1.0f / of.total[mine] : 0.0f;
      own.delta[i] = Sums ? center[i] : of.delta[mine];
      own.real[i] = visible.exists(mine);
    }
    return own;
  };
  const Own kept_own = load_own();
  float inner[2] = {0.0f, 0.0f};
  float grad_own[1][D / 8][4], grad_values[1][D / 8][4];
  clear(grad_own);
  clear(grad_values);

  for (int other = begin; other < end; other += T::kColumns) {
    if (other + T::kColumns < end) fetch(other + T::kColumns);
    device::commit_copies();
    device::wait_copies<1>();
    device::sync();
    const int stage = other / T::kColumns % T::kStages;
    const E* tile = stages + stage * 3 * kTileSize;
    const float* numbers = statistics + stage * 3 * T::kColumns;
    const int warp_row = 16 * warp() * kPitchD;
    const bool query = s.as_query && (!p.causal || other < row + 16);
    const bool key = s.as_key && (!p.causal || other + T::kColumns > row);

    float z[1][T::kColumns / 8][4], dz[1][T::kColumns / 8][4], dp[1][T::kColumns / 8][4];
    clear(z);
    clear(dz);
    multiply_rows<E, D, T::kAhead, true>(z, own_tile + warp_row, tile);
    if (query) {  // row j is a query of key i
      clear(dp);
      multiply_rows<E, D, T::kAhead, false>(dp, own_upstream + warp_row, tile + kTileSize);
      const bool all = visible.all(row, other, T::kColumns);
      const Own own = T::kReloads ? load_own() : kept_own;
      MOLEX_UNROLL for (int n = 0; n < T::kColumns / 8; ++n) {
        MOLEX_UNROLL for (int e = 0; e < 4; ++e) {
          const int j = row + lane_row() + e / 2 * 8, i = other + 8 * n + lane_column() + e % 2;
          const float probability =
              device::exp2((z[0][n][e] - own.largest[e / 2]) * scale2) * own.inverse[e / 2];
          // The product is rounded first, so that the difference is 0 if D is this very product.
          const float kept = keeps.active ? device::multiply(dp[0][n][e], keeps(j, i)) : dp[0][n][e];
          const bool seen = all || (visible.exists(i) && !visible.later(j, i));
          if (seen) dz[0][n][e] = probability * (kept - own.delta[e / 2]);
        }
      }
    }
    if constexpr (Sums) {
      MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
        float part = 0.0f;
        MOLEX_UNROLL for (int n = 0; n < T::kColumns / 8; ++n) part += dz[0][n][2 * i] + dz[0][n][2 * i + 1];
        inner[i] += part;
      }
    }
    if (!Sums && key) {  // row j is a key of query i
      clear(dp);
      multiply_rows<E, D, T::kAhead, false>(dp, own_values + warp_row, tile + 2 * kTileSize);
      const Own own = T::kReloads ? load_own() : kept_own;
      MOLEX_UNROLL for (int n = 0; n < T::kColumns / 8; ++n) {
        MOLEX_UNROLL for (int e = 0; e < 4; ++e) {
          const int j = row + lane_row() + e / 2 * 8, column = 8 * n + lane_column() + e % 2;
          const int i = other + column;
          const bool seen = own.real[e / 2] && !visible.later(i, j);
          const float weight = device::exp2((z[0][n][e] - numbers[column]) * scale2);
          const float probability = seen ? weight * numbers[T::kColumns + column] : 0.0f;
          const float keep = keeps.active ? keeps(i, j) : 1.0f;
          const float kept = keeps.active ? device::multiply(dp[0][n][e], keep) : dp[0][n][e];
          z[0][n][e] = probability * keep;
          if (seen) dz[0][n][e] += probability * (kept - numbers[2 * T::kColumns + column]);
        }
      }
      multiply_columns<E>(grad_values, z, tile + 2 * kTileSize);
    }
    if constexpr (!Sums) multiply_columns<E>(grad_own, dz, tile);
    if (other + T::kStages * T::kColumns < end) device::sync();  // a fetch overwrites this stage
  }

  if constexpr (Sums) {
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      const float sum = center[i] + row_sum(inner[i]);
      if (lane_column() == 0) s.delta[head * rows + row + lane_row() + 8 * i] = sum;
    }
    return;
  }

  // The recurrences, for this lane's elements of the block's rows.
  const bool is_first = t == 0, is_last = t + 1 == p.iterations;
  const Own own = T::kReloads ? load_own() : kept_own;
  float* dual = s.dual + base;
  const int8_t* sides = s.sides + base;
  const auto carry = [&](float* sums, void* result, int mine, int column, float value) {
    const int64_t place = static_cast<int64_t>(mine) * D + column;
    if (!is_last) value += sums[base + place];
    if (!is_first) {
      sums[base + place] = value;
    } else if (mine < p.length && column < p.width && result) {
      static_cast<E*>(result)[(head * p.length + mine) * p.width + column] = device::from_float<E>(value);
    }
  };
  MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
    const int own_row = row + lane_row() + 8 * i;
    float of_threshold = 0.0f, delta = 0.0f;
    MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
      const int mine = T::kReloads ? device::opaque(own_row) : own_row;
      const int column = 8 * n + lane_column();
      const int64_t place = static_cast<int64_t>(mine) * D + column;
      float next[2];
      MOLEX_UNROLL for (int c = 0; c < 2; ++c) {
        const float product = own.real[i] ? grad_own[0][n][2 * i + c] * p.scale : 0.0f;
        if (!s.as_key) {
          carry(s.q, b.grad_q, mine, column + c, product);
          continue;
        }
        const bool inside = own.real[i] && column + c < p.width;
        const float gu = is_last ? 0.0f : dual[place + c];
        const float extra =
            is_last && b.grad_sparse.data && inside
                ? head_of<float>(p, b.grad_sparse, head)[mine * b.grad_sparse.row + column + c]
                : 0.0f;
        const int8_t where = sides[place + c];
        const bool outside = where != kInside;
        const float ga = outside ? extra - gu - product : 0.0f;
        float term = ga;
        if constexpr (kSumsInner<E>) {
          // The ga of the last two iterations add up to the difference of their products if they are on the
          // same side of the threshold: the large part cancels, so it is never added.
          const int64_t step = p.all_heads() * rows * D;
          if (is_last && !is_first && s.sides[base + place + c - step] == where) term = product;
          if (t + 2 == p.iterations && s.sides[base + place + c + step] == where) term = -product;
        }
        of_threshold -= outside ? where * term : 0.0f;
        carry(s.v, b.grad_v, mine, column + c, own.real[i] ? grad_values[0][n][2 * i + c] : 0.0f);
        // The accumulator holds gk + gu: gu contains -product of the later iteration, which gk would
        // otherwise have to add and subtract again. Outside the threshold ga contains -product; the sums are
        // written so that it is never added and subtracted.
        carry(s.k,
              b.grad_k,
              mine,
              column + c,
              is_first ? (outside ? extra - gu : product) : (outside ? 2.0f * (extra - product) - gu : gu));
        if (is_first) continue;
        // Writes gu of the iteration before, whose gL is -ga.
        const float before = outside ? extra - 2.0f * product : gu - product;
        dual[place + c] = before;
        next[c] = -ga - before;
        if (kSumsInner<E> || !inside) continue;
        const int64_t plain = ((t - 1) * p.all_heads() + head) * p.length + mine;
        delta += device::to_float(device::from_float<E>(next[c])) * b.low_ranks[plain * p.width + column + c];
      }
      if (s.as_key && !is_first) store_pair(s.next_upstream + base + place, next[0], next[1]);
    }
    if (!s.as_key) continue;
    if (!kSumsInner<E>) delta = row_sum(delta);
    of_threshold = row_sum(of_threshold);
    if (lane_column() != 0) continue;
    if (!kSumsInner<E> && !is_first) s.next_delta[head * rows + own_row] = delta;
    float* sum = s.threshold + head * rows + own_row;
    *sum = is_last ? of_threshold : *sum + of_threshold;
  }
}

constexpr int kSumThreads = 128;

// The threshold's gradient from its rows': a copy, or their sum in a fixed order.
template <class E>
MOLEX_KERNEL(kSumThreads, 1)
void sum_threshold(MOLEX_PARAMS BackwardStep<E> s) {
  const Backward& b = s.b;
  const Problem& p = b.problem;
  const int64_t head = device::block();
  const float* rows = s.threshold + head * padded_rows(p);
  float sum = 0.0f;
  for (int row = device::thread(); row < p.length; row += kSumThreads) {
    if (p.threshold_row) {
      b.grad_threshold[head * p.length + row] = rows[row];
    } else {
      sum += rows[row];
    }
  }
  if (p.threshold_row) return;
  float* parts = reinterpret_cast<float*>(device::shared());
  MOLEX_UNROLL for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += device::shuffle_xor(sum, lanes);
  if (lane() == 0) parts[warp()] = sum;
  device::sync();
  if (device::thread() == 0) {
    float total = 0.0f;
    for (int i = 0; i < kSumThreads / kWarp; ++i) total += parts[i];
    b.grad_threshold[head] = total;
  }
}

}  // namespace molex::rpc
