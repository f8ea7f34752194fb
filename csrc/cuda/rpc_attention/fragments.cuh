// Products of small matrices by one warp, from shared memory and registers, on tensor cores.
//
// An accumulator is [rows / 16][columns / 8][4]: of a 16x8 tile, lane l holds the rows l / 4 and l / 4 + 8
// at the columns 2 (l % 4) and the next one, in the order (row, column), (row, column + 1),
// (row + 8, column), (row + 8, column + 1).
//
// fp16 and bf16 use m16n8k16. fp32 uses m16n8k8 three times: x = high + low, each with TF32's 11 bits, and
// high high + high low + low high keeps about 22 bits of a product. Scores need all bits, because an
// exponential turns their absolute error into a relative one: `Exact` adds low low and, as one m16n8k16 of
// bf16, lost x + x lost, where lost = x - high - low is at most one bit. Tensor cores truncate sums where
// fp32 rounds them, so that a long sum would drift: therefore each sum of 8 products is added by an fp32
// addition.

#pragma once

#include <type_traits>

#include "cuda/rpc_attention/device.cuh"

namespace molex {

constexpr int kWarp = 32;

MOLEX_DEVICE int lane() { return device::thread() % kWarp; }
MOLEX_DEVICE int warp() { return device::thread() / kWarp; }
// Where a lane's elements stand in a 16x8 tile.
MOLEX_DEVICE int lane_row() { return lane() / 4; }
MOLEX_DEVICE int lane_column() { return lane() % 4 * 2; }

// A row of D elements in shared memory takes D + 8: eight rows then start in different banks.
template <int D>
constexpr int kPitch = D + 8;

template <class E>
struct Fragments {
  static_assert(sizeof(E) == 2);
  static constexpr int kDepth = 16;
  struct OperandA {
    uint32_t r[4];
  };
  struct OperandB {  // 16 columns
    uint32_t r[4];
  };

  // 16 rows of a row-major matrix, `kDepth` columns from `at` on.
  MOLEX_DEVICE static void load(OperandA& a, const E* at, int pitch) {
    device::load_matrices(a.r, at + lane() % 16 * pitch + lane() / 16 * 8);
  }

  // The transpose of 16 rows of a row-major matrix: its rows are the product's columns.
  MOLEX_DEVICE static void load_rows(OperandB& b, const E* at, int pitch) {
    device::load_matrices(b.r, at + (lane() / 16 * 8 + lane() % 8) * pitch + lane() / 8 % 2 * 8);
  }

  // `kDepth` rows and 16 columns of a row-major matrix, as they stand.
  MOLEX_DEVICE static void load_columns(OperandB& b, const E* at, int pitch) {
    device::load_matrices_transposed(b.r, at + lane() % 16 * pitch + lane() / 16 * 8);
  }

  // Columns [kDepth * step, kDepth * (step + 1)) of an accumulator, rounded to E.
  MOLEX_DEVICE static void convert(OperandA& a, const float (*c)[4], int step) {
    const float* c0 = c[2 * step];
    const float* c1 = c[2 * step + 1];
    a.r[0] = device::pack<E>(c0[0], c0[1]);
    a.r[1] = device::pack<E>(c0[2], c0[3]);
    a.r[2] = device::pack<E>(c1[0], c1[1]);
    a.r[3] = device::pack<E>(c1[2], c1[3]);
  }

  template <bool Exact = false>
  MOLEX_DEVICE static void multiply(float (&c)[4], const OperandA& a, const OperandB& b, int half) {
    const uint32_t columns[2] = {b.r[2 * half], b.r[2 * half + 1]};
    device::mma_16<E>(c, a.r, columns);
  }
};

// The order of a sum over k is free: k = t and t + 4 of the instruction are the neighbours 2 t and 2 t + 1 of
// the matrices, so that an accumulator can be an a operand without being rearranged.
template <>
struct Fragments<float> {
  static constexpr int kDepth = 8;
  struct OperandA {
    uint32_t high[4], low[4], lost[4];  // of `lost` the second half is x
  };
  struct OperandB {
    uint32_t high[2][2], low[2][2], lost[2][2];  // of `lost` the first half is x
  };

  MOLEX_DEVICE static void load(OperandA& a, const float* at, int pitch) {
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      const float* row = at + (lane_row() + 8 * i) * pitch + lane_column();
      const float first = split(row[0], a.high[i], a.low[i]);
      const float second = split(row[1], a.high[i + 2], a.low[i + 2]);
      a.lost[i] = device::pack<device::BFloat>(first, second);
      a.lost[i + 2] = device::pack<device::BFloat>(row[0], row[1]);
    }
  }

  MOLEX_DEVICE static void load_rows(OperandB& b, const float* at, int pitch) {
    MOLEX_UNROLL for (int half = 0; half < 2; ++half) {
      const float* row = at + (lane_row() + 8 * half) * pitch + lane_column();
      const float first = split(row[0], b.high[half][0], b.low[half][0]);
      const float second = split(row[1], b.high[half][1], b.low[half][1]);
      b.lost[half][0] = device::pack<device::BFloat>(row[0], row[1]);
      b.lost[half][1] = device::pack<device::BFloat>(first, second);
    }
  }

  MOLEX_DEVICE static void load_columns(OperandB& b, const float* at, int pitch) {
    const float* first = at + lane_column() * pitch + lane_row();
    MOLEX_UNROLL for (int half = 0; half < 2; ++half) {
      MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
        split(first[i * pitch + 8 * half], b.high[half][i], b.low[half][i]);
      }
    }
  }

  MOLEX_DEVICE static void convert(OperandA& a, const float (*c)[4], int step) {
    constexpr int kOrder[4] = {0, 2, 1, 3};
    MOLEX_UNROLL for (int i = 0; i < 4; ++i) split(c[step][kOrder[i]], a.high[i], a.low[i]);
  }

  template <bool Exact = false>
  MOLEX_DEVICE static void multiply(float (&c)[4], const OperandA& a, const OperandB& b, int half) {
    float rest[4] = {0.0f, 0.0f, 0.0f, 0.0f}, whole[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if constexpr (Exact) {
      device::mma_16<device::BFloat>(rest, a.lost, b.lost[half]);
      device::mma_tf32(rest, a.low, b.low[half]);
    }
    device::mma_tf32(rest, a.low, b.high[half]);
    device::mma_tf32(rest, a.high, b.low[half]);
    device::mma_tf32(whole, a.high, b.high[half]);
    MOLEX_UNROLL for (int i = 0; i < 4; ++i) c[i] += whole[i] + rest[i];
  }

 private:
  // Returns what is lost.
  MOLEX_DEVICE static float split(float x, uint32_t& high, uint32_t& low) {
    high = device::to_tf32(x);
    const float rest = x - device::as_float(high);
    low = device::to_tf32(rest);
    return rest - device::as_float(low);
  }
};

template <int M, int N>
MOLEX_DEVICE void clear(float (&c)[M][N][4]) {
  MOLEX_UNROLL for (int m = 0; m < M; ++m) {
    MOLEX_UNROLL for (int n = 0; n < N; ++n) { MOLEX_UNROLL for (int e = 0; e < 4; ++e) c[m][n][e] = 0.0f; }
  }
}

// c += a b^T: a of 16 M rows and b of 8 N rows, both of `Depth` columns in shared memory. `Ahead` columns
// are one round of the loop, which bounds the registers of operands loaded ahead.
template <class E, int Depth, int Ahead, bool Exact, int M, int N>
MOLEX_DEVICE void gemm_nt(float (&c)[M][N][4], const E* a, const E* b) {
  using F = Fragments<E>;
  constexpr int kLength = kPitch<Depth>;
  MOLEX_UNROLL_BY(Ahead / F::kDepth) for (int k = 0; k < Depth; k += F::kDepth) {
    typename F::OperandA a_operand[M];
    MOLEX_UNROLL for (int m = 0; m < M; ++m) F::load(a_operand[m], a + 16 * m * kLength + k, kLength);
    MOLEX_UNROLL for (int n = 0; n < N; n += 2) {
      typename F::OperandB b_operand;
      F::load_rows(b_operand, b + 8 * n * kLength + k, kLength);
      MOLEX_UNROLL for (int m = 0; m < M; ++m) {
        F::template multiply<Exact>(c[m][n], a_operand[m], b_operand, 0);
        F::template multiply<Exact>(c[m][n + 1], a_operand[m], b_operand, 1);
      }
    }
  }
}

// The rows a of products a b^T, 16 M of them: in registers in 16 bits, but where they stand in shared memory
// in fp32, whose operands take three times as many.
template <class E, int Depth, int M>
struct HeldRows {
  using F = Fragments<E>;
  static constexpr bool kHeld = sizeof(E) == 2;
  static constexpr int kSteps = kHeld ? Depth / F::kDepth : 0;

  typename F::OperandA a[M][kSteps + !kHeld];
  const E* rows;

  MOLEX_DEVICE void load(const E* from) {
    rows = from;
    if constexpr (kHeld) {
      MOLEX_UNROLL for (int m = 0; m < M; ++m) {
        MOLEX_UNROLL for (int k = 0; k < kSteps; ++k) {
          F::load(a[m][k], from + 16 * m * kPitch<Depth> + k * F::kDepth, kPitch<Depth>);
        }
      }
    }
  }

  // c += a b^T for 8 N rows of b in shared memory.
  template <int Ahead, bool Exact, int N>
  MOLEX_DEVICE void multiply(float (&c)[M][N][4], const E* b) const {
    if constexpr (!kHeld) {
      gemm_nt<E, Depth, Ahead, Exact>(c, rows, b);
    } else {
      MOLEX_UNROLL for (int k = 0; k < kSteps; ++k) {
        MOLEX_UNROLL for (int n = 0; n < N; n += 2) {
          typename F::OperandB b_operand;
          F::load_rows(b_operand, b + 8 * n * kPitch<Depth> + k * F::kDepth, kPitch<Depth>);
          MOLEX_UNROLL for (int m = 0; m < M; ++m) {
            F::multiply(c[m][n], a[m][k], b_operand, 0);
            F::multiply(c[m][n + 1], a[m][k], b_operand, 1);
          }
        }
      }
    }
  }
};

// c += p b: p an accumulator of 8 K columns, b of 8 K rows and 8 N columns in shared memory. In fp32 the
// product is summed before it is added: c is a sum of many.
template <class E, int M, int N, int K>
MOLEX_DEVICE void gemm_nn(float (&c)[M][N][4], const float (&p)[M][K][4], const E* b) {
  using F = Fragments<E>;
  constexpr int kLength = kPitch<8 * N>, kSteps = 8 * K / F::kDepth;
  const auto load = [&](int step, int n) {
    typename F::OperandB b_operand;
    F::load_columns(b_operand, b + F::kDepth * step * kLength + 8 * n, kLength);
    return b_operand;
  };
  if constexpr (sizeof(E) == 2) {
    MOLEX_UNROLL for (int step = 0; step < kSteps; ++step) {
      typename F::OperandA a_operand[M];
      MOLEX_UNROLL for (int m = 0; m < M; ++m) F::convert(a_operand[m], p[m], step);
      MOLEX_UNROLL for (int n = 0; n < N; n += 2) {
        const typename F::OperandB b_operand = load(step, n);
        MOLEX_UNROLL for (int m = 0; m < M; ++m) {
          F::multiply(c[m][n], a_operand[m], b_operand, 0);
          F::multiply(c[m][n + 1], a_operand[m], b_operand, 1);
        }
      }
    }
  } else {
    constexpr int kAtOnce = N < 16 && kSteps > 1 ? 2 : 1;  // what the registers hold
    MOLEX_UNROLL for (int first = 0; first < kSteps; first += kAtOnce) {
      typename F::OperandA a_operand[M][kAtOnce];
      MOLEX_UNROLL for (int m = 0; m < M; ++m) {
        MOLEX_UNROLL for (int i = 0; i < kAtOnce; ++i) F::convert(a_operand[m][i], p[m], first + i);
      }
      MOLEX_UNROLL for (int n = 0; n < N; n += 2) {
        float sum[M][2][4];
        clear(sum);
        MOLEX_UNROLL for (int i = 0; i < kAtOnce; ++i) {
          const typename F::OperandB b_operand = load(first + i, n);
          MOLEX_UNROLL for (int m = 0; m < M; ++m) {
            F::multiply(sum[m][0], a_operand[m][i], b_operand, 0);
            F::multiply(sum[m][1], a_operand[m][i], b_operand, 1);
          }
        }
        MOLEX_UNROLL for (int m = 0; m < M; ++m) {
          MOLEX_UNROLL for (int e = 0; e < 4; ++e) {
            c[m][n][e] += sum[m][0][e];
            c[m][n + 1][e] += sum[m][1][e];
          }
        }
      }
    }
  }
}

// The sum, or the largest, over the four lanes that share a row.
MOLEX_DEVICE float row_sum(float x) {
  x += device::shuffle_xor(x, 1);
  return x + device::shuffle_xor(x, 2);
}
MOLEX_DEVICE float row_max(float x) {
  x = device::larger(x, device::shuffle_xor(x, 1));
  return device::larger(x, device::shuffle_xor(x, 2));
}

// The inner products of 16 rows g with rows l, of this lane's two rows: in the way of a product g v^T, so
// that where l is v both are the same number. g(n, i) and l(n, i) give this lane's pair of an accumulator; g
// is exact in 16 bits, l is taken as the sum of two.
template <class E, int D, class G, class L>
MOLEX_DEVICE void inner_products(float (&result)[2], const G& g, const L& l) {
  float high[2][4] = {}, low[2][4] = {};
  MOLEX_UNROLL for (int step = 0; step < D / 16; ++step) {
    uint32_t a[4];
    MOLEX_UNROLL for (int part = 0; part < 4; ++part) {
      const float2 pair = g(2 * step + part / 2, part % 2);
      a[part] = device::pack<E>(pair.x, pair.y);
    }
    MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
      uint32_t b_high[2], b_low[2];
      MOLEX_UNROLL for (int part = 0; part < 2; ++part) {
        const float2 pair = l(2 * step + part, i);
        const auto rest = [](float x) { return x - device::to_float(device::from_float<E>(x)); };
        b_high[part] = device::pack<E>(pair.x, pair.y);
        b_low[part] = device::pack<E>(rest(pair.x), rest(pair.y));
      }
      device::mma_16<E>(high[i], a, b_high);
      device::mma_16<E>(low[i], a, b_low);
    }
  }
  MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
    const int c = lane_row() - lane_column();  // which element of this lane is on the diagonal
    const auto diagonal = [&](const float (&x)[4]) {
      return row_sum(c == 0 ? x[2 * i] : (c == 1 ? x[2 * i + 1] : 0.0f));
    };
    result[i] = diagonal(high[i]) + diagonal(low[i]);
  }
}

}  // namespace molex
