// RPC attention forward with a launch per iteration.
//
// Budget, without spills. rpc_forward_iteration: 128 threads of 255 registers; shared memory (rows + 4
// columns) (D + 8) bytes(E), at most 104,448 bytes (fp32, D = 128), so that it runs on sm_80.
// rpc_forward_prepare: 256 threads of 64 registers.

#pragma once

#include "cuda/rpc_attention/attention.cuh"
#include "cuda/rpc_attention/equations.cuh"

namespace molex::rpc {

// Packed copies, and w between the launches. There are two K~: some blocks still read the old one while
// others write the new one.
template <class E>
struct ForwardScratch {
  E *keys[2], *values, *queries;
  float* w;
  int64_t bytes;

  ForwardScratch(const Problem& p, void* base, int columns) {
    const int64_t count = p.all_heads() * padded_rows(p) * columns;
    Arena arena{static_cast<char*>(base)};
    keys[0] = arena.take<E>(count);
    keys[1] = arena.take<E>(p.iterations > 1 ? count : 0);
    values = arena.take<E>(count);
    queries = arena.take<E>(p.q.data ? count : 0);
    w = arena.take<float>(p.iterations > 1 ? count : 0);
    bytes = arena.used;
  }
};

// The parameters of one launch. `iteration` counts from 0; it is -1 for the preparation.
template <class E>
struct ForwardLaunch {
  Forward f;
  int32_t iteration;
  const E* keys;
  E *next_keys, *values, *queries;
  float* w;

  ForwardLaunch(const Forward& forward, const ForwardScratch<E>& scratch, int t)
      : f(forward),
        iteration(t),
        keys(scratch.keys[t & 1]),
        next_keys(scratch.keys[(t + 1) & 1]),
        values(scratch.values),
        queries(scratch.queries),
        w(scratch.w) {}
};

constexpr int kPrepareThreads = 256;

// The first iteration's K~ and w, where L = u = 0, and packed copies of v and q.
template <class E, int D>
MOLEX_KERNEL(kPrepareThreads, 1)
void rpc_forward_prepare(MOLEX_PARAMS ForwardLaunch<E> s) {
  const Forward& f = s.f;
  const Problem& p = f.problem;
  const Place<D, kPrepareThreads> at(p);
  const int left = exists(p, at.head, at.row) ? p.width - at.column : 0;
  const auto load = [&](const Tensor4& t) {
    const E* from = head_of<E>(p, t, at.head);
    return load_octet(from + at.row * t.row + at.column, whole_octets(from, t.row, p.width), left);
  };
  *reinterpret_cast<Octet<E>*>(s.values + at.offset) = load(p.v);
  if (p.q.data) *reinterpret_cast<Octet<E>*>(s.queries + at.offset) = load(p.q);
  const Octet<E> k = load(p.k);
  const float bound = bound_of(p, at.head, at.row);
  float sparse[kOctet], keys[kOctet], w[kOctet];
  MOLEX_UNROLL for (int i = 0; i < kOctet; ++i) {
    const Split split = soft_threshold(device::to_float(k.x[i]), 0.0f, 0.0f, bound);
    sparse[i] = split.sparse;
    keys[i] = split.key;
    w[i] = split.w;
  }
  store_octet(s.next_keys + at.offset, keys);
  if (p.iterations > 1) {
    store_octet(s.w + at.offset, w);
  } else if (f.sparse && at.row < p.length) {
    float* to = f.sparse + (at.head * p.length + at.row) * p.width + at.column;
    MOLEX_UNROLL for (int i = 0; i < kOctet; ++i) {
      if (at.column + i < p.width) to[i] = sparse[i];
    }
  }
}

template <class E, int D>
struct ForwardTile {
  static constexpr bool kSmall = sizeof(E) == 2 && D <= 64;
  static constexpr int kWarps = 4;
  static constexpr int kTiles = kSmall ? 2 : 1;  // of 16 rows per warp
  static constexpr int kRows = 16 * kTiles * kWarps;
  static constexpr int kColumns = sizeof(E) == 2 ? 64 : 32;
  static constexpr int kStages = 2;
  static constexpr int kSharedBytes = (kRows + 2 * kStages * kColumns) * kPitch<D> * sizeof(E);
  static_assert(kRowsMultiple % kRows == 0 && kRowsMultiple % kColumns == 0);
};

template <class E, int D>
MOLEX_KERNEL((ForwardTile<E, D>::kWarps * kWarp), 1)
void rpc_forward_iteration(MOLEX_PARAMS ForwardLaunch<E> s) {
  using T = ForwardTile<E, D>;
  constexpr int kPitchD = kPitch<D>;
  const Forward& f = s.f;
  const Problem& p = f.problem;
  const int tiles = (p.length + T::kRows - 1) / T::kRows;
  const int64_t head = device::block() / tiles;
  // Under a causal mask the last rows have the most work, so they start first.
  const int tile = tiles - 1 - static_cast<int>(device::block() % tiles);
  const int first = tile * T::kRows, row = first + 16 * T::kTiles * warp();
  const int64_t base = head * padded_rows(p) * D;
  const E* all_keys = s.keys + base;
  const E* all_values = s.values + base;
  const Results<E> results{f, head, s.iteration};

  E* rows = reinterpret_cast<E*>(device::shared());
  E* stages = rows + T::kRows * kPitchD;  // keys and values of one tile, then of the next
  const auto fetch = [&](int key) {
    E* stage = stages + key / T::kColumns % T::kStages * 2 * T::kColumns * kPitchD;
    copy_rows<E, D, T::kColumns, T::kWarps * kWarp>(stage, all_keys + key * D);
    copy_rows<E, D, T::kColumns, T::kWarps * kWarp>(stage + T::kColumns * kPitchD, all_values + key * D);
  };
  copy_rows<E, D, T::kRows, T::kWarps * kWarp>(rows, (p.q.data ? s.queries + base : all_keys) + first * D);
  fetch(0);
  device::commit_copies();

  const Mask visible(p, head, row);
  const Dropout keeps(p, head, results.last());
  const float scale2 = score_scale(p);
  Attention<E, D, T::kTiles, T::kColumns> attention;
  attention.start();
  HeldRows<E, D, T::kTiles> held;
  E* own_rows = rows + 16 * T::kTiles * warp() * kPitchD;
  const int end = p.causal && first + T::kRows < p.length ? first + T::kRows : p.length;
  for (int key = 0; key < end; key += T::kColumns) {
    if (key + T::kColumns < end) fetch(key + T::kColumns);
    device::commit_copies();
    device::wait_copies<1>();
    device::sync();
    const E* stage = stages + key / T::kColumns % T::kStages * 2 * T::kColumns * kPitchD;
    if (key == 0) held.load(own_rows);
    const E* values = stage + T::kColumns * kPitchD;
    attention.add(held, stage, values, visible, keeps, scale2, row, key, [] {});
    if (key + T::kStages * T::kColumns < end) device::sync();  // a fetch overwrites this stage
  }
  attention.finish();

  const Results<E> next{f, head, s.iteration + 1};
  MOLEX_UNROLL for (int m = 0; m < T::kTiles; ++m) {
    const int tile_row = row + 16 * m;
    E* shared = own_rows + 16 * m * kPitchD;
    float (&c)[D / 8][4] = attention.sum[m];
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      const int mine = tile_row + lane_row() + 8 * i;
      const bool real = exists(p, head, mine);
      results.statistics(mine, real, attention.largest[m][i], attention.total[m][i]);
      if (!real) attention.clear_row(m, i);
    }
    results.template low_rank<D>(tile_row, c, shared);
    if (results.last()) continue;

    // S of the iteration that follows is an output if it is the last, and then nothing reads its w.
    float sparse[D / 8][4];
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      const int mine = tile_row + lane_row() + 8 * i;
      const bool real = exists(p, head, mine);
      const float bound = bound_of(p, head, mine);
      const E* own = head_of<E>(p, p.k, head) + mine * p.k.row + lane_column();
      float* w = s.w + base + static_cast<int64_t>(mine) * D + lane_column();
      MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
        const float2 kept = load_pair(w + 8 * n);
        float2 next_w;
        MOLEX_UNROLL for (int e = 0; e < 2; ++e) {
          const bool inside = real && 8 * n + e < p.width - lane_column();
          const float k = inside ? device::to_float(own[8 * n + e]) : 0.0f;
          float& low_rank = c[n][2 * i + e];
          const Split split = soft_threshold(k, low_rank, (e ? kept.y : kept.x) - low_rank, bound);
          low_rank = split.key;
          sparse[n][2 * i + e] = split.sparse;
          (e ? next_w.y : next_w.x) = split.w;
        }
        if (!next.last()) store_pair(w + 8 * n, next_w.x, next_w.y);
      }
    }
    next.template sparse<D>(tile_row, sparse, shared);
    store_rows<E, D>(s.next_keys + base + tile_row * D, D, c, shared, 16, D);
  }
}

}  // namespace molex::rpc
