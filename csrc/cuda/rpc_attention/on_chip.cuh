// RPC attention forward with all iterations on chip: of global memory k, v and q are read, the results
// written.
//
// Budget, without spills: in 16 bits 256 threads of 128 registers (D <= 32), or 128 threads of 168 (D = 64),
// so that three blocks share an H100's multiprocessor at N = 197; `Alone` 512 of 128; otherwise 256 of 255.
// Shared memory (2 P + 16 W (1 or, with q, 2)) (D + 8) bytes(E) for P padded rows and W warps, up to the
// device's limit.

#pragma once

#include "cuda/rpc_attention/attention.cuh"
#include "cuda/rpc_attention/equations.cuh"

namespace molex::rpc {

// How a head's iterations run on chip: by a cluster of blocks, or, where there are no clusters, by one large
// block `Alone`.
template <class E, int D, bool Alone = false>
struct OnChip {
  static constexpr int kColumns = sizeof(E) == 4 && D > 64 ? 16 : 32;
  static constexpr int kWarps = Alone ? 16 : (sizeof(E) == 2 && D == 64 ? 4 : 8);
  // So many blocks are to share a multiprocessor, which bounds the registers.
  static constexpr int kBlocks = Alone || sizeof(E) == 4 || D > 64 ? 1 : (D == 64 ? 3 : 2);

  int warps, cluster, rows, shared_bytes;  // `rows` of keys and values, whole tiles
  bool fits;

  explicit OnChip(const Problem& p) {
    const int tiles = (p.length + 15) / 16;
    cluster = (tiles + kWarps - 1) / kWarps;
    warps = (tiles + cluster - 1) / cluster;
    rows = (p.length + kColumns - 1) / kColumns * kColumns;
    const int64_t bytes = (2ll * rows + (p.q.data ? 2 : 1) * warps * 16) * kPitch<D> * sizeof(E);
    fits = cluster <= (Alone ? 1 : p.cluster_limit) && bytes <= p.shared_limit;
    shared_bytes = static_cast<int>(fits ? bytes : 0);
  }

  device::Grid grid(const Problem& p) const {
    return {p.all_heads() * cluster, warps * kWarp, shared_bytes, cluster};
  }
};

template <class E, int D>
constexpr bool kRunsAlone = sizeof(E) == 2 && D <= 32;  // what the registers of 16 warps hold

// Sends K~ of this warp's 16 rows to the keys of every block of the cluster.
template <class E, int D>
MOLEX_DEVICE void publish(E* keys, const float (&own)[1][D / 8][4], int row, int rank, int cluster) {
  E* mine = keys + row * kPitch<D>;
  MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      store_pair(mine + (lane_row() + 8 * i) * kPitch<D> + 8 * n + lane_column(),
                 own[0][n][2 * i],
                 own[0][n][2 * i + 1]);
    }
  }
  if (cluster == 1) return;
  device::sync_warp();
  constexpr int kChunks = D / kChunk<E>, kStep = kWarp / kChunks;
  mine += lane() / kChunks * kPitch<D> + lane() % kChunks * kChunk<E>;
  int peer = rank;
  MOLEX_NO_UNROLL for (int other = 1; other < cluster; ++other) {
    peer = peer + 1 == cluster ? 0 : peer + 1;
    const device::Remote to = device::remote(mine, peer);
    MOLEX_UNROLL for (int i = 0; i < 16 / kStep; ++i) {
      const int at = i * kStep * kPitch<D>;
      device::store_remote(to, at * static_cast<int>(sizeof(E)), *reinterpret_cast<const uint4*>(mine + at));
    }
  }
}

// Replaces L and w of an iteration, this lane's of the rows `upper` and `upper` + 8, by K~ and w of the next
// one. `own_rows` are this warp's rows of k in shared memory.
template <class E, int D>
MOLEX_DEVICE void split_rows(const Problem& p,
                             int64_t head,
                             int upper,
                             const E* own_rows,
                             float (&sum)[D / 8][4],
                             float (&w)[D / 8][4],
                             bool last) {
  const E* own_lane = own_rows + lane_row() * kPitch<D> + lane_column();
  MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
    const float bound = bound_of(p, head, upper + 8 * i);
    MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
      const float2 k = load_pair(own_lane + 8 * i * kPitch<D> + 8 * n);
      MOLEX_UNROLL for (int c = 0; c < 2; ++c) {
        float &low_rank = sum[n][2 * i + c], &kept = w[n][2 * i + c];
        const Split split = soft_threshold(c ? k.y : k.x, low_rank, kept - low_rank, bound);
        low_rank = split.key;
        kept = last ? split.sparse : split.w;  // nothing comes after the last w
      }
    }
  }
}

// Writes what an iteration leaves of this warp's rows, from `first_row` on.
template <class E, int D, int Columns>
MOLEX_DEVICE void write_rows(const Results<E>& results,
                             int first_row,
                             Attention<E, D, 1, Columns>& attention,
                             const float (&w)[D / 8][4],
                             E* own_rows) {
  const Problem& p = results.f.problem;
  const int upper = first_row + lane_row();
  const bool whole = !p.key_mask && first_row + 16 <= p.length;
  MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
    const bool real = whole || exists(p, results.head, upper + 8 * i);
    results.statistics(upper + 8 * i, real, attention.largest[0][i], attention.total[0][i]);
    if (!whole && !real) attention.clear_row(0, i);
  }
  results.template low_rank<D>(first_row, attention.sum[0], own_rows);
  results.template sparse<D>(first_row, w, own_rows);
}

template <class E, int D, bool Alone>
struct OnChipForward {
  Forward f;
  OnChip<E, D, Alone> plan;
};

template <class E, int D, bool Alone>
MOLEX_KERNEL((OnChip<E, D, Alone>::kWarps * kWarp), (OnChip<E, D, Alone>::kBlocks))
void rpc_forward_on_chip(MOLEX_PARAMS OnChipForward<E, D, Alone> s) {
  using Plan = OnChip<E, D, Alone>;
  constexpr int kColumns = Plan::kColumns;
  const Forward& f = s.f;
  const Problem& p = f.problem;
  const Plan& plan = s.plan;
  const int64_t head = device::block() / plan.cluster;
  const int rank = device::block() - static_cast<int>(head) * plan.cluster;
  const int first = rank * plan.warps * 16, row = first + 16 * warp();

  E* keys = reinterpret_cast<E*>(device::shared());
  E* values = keys + plan.rows * kPitch<D>;
  E* own = values + plan.rows * kPitch<D>;
  E* queries = own + plan.warps * 16 * kPitch<D>;
  load_rows<E, D>(own, p, p.k, head, first, plan.warps * 16);
  if (p.q.data) load_rows<E, D>(queries, p, p.q, head, first, plan.warps * 16);
  device::commit_copies();
  load_rows<E, D>(values, p, p.v, head, 0, plan.rows);
  device::commit_copies();
  // Rows behind the last warp's are keys that no row attends to, but they are multiplied.
  const int published = (p.length + 15) / 16 * 16;
  for (int i = device::thread(); i < (plan.rows - published) * D; i += device::threads()) {
    keys[(published + i / D) * kPitch<D> + i % D] = device::from_float<E>(0.0f);
  }
  device::wait_copies<1>();
  device::sync();
  device::arrive_cluster_relaxed();

  if (row >= p.length) {  // this warp has no rows, and only takes part in the barriers of the others
    device::wait_copies<0>();
    for (int t = 0; t < p.iterations; ++t) {
      device::wait_cluster();
      device::arrive_cluster();
      device::wait_cluster();
      if (t == 0) device::sync_branches();
      if (t + 1 < p.iterations) device::arrive_cluster();
    }
    return;
  }
  float w[D / 8][4];
  Attention<E, D, 1, kColumns> attention;
  attention.start();
  MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) { MOLEX_UNROLL for (int e = 0; e < 4; ++e) w[n][e] = 0.0f; }
  HeldRows<E, D, 1> held;
  bool waits = true;  // for the values
  const auto values_arrive = [&] {
    if (!waits) return;
    device::wait_copies<0>();
    device::sync_branches();
    waits = false;
  };
  MOLEX_NO_UNROLL for (int t = 0; t < p.iterations; ++t) {
    // Replaces L and w of the iteration before by K~ and the new w.
    const Results<E> results{f, device::opaque(head), t};
    const int first_row = device::opaque(row), upper = first_row + lane_row();
    E* own_rows = own + (first_row - first) * kPitch<D>;
    split_rows<E, D>(p, head, upper, own_rows, attention.sum[0], w, results.last());
    device::wait_cluster();  // until every block has started, and read the keys of the iteration before
    publish<E, D>(keys, attention.sum, first_row, rank, plan.cluster);
    device::arrive_cluster();
    device::wait_cluster();

    held.load(p.q.data ? queries + (first_row - first) * kPitch<D> : keys + first_row * kPitch<D>);
    attention.start();
    const Mask visible(p, head, first_row);
    const Dropout keeps(p, head, results.last());
    const float scale2 = score_scale(p);
    const int end = p.causal && first_row + 16 < p.length ? first_row + 16 : p.length;
    MOLEX_NO_UNROLL for (int key = 0; key < end; key += kColumns) {
      const int at = key * kPitch<D>;
      attention.add(held, keys + at, values + at, visible, keeps, scale2, first_row, key, values_arrive);
    }
    if (!results.last()) device::arrive_cluster();
    attention.finish();

    write_rows<E, D>(results, first_row, attention, w, own_rows);
  }
}

}  // namespace molex::rpc
