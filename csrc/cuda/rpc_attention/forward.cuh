// RPC attention forward: all iterations on chip, or one launch per iteration.
//
// Budget, without spills. on_chip: in 16 bits 256 threads of 128 registers (D <= 32), or 128 threads of 168
// (D = 64), so that two or three blocks share a multiprocessor; otherwise 256 threads of 255. Shared memory
// (2 P + 16 W (1 or, with q, 2)) (D + 8) bytes(E) for P padded rows and W warps, up to the device's limit.
// step: 128 threads of 255 registers; shared memory (rows + 4 columns) (D + 8) bytes(E), at most 104,448
// bytes (fp32, D = 128), so that it runs on sm_80. prepare: 256 threads of 40 registers.

#pragma once

#include "cuda/rpc_attention/equations.cuh"

namespace molex::rpc {

// softmax(rows keys^T) values of 16 M rows per warp, summed over tiles of keys.
template <class E, int D, int M, int Columns>
struct Attention {
  // In a long sum of like terms, such as those of flat attention, all roundings go the same way.
  static constexpr bool kCompensated = sizeof(E) == 4;

  float sum[M][D / 8][4];
  float largest[M][2], total[M][2];  // largest score; sum of this lane's exp(score - largest)
  float lost[M][2];                  // what roundings took from `total`, if compensated

  MOLEX_DEVICE void start() {
    clear(sum);
    MOLEX_UNROLL for (int m = 0; m < M; ++m) {
      MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
        largest[m][i] = -device::infinity();
        total[m][i] = lost[m][i] = 0.0f;
      }
    }
  }

  // `rows` is the warp's part of a tile in shared memory, `row` and `key` are the first indices.
  MOLEX_DEVICE void add(const E* rows,
                        const E* keys,
                        const E* values,
                        const Mask& visible,
                        const Dropout& keeps,
                        float scale2,
                        int row,
                        int key) {
    float z[M][Columns / 8][4];
    clear(z);
    multiply_rows<E, D, sizeof(E) == 4 ? 16 : D, true>(z, rows, keys);
    if (scale2 < 0.0f) {  // then the largest score is the smallest product
      scale2 = -scale2;
      MOLEX_UNROLL for (int m = 0; m < M; ++m) {
        MOLEX_UNROLL for (int n = 0; n < Columns / 8; ++n) {
          MOLEX_UNROLL for (int e = 0; e < 4; ++e) z[m][n][e] = -z[m][n][e];
        }
      }
    }
    if (!visible.all(row, key, Columns)) {
      MOLEX_UNROLL for (int n = 0; n < Columns / 8; ++n) {
        MOLEX_UNROLL for (int c = 0; c < 2; ++c) {
          const int j = key + 8 * n + lane_column() + c;
          const bool exists = visible.exists(j);
          MOLEX_UNROLL for (int m = 0; m < M; ++m) {
            MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
              const bool masked = !exists || visible.later(row + 16 * m + lane_row() + 8 * i, j);
              if (masked) z[m][n][2 * i + c] = -device::infinity();
            }
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
        // For a row that has met no key yet: exp(-inf - 0) = 0.
        const float origin = top == -device::infinity() ? 0.0f : top;
        const float rescale = device::exp2((largest[m][i] - origin) * scale2);
        largest[m][i] = top;
        const float before = total[m][i] * rescale;
        float part = kCompensated ? lost[m][i] * rescale : before;
        MOLEX_UNROLL for (int n = 0; n < Columns / 8; ++n) {
          MOLEX_UNROLL for (int e = 2 * i; e < 2 * i + 2; ++e) {
            z[m][n][e] = device::exp2((z[m][n][e] - origin) * scale2);
            part += z[m][n][e];
          }
        }
        total[m][i] = kCompensated ? before + part : part;
        if (kCompensated) lost[m][i] = part - (total[m][i] - before);
        MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
          sum[m][n][2 * i] *= rescale;
          sum[m][n][2 * i + 1] *= rescale;
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

  MOLEX_DEVICE void clear_row(int m, int i) {
    MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) sum[m][n][2 * i] = sum[m][n][2 * i + 1] = 0.0f;
  }

  // Makes `sum` the average of the values, and `total` the row's.
  MOLEX_DEVICE void finish() {
    MOLEX_UNROLL for (int m = 0; m < M; ++m) {
      MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
        total[m][i] = row_sum(total[m][i]);
        if (kCompensated) total[m][i] += row_sum(lost[m][i]);
        const float inverse = 1.0f / total[m][i];
        MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
          sum[m][n][2 * i] *= inverse;
          sum[m][n][2 * i + 1] *= inverse;
        }
      }
    }
  }
};

// Writes what an iteration leaves behind for a row: L_t, the softmax's statistics, or the result.
template <class E>
struct Results {
  const Forward& f;
  int64_t head;
  int iteration;

  MOLEX_DEVICE bool last() const { return iteration + 1 == f.problem.iterations; }
  // This lane's part of a row of a tensor [B, H, N, d]; `value` gives it by tile and column of the pair.
  template <int D, class T, class Value>
  MOLEX_DEVICE void store(T* tensor, int row, const Value& value) const {
    const Problem& p = f.problem;
    if (row >= p.length) return;
    const int first = lane_column();
    T* at = tensor + (head * p.length + row) * p.width + first;
    MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
      MOLEX_UNROLL for (int c = 0; c < 2; ++c) {
        if (8 * n + c < p.width - first) at[8 * n + c] = device::from_float<T>(value(n, c));
      }
    }
  }

  template <int D, class Value>
  MOLEX_DEVICE void low_rank(int row, const Value& value) const {
    const Problem& p = f.problem;
    if (last()) {
      store<D>(static_cast<E*>(f.out), row, value);
    } else if (f.low_ranks) {
      store<D>(f.low_ranks + iteration * p.all_heads() * p.length * p.width, row, value);
    }
  }

  // A row without keys gets an infinite sum, so that its probabilities are 0.
  MOLEX_DEVICE void statistics(int row, bool real, float largest, float total) const {
    const Problem& p = f.problem;
    if (!f.stats || row >= p.length || lane_column() != 0) return;
    const int64_t rows = p.all_heads() * p.length;
    float* at = f.stats + 2 * iteration * rows + head * p.length + row;
    at[0] = !real ? 0.0f : (p.scale < 0.0f ? -largest : largest);
    at[rows] = real ? total : device::infinity();
  }

  template <int D, class Value>
  MOLEX_DEVICE void sparse(int row, const Value& value) const {
    if (last() && f.sparse) store<D>(f.sparse, row, value);
  }
};

template <class E, int D>
struct OnChip {
  static constexpr int kColumns = sizeof(E) == 4 && D > 64 ? 16 : 32;
  static constexpr int kWarps = sizeof(E) == 2 && D == 64 ? 4 : 8;
  // So many blocks are to share a multiprocessor, which bounds the registers.
  static constexpr int kBlocks = sizeof(E) == 2 && D <= 64 ? (D == 64 ? 3 : 2) : 1;

  int warps, cluster, rows, shared_bytes;
  bool fits;

  explicit OnChip(const Problem& p) {
    const int tiles = (p.length + 15) / 16;
    cluster = 1;
    while (cluster * kWarps < tiles) cluster *= 2;
    warps = (tiles + cluster - 1) / cluster;
    const int own = cluster * warps * 16;
    rows = own > p.length ? own : p.length;
    rows = (rows + kColumns - 1) / kColumns * kColumns;
    const int64_t bytes = (2ll * rows + (p.q.data ? 2 : 1) * warps * 16) * kPitch<D> * sizeof(E);
    fits = cluster <= p.cluster_limit && bytes <= p.shared_limit;
    shared_bytes = static_cast<int>(fits ? bytes : 0);
  }
};

// Sends K~ of this warp's 16 rows to the keys of every block of the cluster.
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
MOLEX_KERNEL((OnChip<E, D>::kWarps * kWarp), (OnChip<E, D>::kBlocks))
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
  // Rows behind those of the last block are keys that no row attends to, but they are multiplied.
  const int published = plan.cluster * plan.warps * 16;
  for (int i = device::thread(); i < (plan.rows - published) * D; i += device::threads()) {
    keys[(published + i / D) * kPitch<D> + i % D] = device::from_float<E>(0.0f);
  }
  device::sync();
  device::arrive_cluster();

  float w[D / 8][4];
  Attention<E, D, 1, kColumns> attention;
  MOLEX_NO_UNROLL for (int t = 0; t < p.iterations; ++t) {
    // Replaces L and w of the iteration before by K~ and the new w.
    const Results<E> results{f, head, t};
    const int upper = device::opaque(row + lane_row());
    const E* own_lane = own + (upper - first) * kPitch<D> + lane_column();
    MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
      MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
        const float2 k = load_pair(own_lane + 8 * i * kPitch<D> + 8 * n);
        MOLEX_UNROLL for (int c = 0; c < 2; ++c) {
          float &low_rank = attention.sum[0][n][2 * i + c], &kept = w[n][2 * i + c];
          const float before = t ? low_rank : 0.0f, u = t ? kept - before : 0.0f;
          const Step step = soft_threshold(c ? k.y : k.x, before, u, bound_of(p, head, upper + 8 * i));
          low_rank = step.clean;
          kept = results.last() ? step.sparse : step.w;  // nothing comes after the last w
        }
      }
    }
    device::wait_cluster();  // until every block has started, and read the keys of the iteration before
    publish<E, D>(keys, attention.sum, row, rank, plan.cluster);
    device::arrive_cluster();
    device::wait_cluster();

    attention.start();
    const Mask visible(p, head);
    const Dropout keeps(p, head, results.last());
    const float scale2 = score_scale(p);
    const E* rows = p.q.data ? queries + 16 * warp() * kPitch<D> : keys + row * kPitch<D>;
    const int end = p.causal && row + 16 < p.length ? row + 16 : p.length;
    MOLEX_NO_UNROLL for (int key = 0; key < end; key += kColumns) {
      const int at = key * kPitch<D>;
      attention.add(rows, keys + at, values + at, visible, keeps, scale2, row, key);
    }
    if (!results.last()) device::arrive_cluster();
    attention.finish();

    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      const int mine = upper + 8 * i;
      const bool real = exists(p, head, mine);
      results.statistics(mine, real, attention.largest[0][i], attention.total[0][i]);
      if (!real) attention.clear_row(0, i);
      results.template low_rank<D>(mine, [&](int n, int c) { return attention.sum[0][n][2 * i + c]; });
      results.template sparse<D>(mine, [&](int n, int c) { return w[n][2 * i + c]; });
    }
  }
}

// Packed copies, and w between the launches. There are two K~: some blocks still read the old one while
// others write the new one.
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

// The parameters of one launch. `iteration` counts from 0; it is -1 for the preparation.
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
  const Step step = soft_threshold(device::to_float(k), 0.0f, 0.0f, bound_of(p, head, row));
  s.next_clean[index] = device::from_float<E>(step.clean);
  s.values[index] = real ? head_of<E>(p, p.v, head)[row * p.v.row + column] : zero;
  if (p.q.data) s.queries[index] = real ? head_of<E>(p, p.q, head)[row * p.q.row + column] : zero;
  if (p.iterations > 1) s.w[index] = step.w;
  if (p.iterations == 1 && f.sparse && row < p.length && column < p.width) {
    f.sparse[(head * p.length + row) * p.width + column] = step.sparse;
  }
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
  // Under a causal mask the last rows have the most work, so they start first.
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

  const Mask visible(p, head);
  const Dropout keeps(p, head, results.last());
  const float scale2 = score_scale(p);
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
                  visible,
                  keeps,
                  scale2,
                  row,
                  key);
    if (key + T::kStages * T::kColumns < end) device::sync();  // a fetch overwrites this stage
  }
  attention.finish();

  const Results<E> next{f, head, s.iteration + 1};
  MOLEX_UNROLL for (int m = 0; m < T::kTiles; ++m) {
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      const int mine = row + 16 * m + lane_row() + 8 * i;
      const bool real = exists(p, head, mine);
      results.statistics(mine, real, attention.largest[m][i], attention.total[m][i]);
      if (!real) attention.clear_row(m, i);
      results.template low_rank<D>(mine, [&](int n, int c) { return attention.sum[m][n][2 * i + c]; });
      if (results.last()) continue;

      const float bound = bound_of(p, head, mine);
      const int64_t place = base + static_cast<int64_t>(mine) * D + lane_column();
      const E* own = head_of<E>(p, p.k, head) + mine * p.k.row + lane_column();
      float* w = s.w + place;
      const auto update = [&](int n, int c) {
        const bool inside = real && 8 * n + c < p.width - lane_column();
        const float k = inside ? device::to_float(own[8 * n + c]) : 0.0f;
        const float low_rank = attention.sum[m][n][2 * i + c];
        return soft_threshold(k, low_rank, w[8 * n + c] - low_rank, bound);
      };
      next.template sparse<D>(mine, [&](int n, int c) { return update(n, c).sparse; });
      MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
        const Step first = update(n, 0), second = update(n, 1);
        store_pair(s.next_clean + place + 8 * n, first.clean, second.clean);
        store_pair(w + 8 * n, first.w, second.w);
      }
    }
  }
}

}  // namespace molex::rpc
