// One attention of the forward pass: rows of a warp, tile by tile of keys, and what is written of it.

#pragma once

#include "cuda/rpc_attention/copies.cuh"
#include "cuda/rpc_attention/dropout.cuh"
#include "cuda/rpc_attention/mask.cuh"

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

  // `row` and `key` are the first indices. `values_arrive` is called before the values are read.
  template <class Rows, class Arrive>
  MOLEX_DEVICE void add(const Rows& rows,
                        const E* keys,
                        const E* values,
                        const Mask& visible,
                        const Dropout& keeps,
                        float scale2,
                        int row,
                        int key,
                        const Arrive& values_arrive) {
    float z[M][Columns / 8][4];
    clear(z);
    rows.template multiply<(D > 64 ? 8 : 16), true>(z, keys);
    weigh<false>(z, visible, keeps, scale2, row, key);
    values_arrive();
    gemm_nn<E>(sum, z, values);
  }

  // Makes exp(score - largest score) of products z, and brings `sum` and the statistics up to date. Where a
  // tile is `Whole` it has all keys, nothing came before it, and nothing is dropped.
  template <bool Whole>
  MOLEX_DEVICE void weigh(float (&z)[M][Columns / 8][4],
                          const Mask& visible,
                          const Dropout& keeps,
                          float scale2,
                          int row,
                          int key) {
    if (scale2 < 0.0f) {  // then the largest score is the smallest product
      scale2 = -scale2;
      MOLEX_UNROLL for (int m = 0; m < M; ++m) {
        MOLEX_UNROLL for (int n = 0; n < Columns / 8; ++n) {
          MOLEX_UNROLL for (int e = 0; e < 4; ++e) z[m][n][e] = -z[m][n][e];
        }
      }
    }
    mask(z, visible, row, key);
    MOLEX_UNROLL for (int m = 0; m < M; ++m) {
      MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
        float top = Whole ? -device::infinity() : largest[m][i];
        MOLEX_UNROLL for (int n = 0; n < Columns / 8; ++n) {
          top = device::larger(device::larger(z[m][n][2 * i], z[m][n][2 * i + 1]), top);
        }
        top = row_max(top);
        // For a row that has met no key yet: exp(-inf - 0) = 0. The difference comes first, so that the
        // largest score has exactly 1: of a row that sees one key the result is then that key's value, with
        // nothing of a rounding for the backward pass to find in it.
        const float origin = top == -device::infinity() ? 0.0f : top;
        const float rescale = Whole ? 0.0f : device::exp2((largest[m][i] - origin) * scale2);
        largest[m][i] = top;
        const float before = Whole ? 0.0f : total[m][i] * rescale;
        float part = kCompensated ? lost[m][i] * rescale : before;
        MOLEX_UNROLL for (int n = 0; n < Columns / 8; ++n) {
          MOLEX_UNROLL for (int e = 2 * i; e < 2 * i + 2; ++e) {
            z[m][n][e] = device::exp2((z[m][n][e] - origin) * scale2);
            part += z[m][n][e];
          }
        }
        total[m][i] = kCompensated ? before + part : part;
        if (kCompensated) lost[m][i] = part - (total[m][i] - before);
        if constexpr (!Whole) {
          MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
            sum[m][n][2 * i] *= rescale;
            sum[m][n][2 * i + 1] *= rescale;
          }
        }
      }
    }
    if (!Whole && keeps.active) {
      MOLEX_UNROLL for (int m = 0; m < M; ++m) {
        MOLEX_UNROLL for (int n = 0; n < Columns / 8; ++n) {
          MOLEX_UNROLL for (int e = 0; e < 4; ++e) {
            z[m][n][e] *= keeps(row + 16 * m + lane_row() + e / 2 * 8, key + 8 * n + lane_column() + e % 2);
          }
        }
      }
    }
  }

  // The scores of what a row does not attend to become -infinity.
  MOLEX_DEVICE void mask(float (&z)[M][Columns / 8][4], const Mask& visible, int row, int key) const {
    if (key + Columns <= visible.seen) return;
    if (visible.only_ends(row, key, Columns)) {
      const int left = visible.length - key - lane_column();
      MOLEX_UNROLL for (int n = 0; n < Columns / 8; ++n) {
        MOLEX_UNROLL for (int e = 0; e < 4; ++e) {
          if (8 * n + e % 2 < left) continue;
          MOLEX_UNROLL for (int m = 0; m < M; ++m) z[m][n][e] = -device::infinity();
        }
      }
      return;
    }
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
  // Of the last iteration it leaves in `c` what rounding took, if that is kept.
  template <int D>
  MOLEX_DEVICE void low_rank(int row, float (&c)[D / 8][4], E* shared) const {
    const Problem& p = f.problem;
    if (!last()) {
      if (!f.low_ranks) return;
      float* to = f.low_ranks + iteration * p.all_heads() * p.length * p.width;
      return store_tile<D>(p, to, head, row, c, shared);
    }
    store_tile<D>(p, static_cast<E*>(f.out), head, row, c, shared);
    if constexpr (sizeof(E) == 2) {
      if (!f.out_rest) return;
      MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
        MOLEX_UNROLL for (int e = 0; e < 4; ++e) {
          c[n][e] -= device::to_float(device::from_float<E>(c[n][e]));
        }
      }
      device::sync_warp();  // both use `shared`
      store_tile<D>(p, static_cast<E*>(f.out_rest), head, row, c, shared);
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

  template <int D>
  MOLEX_DEVICE void sparse(int row, const float (&c)[D / 8][4], E* shared) const {
    if (last() && f.sparse) store_tile<D>(f.problem, f.sparse, head, row, c, shared);
  }
};

}  // namespace molex::rpc
