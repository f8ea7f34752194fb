// RPC attention forward: all iterations on chip, or one launch per iteration.
//
// Budget. on_chip: 256 threads, at most 255 registers (D = 128, fp32) or 128 (D <= 64 in 16 bits, so
// that two blocks share a multiprocessor); shared memory (2 P + 16 W (1 + q)) (D + 8) bytes(E) for P
// padded rows and W warps, up to the device's limit. step: 128 threads, at most 255 registers;
// shared memory (rows + 4 columns) (D + 8) bytes(E), at most 104,448 bytes. No spills.

#pragma once

#include "rpc_equations.cuh"

namespace molex::rpc {

// softmax(rows keys^T) values of 16 M rows per warp, summed over tiles of keys.
template <class E, int D, int M, int Columns>
struct Attention {
  float sum[M][D / 8][4];
  float largest[M][2], total[M][2];  // of scores, and of this lane's exp(score - largest)

  MOLEX_DEVICE void start() {
    clear(sum);
    MOLEX_UNROLL for (int m = 0; m < M; ++m) {
      MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
        largest[m][i] = -device::infinity();
        total[m][i] = 0.0f;
      }
    }
  }

  // `rows` is the warp's part of a tile in shared memory, `row` and `key` are the first indices.
  MOLEX_DEVICE void add(const E* rows,
                        const E* keys,
                        const E* values,
                        const Sight& sees,
                        const Dropout& keeps,
                        float scale2,
                        int row,
                        int key) {
    float z[M][Columns / 8][4];
    clear(z);
    multiply_rows<E, D>(z, rows, keys);
    if (!sees.all(row, key, Columns)) {
      MOLEX_UNROLL for (int m = 0; m < M; ++m) {
        MOLEX_UNROLL for (int n = 0; n < Columns / 8; ++n) {
          MOLEX_UNROLL for (int e = 0; e < 4; ++e) {
            const int i = row + 16 * m + lane_row() + e / 2 * 8, j = key + 8 * n + lane_column() + e % 2;
            if (!sees(i, j)) z[m][n][e] = -device::infinity();
          }
        }
      }
    }
    MOLEX_UNROLL for (int m = 0; m < M; ++m) {
      MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
        float top = largest[m][i];
        MOLEX_UNROLL for (int n = 0; n < Columns / 8; ++n) {
          top = larger(z[m][n][2 * i], larger(z[m][n][2 * i + 1], top));
        }
        top = row_max(top);
        // A row that has seen nothing yet: exp(-inf - 0) = 0.
        const float origin = top == -device::infinity() ? 0.0f : top;
        const float shrunk = device::exp2((largest[m][i] - origin) * scale2);
        largest[m][i] = top;
        float part = total[m][i] * shrunk;
        MOLEX_UNROLL for (int n = 0; n < Columns / 8; ++n) {
          MOLEX_UNROLL for (int e = 2 * i; e < 2 * i + 2; ++e) {
            z[m][n][e] = device::exp2((z[m][n][e] - origin) * scale2);
            part += z[m][n][e];
          }
        }
        total[m][i] = part;
        MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
          sum[m][n][2 * i] *= shrunk;
          sum[m][n][2 * i + 1] *= shrunk;
        }
      }
    }
    if (keeps.active) {
      MOLEX_UNROLL for (int m = 0; m < M; ++m) {
        MOLEX_UNROLL for (int n = 0; n < Columns / 8; ++n) {
          MOLEX_UNROLL for (int e = 0; e < 4; ++e) {
            z[m][n][e] *= keeps(row + 16 * m + lane_row() + e / 2 * 8, key + 8 * n + lane_column() + e % 2);
          }
        }
      }
    }
    multiply_columns<E>(sum, z, values);
  }

  // Makes `sum` the average of the values, and `total` the log of the sum of exp(score * scale).
  MOLEX_DEVICE void finish(float scale) {
    MOLEX_UNROLL for (int m = 0; m < M; ++m) {
      MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
        const float all = row_sum(total[m][i]);
        const float inverse = 1.0f / all;
        MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
          sum[m][n][2 * i] *= inverse;
          sum[m][n][2 * i + 1] *= inverse;
        }
        total[m][i] = largest[m][i] * scale + device::log(all);
      }
    }
  }
};

// Writes what an iteration leaves behind for a row: L_t, its log-sum-exp, or the result.
template <class E>
struct Results {
  const Forward& f;
  int64_t head;
  int iteration;

  MOLEX_DEVICE bool last() const { return iteration + 1 == f.problem.iterations; }
  MOLEX_DEVICE int64_t offset(int row) const { return (head * f.problem.length + row) * f.problem.width; }

  MOLEX_DEVICE void low(int row, int column, float value) const {
    const Problem& p = f.problem;
    if (row >= p.length || column >= p.width) return;
    if (last()) {
      static_cast<E*>(f.out)[offset(row) + column] = device::from_float<E>(value);
    } else if (f.lows) {
      f.lows[iteration * p.all_heads() * p.length * p.width + offset(row) + column] = value;
    }
  }

  MOLEX_DEVICE void log_sum(int row, float value) const {
    const Problem& p = f.problem;
    if (f.lse && row < p.length) f.lse[(iteration * p.all_heads() + head) * p.length + row] = value;
  }

  MOLEX_DEVICE void sparse(int row, int column, float value) const {
    const Problem& p = f.problem;
    if (last() && f.sparse && row < p.length && column < p.width) f.sparse[offset(row) + column] = value;
  }
};

// ---- All iterations on chip: a cluster of blocks per head ----

constexpr int kOnChipWarps = 8;

template <class E, int D>
struct OnChip {
  static constexpr int kColumns = sizeof(E) == 2 && D <= 64 ? 64 : 32;
  static constexpr int kBlocks = sizeof(E) == 2 && D <= 64 ? 2 : 1;

  int warps, cluster, rows, shared_bytes;
  bool fits;

  explicit OnChip(const Problem& p) {
    const int tiles = (p.length + 15) / 16;
    cluster = 1;
    while (cluster * kOnChipWarps < tiles) cluster *= 2;
    warps = (tiles + cluster - 1) / cluster;
    const int own = cluster * warps * 16;
    rows = own > p.length ? own : p.length;
    rows = (rows + kColumns - 1) / kColumns * kColumns;
    const int64_t bytes = (2ll * rows + (p.q.data ? 2 : 1) * warps * 16) * kPitch<D> * sizeof(E);
    fits = cluster <= p.cluster_limit && bytes <= p.shared_limit;
    shared_bytes = static_cast<int>(fits ? bytes : 0);
  }
};

// K~ of this warp's 16 rows, to the keys of every block of the cluster.
template <class E, int D>
MOLEX_DEVICE void publish(E* keys, const float (&clean)[1][D / 8][4], int row, int rank, int cluster) {
  MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      store_pair(keys + (row + lane_row() + 8 * i) * kPitch<D> + 8 * n + lane_column(),
                 clean[0][n][2 * i],
                 clean[0][n][2 * i + 1]);
    }
  }
  if (cluster == 1) return;
  device::sync_warp();
  constexpr int kChunk = 16 / sizeof(E), kChunks = D / kChunk;
  for (int i = lane(); i < 16 * kChunks; i += kWarp) {
    E* mine = keys + (row + i / kChunks) * kPitch<D> + i % kChunks * kChunk;
    const uint4 value = *reinterpret_cast<const uint4*>(mine);
    for (int other = 1; other < cluster; ++other) device::store_remote(mine, (rank + other) % cluster, value);
  }
}

template <class E, int D>
struct OnChipForward {
  Forward f;
  OnChip<E, D> plan;
};

template <class E, int D>
MOLEX_KERNEL(kOnChipWarps* kWarp, (OnChip<E, D>::kBlocks))
void on_chip(MOLEX_PARAMS OnChipForward<E, D> s) {
  constexpr int kColumns = OnChip<E, D>::kColumns;
  const Forward& f = s.f;
  const Problem& p = f.problem;
  const OnChip<E, D>& plan = s.plan;
  const int rank = static_cast<int>(device::block() % plan.cluster);
  const int64_t head = device::block() / plan.cluster;
  const int first = rank * plan.warps * 16, row = first + 16 * warp();

  E* keys = reinterpret_cast<E*>(device::shared());
  E* values = keys + plan.rows * kPitch<D>;
  E* own = values + plan.rows * kPitch<D>;
  E* queries = own + plan.warps * 16 * kPitch<D>;
  load_rows<E, D>(values, p, p.v, head, 0, plan.rows);
  load_rows<E, D>(own, p, p.k, head, first, plan.warps * 16);
  if (p.q.data) load_rows<E, D>(queries, p, p.q, head, first, plan.warps * 16);
  // Rows behind the last block's are keys that nobody sees, and yet they are multiplied.
  const int published = plan.cluster * plan.warps * 16;
  for (int i = device::thread(); i < (plan.rows - published) * D; i += device::threads()) {
    keys[(published + i / D) * kPitch<D> + i % D] = device::from_float<E>(0.0f);
  }
  device::sync();

  const Sight sees(p, head);
  const float scale2 = p.scale * kLog2e;
  float w[D / 8][4];
  Attention<E, D, 1, kColumns> attention;
  float bound[2];
  bool real[2];
  MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
    const int mine = row + lane_row() + 8 * i;
    bound[i] = bound_of(p, head, mine);
    real[i] = exists(p, head, mine);
  }
  const E* own_lane = own + (16 * warp() + lane_row()) * kPitch<D> + lane_column();

  for (int t = 0; t < p.iterations; ++t) {
    // From L and w of the iteration before, K~ in the place of L, and the new w.
    const Results<E> results{f, head, t};
    MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
      MOLEX_UNROLL for (int e = 0; e < 4; ++e) {
        const float k = device::to_float(own_lane[e / 2 * 8 * kPitch<D> + 8 * n + e % 2]);
        const float low = t ? attention.sum[0][n][e] : 0.0f, u = t ? w[n][e] - low : 0.0f;
        const Step step = shrink(k, low, u, bound[e / 2]);
        results.sparse(row + lane_row() + e / 2 * 8, 8 * n + lane_column() + e % 2, step.sparse);
        attention.sum[0][n][e] = step.clean;
        w[n][e] = step.w;
      }
    }
    if (t) device::wait_cluster();  // until every block has read the keys of the iteration before
    publish<E, D>(keys, attention.sum, row, rank, plan.cluster);
    device::arrive_cluster();
    device::wait_cluster();

    attention.start();
    const Dropout keeps(p, head, results.last());
    const E* rows = p.q.data ? queries + 16 * warp() * kPitch<D> : keys + row * kPitch<D>;
    const int end = p.causal && row + 16 < p.length ? row + 16 : p.length;
    for (int key = 0; key < end; key += kColumns) {
      const int at = key * kPitch<D>;
      attention.add(rows, keys + at, values + at, sees, keeps, scale2, row, key);
    }
    if (!results.last()) device::arrive_cluster();
    attention.finish(p.scale);

    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      const int mine = row + lane_row() + 8 * i;
      if (lane_column() == 0) results.log_sum(mine, real[i] ? attention.total[0][i] : device::infinity());
      MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
        MOLEX_UNROLL for (int e = 2 * i; e < 2 * i + 2; ++e) {
          if (!real[i]) attention.sum[0][n][e] = 0.0f;
          results.low(mine, 8 * n + lane_column() + e % 2, attention.sum[0][n][e]);
        }
      }
    }
  }
}

// ---- One launch per iteration ----

// Packed copies, and w between the launches. K~ alternates: blocks still read the old while others
// write the new.
template <class E>
struct ForwardScratch {
  E *clean[2], *values, *queries;
  float* w;
  int64_t bytes;

  ForwardScratch(const Problem& p, void* base, int columns) {
    const int64_t count = p.all_heads() * padded_rows(p) * columns;
    Arena arena{static_cast<char*>(base)};
    clean[0] = arena.take<E>(count);
    clean[1] = arena.take<E>(p.iterations > 1 ? count : 0);
    values = arena.take<E>(count);
    queries = arena.take<E>(p.q.data ? count : 0);
    w = arena.take<float>(p.iterations > 1 ? count : 0);
    bytes = arena.used;
  }
};

// One launch: `iteration` counts from 0; the preparation is before it.
template <class E>
struct ForwardStep {
  Forward f;
  int32_t iteration;
  const E* clean;
  E *next_clean, *values, *queries;
  float* w;

  ForwardStep(const Forward& forward, const ForwardScratch<E>& scratch, int t)
      : f(forward),
        iteration(t),
        clean(scratch.clean[t & 1]),
        next_clean(scratch.clean[(t + 1) & 1]),
        values(scratch.values),
        queries(scratch.queries),
        w(scratch.w) {}
};

constexpr int kPrepareThreads = 256;

// The first iteration's K~ and w, where L = u = 0, and packed copies of v and q.
template <class E, int D>
MOLEX_KERNEL(kPrepareThreads, 1)
void prepare(MOLEX_PARAMS ForwardStep<E> s) {
  const Forward& f = s.f;
  const Problem& p = f.problem;
  const int64_t index = device::block() * kPrepareThreads + device::thread();
  const int64_t rows = padded_rows(p);
  if (index >= p.all_heads() * rows * D) return;
  const int64_t head = index / D / rows;
  const int row = static_cast<int>(index / D % rows), column = static_cast<int>(index % D);
  const bool real = column < p.width && exists(p, head, row);
  const E zero = device::from_float<E>(0.0f);
  const E k = real ? head_of<E>(p, p.k, head)[row * p.k.row + column] : zero;
  const Step step = shrink(device::to_float(k), 0.0f, 0.0f, bound_of(p, head, row));
  s.next_clean[index] = device::from_float<E>(step.clean);
  s.values[index] = real ? head_of<E>(p, p.v, head)[row * p.v.row + column] : zero;
  if (p.q.data) s.queries[index] = real ? head_of<E>(p, p.q, head)[row * p.q.row + column] : zero;
  if (p.iterations > 1) s.w[index] = step.w;
  Results<E>{f, head, 0}.sparse(row, column, step.sparse);
}

template <class E, int D>
struct StepTile {
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
MOLEX_KERNEL((StepTile<E, D>::kWarps * kWarp), 1)
void step(MOLEX_PARAMS ForwardStep<E> s) {
  using T = StepTile<E, D>;
  constexpr int kPitchD = kPitch<D>;
  const Forward& f = s.f;
  const Problem& p = f.problem;
  const int tiles = (p.length + T::kRows - 1) / T::kRows;
  const int64_t head = device::block() / tiles;
  // Under a causal mask the last rows have most to do, so they start first.
  const int tile = tiles - 1 - static_cast<int>(device::block() % tiles);
  const int first = tile * T::kRows, row = first + 16 * T::kTiles * warp();
  const int64_t base = head * padded_rows(p) * D;
  const E* all_keys = s.clean + base;
  const E* all_values = s.values + base;
  const Results<E> results{f, head, s.iteration};

  E* rows = reinterpret_cast<E*>(device::shared());
  E* stages = rows + T::kRows * kPitchD;  // keys and values of one tile, then of the next
  const auto fetch = [&](int key) {
    E* stage = stages + key / T::kColumns % T::kStages * 2 * T::kColumns * kPitchD;
    copy_rows<E, D>(stage, all_keys + key * D, T::kColumns);
    copy_rows<E, D>(stage + T::kColumns * kPitchD, all_values + key * D, T::kColumns);
  };
  copy_rows<E, D>(rows, (p.q.data ? s.queries + base : all_keys) + first * D, T::kRows);
  fetch(0);
  device::commit_copies();

  const Sight sees(p, head);
  const Dropout keeps(p, head, results.last());
  const float scale2 = p.scale * kLog2e;
  Attention<E, D, T::kTiles, T::kColumns> attention;
  attention.start();
  const int end = p.causal && first + T::kRows < p.length ? first + T::kRows : p.length;
  for (int key = 0; key < end; key += T::kColumns) {
    if (key + T::kColumns < end) fetch(key + T::kColumns);
    device::commit_copies();
    device::wait_copies<1>();
    device::sync();
    const E* stage = stages + key / T::kColumns % T::kStages * 2 * T::kColumns * kPitchD;
    attention.add(rows + 16 * T::kTiles * warp() * kPitchD,
                  stage,
                  stage + T::kColumns * kPitchD,
                  sees,
                  keeps,
                  scale2,
                  row,
                  key);
    device::sync();  // the next fetch overwrites this stage
  }
  attention.finish(p.scale);

  const Results<E> next{f, head, s.iteration + 1};
  E* clean = s.next_clean + base;
  const E* k = head_of<E>(p, p.k, head);
  MOLEX_UNROLL for (int m = 0; m < T::kTiles; ++m) {
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      const int mine = row + 16 * m + lane_row() + 8 * i;
      const bool real = exists(p, head, mine);
      const float bound = bound_of(p, head, mine);
      if (lane_column() == 0) results.log_sum(mine, real ? attention.total[m][i] : device::infinity());
      MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
        const int column = 8 * n + lane_column();
        const int64_t place = static_cast<int64_t>(mine) * D + column;
        float cleaned[2];
        MOLEX_UNROLL for (int c = 0; c < 2; ++c) {
          const float low = real ? attention.sum[m][n][2 * i + c] : 0.0f;
          results.low(mine, column + c, low);
          if (results.last()) continue;
          const bool inside = real && column + c < p.width;
          const float own = inside ? device::to_float(k[mine * p.k.row + column + c]) : 0.0f;
          const float u = s.w[base + place + c] - low;
          const Step step = shrink(own, low, u, bound);
          next.sparse(mine, column + c, step.sparse);
          cleaned[c] = step.clean;
          s.w[base + place + c] = step.w;
        }
        if (!results.last()) store_pair(clean + place, cleaned[0], cleaned[1]);
      }
    }
  }
}

}  // namespace molex::rpc
