// RPC attention forward with all iterations on chip, in 16 bits, by warp groups of sm_90a: whole rows of
// scores stand in registers, so that a softmax sees all of its row at once.
//
// A warp group has 64 rows. Up to 128 keys a block is one group, and a head a cluster of at most two; of more
// keys two groups share a block's keys and values. Budget: 128 threads of 168 registers up to 128 keys, 256
// of 255 up to 256 keys, where a few bytes spill at 256 keys alone. Shared memory (R + Keys) 2 D bytes for R
// rows of K~, (D + 8) 2 bytes for each own row of k, and with q 2 D bytes more. Dropout is left to the other
// forms: its words would take the registers of the scores. So are narrower heads, for which those are faster.

#pragma once

#include "cuda/rpc_attention/on_chip.cuh"
#include "cuda/rpc_attention/wgmma.cuh"

namespace molex::rpc {

// Rows of D elements in shared memory as the core matrices of wgmma.cuh: of eight rows those of the first
// eight columns, then those of the next. So thread i of a copy in chunks of 16 bytes has the place 16 i.
template <class E, int D>
struct Cores {
  static constexpr int kCore = 64;                                            // elements
  static constexpr int kAcross = kCore * sizeof(E), kDown = D / 8 * kAcross;  // bytes to the neighbours

  // The elements of 16 columns from `column` on and all rows from `row` on, to be summed over the columns,
  MOLEX_DEVICE static device::Matrix by_columns(uint32_t address, int row, int column) {
    const device::Matrix rows = device::moved(device::matrix(address, kAcross, kDown), row * (kDown / 8));
    return device::moved(rows, column / 8 * kAcross);
  }
  MOLEX_DEVICE static device::Matrix by_columns(const E* cores, int row, int column) {
    return by_columns(device::shared_address(cores), row, column);
  }
  // and of 16 rows from `row` on and all columns, to be summed over the rows.
  MOLEX_DEVICE static device::Matrix by_rows(uint32_t address, int row) {
    return device::moved(device::matrix(address, kDown, kAcross), row * (kDown / 8));
  }
  MOLEX_DEVICE static device::Matrix by_rows(const E* cores, int row) {
    return by_rows(device::shared_address(cores), row);
  }

  // Rows [first, first + rows) of a head's matrix, zeros where a token or a column does not exist:
  // asynchronously where the matrix is aligned. All threads of the block take part.
  MOLEX_DEVICE static void load(
      E* to, const Problem& p, const Tensor4& t, int64_t head, int first, int rows) {
    const E* from = head_of<E>(p, t, head);
    const bool copies = chunked(from, t.row, p.width);
    MOLEX_NO_UNROLL for (int i = device::thread(); i < rows * (D / 8); i += device::threads()) {
      const int row = first + i / D * 8 + i % 8, column = i / 8 % (D / 8) * 8;
      const E* source = from + row * t.row + column;
      const bool reads = exists(p, head, row);
      if (copies) {
        const bool inside = reads && column < p.width;
        device::copy_async_or_zero(to + 8 * i, inside ? source : from, inside);
        continue;
      }
      MOLEX_NO_UNROLL for (int c = 0; c < 8; ++c) {
        to[8 * i + c] = reads && column + c < p.width ? source[c] : device::from_float<E>(0.0f);
      }
    }
  }

  // Sends this warp's 16 rows, from `row` on, to the same place in every block of the cluster.
  MOLEX_DEVICE static void publish(E* cores, const float (&own)[D / 8][4], int row, int rank, int cluster) {
    E* mine = cores + row * D;
    MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
      MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
        store_pair(mine + (i * (D / 8) + n) * kCore + lane_row() * 8 + lane_column(),
                   own[n][2 * i],
                   own[n][2 * i + 1]);
      }
    }
    if (cluster == 1) return;
    device::sync_warp();
    mine += 8 * lane();
    int peer = rank;
    MOLEX_NO_UNROLL for (int other = 1; other < cluster; ++other) {
      peer = peer + 1 == cluster ? 0 : peer + 1;
      const device::Remote to = device::remote(mine, peer);
      MOLEX_UNROLL for (int i = 0; i < D / 16; ++i) {
        device::store_remote(to, 16 * kWarp * i, *reinterpret_cast<const uint4*>(mine + 8 * kWarp * i));
      }
    }
  }
};

template <class E, int D>
constexpr bool kRunsInWarpGroups = sizeof(E) == 2 && D == 64;
// The largest numbers of keys of the kernels that there are: of vision models N = 197 is common.
constexpr int kMostKeys = 256;
template <class Function>
auto with_keys(int length, const Function& function) {
  if (length <= 64) return function.template operator()<64>();
  if (length <= 128) return function.template operator()<128>();
  if (length <= 208) return function.template operator()<208>();
  return function.template operator()<kMostKeys>();
}

// How a head's iterations run in warp groups.
template <class E, int D, int Keys>
struct WarpGroups {
  static constexpr int kGroups = Keys <= 128 ? 1 : 2;
  static constexpr int kRows = 64 * kGroups, kThreads = 4 * kWarp * kGroups;
  static constexpr int kPart = Keys == 208 ? 104 : (Keys < 128 ? Keys : 128);  // keys of one instruction
  static constexpr int kBlocks = kGroups == 1 ? 3 : 1;

  int cluster, rows, shared_bytes;  // `rows` of keys, whole blocks
  bool fits;

  explicit WarpGroups(const Problem& p) {
    cluster = (p.length + kRows - 1) / kRows;
    rows = cluster * kRows < Keys ? Keys : cluster * kRows;
    const int64_t elements = (rows + Keys + (p.q.data ? kRows : 0)) * D + kRows * kPitch<D>;
    const int64_t bytes = elements * static_cast<int64_t>(sizeof(E));
    fits = !p.seed && p.length <= Keys && cluster <= p.cluster_limit && bytes <= p.shared_limit;
    shared_bytes = static_cast<int>(fits ? bytes : 0);
  }

  device::Grid grid(const Problem& p) const {
    return {p.all_heads() * cluster, kThreads, shared_bytes, cluster};
  }
};

template <class E, int D, int Keys>
struct WarpGroupForward {
  Forward f;
  WarpGroups<E, D, Keys> plan;
};

template <class E, int D, int Keys>
MOLEX_WGMMA_KERNEL((WarpGroups<E, D, Keys>::kThreads), (WarpGroups<E, D, Keys>::kBlocks))
void rpc_forward_warp_groups(MOLEX_PARAMS WarpGroupForward<E, D, Keys> s) {
#if MOLEX_HAS_WGMMA
  using Plan = WarpGroups<E, D, Keys>;
  using In = Cores<E, D>;
  const Forward& f = s.f;
  const Problem& p = f.problem;
  const Plan& plan = s.plan;
  const int64_t head = device::block() / plan.cluster;
  const int rank = device::block() - static_cast<int>(head) * plan.cluster;
  const int first = rank * Plan::kRows, row = first + 16 * warp();

  E* keys = reinterpret_cast<E*>(device::shared());
  E* values = keys + plan.rows * D;
  E* queries = values + Keys * D;
  E* own = queries + (p.q.data ? Plan::kRows * D : 0);
  load_rows<E, D>(own, p, p.k, head, first, Plan::kRows);
  device::commit_copies();
  if (p.q.data) In::load(queries, p, p.q, head, first, Plan::kRows);
  In::load(values, p, p.v, head, 0, Keys);
  device::commit_copies();
  // Keys that no block has are multiplied, too.
  for (int i = plan.cluster * Plan::kRows * D + device::thread(); i < plan.rows * D; i += device::threads()) {
    keys[i] = device::from_float<E>(0.0f);
  }
  device::wait_copies<1>();
  device::sync();
  device::arrive_cluster_relaxed();

  // All four warps take part in every product, those without rows, too: their rows are zeros.
  Attention<E, D, 1, Keys> attention;
  float w[D / 8][4];
  clear(attention.sum);
  MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) { MOLEX_UNROLL for (int e = 0; e < 4; ++e) w[n][e] = 0.0f; }
  MOLEX_NO_UNROLL for (int t = 0; t < p.iterations; ++t) {
    const Results<E> results{f, device::opaque(head), t};
    const int first_row = device::opaque(row);
    E* own_rows = own + (first_row - first) * kPitch<D>;
    split_rows<E, D>(p, head, first_row + lane_row(), own_rows, attention.sum[0], w, results.last());
    device::wait_cluster();  // until every block has started, and read the keys of the iteration before
    In::publish(keys, attention.sum[0], first_row, rank, plan.cluster);
    if (t == 0) device::wait_copies<0>();
    device::fence_proxy();
    device::arrive_cluster();
    device::wait_cluster();

    float z[1][Keys / 8][4];
    device::fence_products();
    MOLEX_UNROLL for (int key = 0; key < Keys; key += Plan::kPart) {
      MOLEX_UNROLL for (int k = 0; k < D; k += 16) {
        const int group = Plan::kGroups == 1 ? 0 : warp() / 4 * 64;
        const device::Matrix a =
            p.q.data ? In::by_columns(queries, group, k) : In::by_columns(keys, first + group, k);
        device::multiply_nt<E, Plan::kPart>(z[0] + key / 8, a, In::by_columns(keys, key, k), k > 0);
      }
    }
    device::commit_products();
    device::wait_products<0>(z[0]);
    if (!results.last()) device::arrive_cluster();

    const Mask visible(p, head, first_row);
    const Dropout keeps(p, head, results.last());
    attention.template weigh<true>(z, visible, keeps, score_scale(p), first_row, 0);
    typename Fragments<E>::OperandA weights[Keys / 16];
    MOLEX_UNROLL for (int step = 0; step < Keys / 16; ++step) {
      Fragments<E>::convert(weights[step], z[0], step);
    }
    device::fence_products();
    MOLEX_UNROLL for (int step = 0; step < Keys / 16; ++step) {
      device::multiply_nn<E, D>(attention.sum[0], weights[step].r, In::by_rows(values, 16 * step), step > 0);
    }
    device::commit_products();
    device::wait_products<0>(attention.sum[0]);
    attention.finish();
    write_rows<E, D>(results, first_row, attention, w, own_rows);
  }
#endif
}

}  // namespace molex::rpc
