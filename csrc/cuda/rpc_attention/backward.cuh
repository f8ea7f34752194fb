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
// small, so D has to be precise, and as dP is. In 16 bits it is taken from L in fp32 (of the last iteration
// from the result and what its rounding took), by tensor cores in the order of dP. In fp32 a separate launch
// computes it from the same rounded numbers: with c = <G_j, L_j> it is c + sum_i P_ji (dP_ji - c), whose
// terms are small both where P is small and where P is close to 1.
//
// See gradient.cuh for the iterations; here is what stands before and behind them. Budget: 256 threads of 80
// registers, no spills.

#pragma once

#include "cuda/rpc_attention/copies.cuh"
#include "cuda/rpc_attention/equations.cuh"

namespace molex::rpc {

// By which exp(score - largest) / sum is computed again, as the forward pass has computed it.
struct alignas(8) Softmax {
  float origin, inverse;
};
template <class E>
MOLEX_DEVICE Softmax make_softmax(float largest, float total, float scale2) {
  if constexpr (sizeof(E) == 4) return {largest, 1.0f / total};
  const float origin = largest * scale2;  // what is rounded off is made good in `inverse`
  return {origin, device::exp2(device::multiply_add(-largest, scale2, origin)) / total};
}
template <class E>
MOLEX_DEVICE float exponential(float score, float scale2, float origin) {
  return device::exp2(sizeof(E) == 4 ? (score - origin) * scale2
                                     : device::multiply_add(score, scale2, -origin));
}

// The sides of two neighbours.
struct alignas(2) Sides {
  int8_t of[2];
};
MOLEX_DEVICE Sides load_sides(const int8_t* from) { return *reinterpret_cast<const Sides*>(from); }

// Whether D needs a launch of its own.
template <class E>
constexpr bool kSumsInner = sizeof(E) == 4;

template <class E>
struct BackwardScratch {
  E* keys;        // K~_1 ... K~_n, packed
  int8_t* sides;  // side(a_t), likewise
  E *values, *queries;
  E* d_out[2];              // G of this iteration, and of the one before, which this one writes
  Softmax* softmax;         // of every iteration
  float* delta[2];          // D, the rows' inner products of G and L
  float *dual, *k, *v, *q;  // gu, gu + gk, and what the other gradients have come to
  float* threshold;         // a row's gradient of its threshold
  int64_t bytes;

  BackwardScratch(const Problem& p, void* base, int columns) {
    const int64_t rows = p.all_heads() * padded_rows(p), count = rows * columns;
    const int64_t carried = p.iterations > 1 ? count : 0;
    Arena arena{static_cast<char*>(base)};
    keys = arena.take<E>(p.iterations * count);
    sides = arena.take<int8_t>(p.iterations * count);
    values = arena.take<E>(count);
    queries = arena.take<E>(p.q.data ? count : 0);
    d_out[0] = arena.take<E>(count);
    d_out[1] = arena.take<E>(carried);
    softmax = arena.take<Softmax>(p.iterations * rows);
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
struct BackwardLaunch {
  Backward b;
  int32_t iteration;
  E* keys;  // of this iteration; of all of them to rebuild
  int8_t* sides;
  E *values, *queries, *d_out, *next_d_out;
  Softmax* softmax;  // as `keys`
  float *delta, *next_delta, *dual, *k, *v, *q, *threshold;

  BackwardLaunch(const Backward& backward, const BackwardScratch<E>& scratch, int t, int columns)
      : b(backward),
        iteration(t),
        values(scratch.values),
        queries(scratch.queries),
        d_out(scratch.d_out[t & 1]),
        next_d_out(scratch.d_out[(t + 1) & 1]),
        delta(scratch.delta[t & 1]),
        next_delta(scratch.delta[(t + 1) & 1]),
        dual(scratch.dual),
        k(scratch.k),
        v(scratch.v),
        q(scratch.q),
        threshold(scratch.threshold) {
    const Problem& p = b.problem;
    const int64_t before = t == p.iterations ? 0 : t * p.all_heads() * padded_rows(p);
    keys = scratch.keys + before * columns;
    sides = scratch.sides + before * columns;
    softmax = scratch.softmax + before;
  }

  MOLEX_DEVICE bool is_first() const { return iteration == 0; }
  MOLEX_DEVICE bool is_last() const { return iteration + 1 == b.problem.iterations; }
  // L of an iteration, in fp32; of the last one it is the result, and kept only if that is fp32.
  MOLEX_DEVICE const float* low_ranks(int t) const {
    const Problem& p = b.problem;
    return t + 1 == p.iterations ? static_cast<const float*>(b.out)
                                 : b.low_ranks + t * p.all_heads() * p.length * p.width;
  }

  // A head's matrices: of the product the block's rows in their role, the rows that run past them, and so on.
  struct Matrices {
    const E *own, *other, *values, *d_out;
    const Softmax* softmax;
    const float* delta;
  };
  template <int D, bool Key, bool Query>
  MOLEX_DEVICE Matrices matrices(int64_t head) const {
    const int64_t rows = padded_rows(b.problem), place = head * rows * D;
    const E* all_keys = keys + place;
    const E* all_queries = b.problem.q.data && !(Key && Query) ? queries + place : all_keys;
    return {Key ? all_keys : all_queries,
            Query ? all_keys : all_queries,
            values + place,
            d_out + place,
            softmax + head * rows,
            delta + head * rows};
  }
};

constexpr int kRebuildThreads = 256;

// D of the last iteration for the block's rows, 16 by a warp.
template <class E, int D>
MOLEX_DEVICE void last_inner_products(const BackwardLaunch<E>& s, const Place<D, kRebuildThreads>& at) {
  if (warp() >= at.kRows / 16) return;
  const Problem& p = s.b.problem;
  const int row = at.first + 16 * warp() + lane_row();
  const int64_t packed = at.head * padded_rows(p) + row, plain = at.head * p.length + row;
  const bool even = p.width % 2 == 0;
  const auto load_g = [&](int n, int i) {
    return load_pair(s.next_d_out + (packed + 8 * i) * D + 8 * n + lane_column());
  };
  const auto load_low_rank = [&](int n, int i) {
    const int column = 8 * n + lane_column(), within = row + 8 * i < p.length ? p.width - column : 0;
    const int64_t place = (plain + 8 * i) * p.width + column;
    const float2 out = load_within(static_cast<const E*>(s.b.out) + place, within, even);
    const float2 rest = load_within(static_cast<const E*>(s.b.out_rest) + place, within, even);
    return float2{out.x + rest.x, out.y + rest.y};
  };
  float delta[2];
  inner_products<E, D>(delta, load_g, load_low_rank);
  if (lane_column() != 0) return;
  MOLEX_UNROLL for (int i = 0; i < 2; ++i) s.next_delta[packed + 8 * i] = delta[i];
}

// K~_t, the sides of the threshold and the softmax's numbers for every t; packed copies of v, q and the
// gradient of L; D of the last iteration. Behind the last row stand zeros.
template <class E, int D>
MOLEX_KERNEL(kRebuildThreads, 1)
void rpc_backward_rebuild(MOLEX_PARAMS BackwardLaunch<E> s) {
  const Backward& b = s.b;
  const Problem& p = b.problem;
  const Place<D, kRebuildThreads> at(p);
  const int64_t all_rows = p.all_heads() * padded_rows(p), packed_row = at.head * padded_rows(p) + at.row;
  const int64_t plain_row = at.head * p.length + at.row, plain = plain_row * p.width + at.column;
  const bool real = exists(p, at.head, at.row);
  const int left = real ? p.width - at.column : 0;
  const auto load = [&](const Tensor4& t) {
    const E* from = head_of<E>(p, t, at.head);
    return load_octet(from + at.row * t.row + at.column, whole_octets(from, t.row, p.width), left);
  };
  *reinterpret_cast<Octet<E>*>(s.values + at.offset) = load(p.v);
  if (p.q.data) *reinterpret_cast<Octet<E>*>(s.queries + at.offset) = load(p.q);
  const Octet<E> grad_out = load(b.grad_out);
  *reinterpret_cast<Octet<E>*>(s.next_d_out + at.offset) = grad_out;
  if (at.row >= p.length) {  // what no later launch writes, but reads
    if (p.iterations > 1) *reinterpret_cast<Octet<E>*>(s.d_out + at.offset) = grad_out;
    if (at.column == 0 && kSumsInner<E>) s.next_delta[packed_row] = 0.0f;
    if (at.column == 0 && p.iterations > 1) s.delta[packed_row] = 0.0f;
  }

  const Octet<E> k = load(p.k);
  const float bound = bound_of(p, at.head, at.row), scale2 = score_scale(p);
  float low_rank[kOctet] = {}, u[kOctet] = {};
  for (int t = 0; t < p.iterations; ++t) {
    float new_keys[kOctet];
    Octet<int8_t> sides;
    MOLEX_UNROLL for (int i = 0; i < kOctet; ++i) {
      const float x = device::to_float(k.x[i]);
      const Split split = soft_threshold(x, low_rank[i], u[i], bound);
      new_keys[i] = split.key;
      sides.x[i] = side(x - low_rank[i] + u[i], bound);
      u[i] = split.w;
    }
    const int64_t before = t * all_rows;
    store_octet(s.keys + before * D + at.offset, new_keys);
    *reinterpret_cast<Octet<int8_t>*>(s.sides + before * D + at.offset) = sides;
    if (at.column == 0) {
      const float* stats = b.stats + 2 * t * p.all_heads() * p.length + plain_row;
      Softmax softmax = {0.0f, 0.0f};
      if (real) softmax = make_softmax<E>(stats[0], stats[p.all_heads() * p.length], scale2);
      s.softmax[before + packed_row] = softmax;
    }
    if (t + 1 == p.iterations) break;
    const float* low_ranks = b.low_ranks + t * p.all_heads() * p.length * p.width;
    const Octet<float> low = load_octet(low_ranks + plain, whole_octets(low_ranks, p.width, p.width), left);
    MOLEX_UNROLL for (int i = 0; i < kOctet; ++i) {
      low_rank[i] = low.x[i];
      u[i] -= low.x[i];
    }
  }
  if constexpr (!kSumsInner<E>) {
    device::sync();  // G of the block's rows has been packed
    last_inner_products<E, D>(s, at);
  }
}

constexpr int kSumThreads = 128;

// The threshold's gradient from its rows': a copy, or their sum in a fixed order.
template <class E>
MOLEX_KERNEL(kSumThreads, 1)
void rpc_backward_threshold(MOLEX_PARAMS BackwardLaunch<E> s) {
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
