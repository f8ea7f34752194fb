// Dropout of the last iteration's attention.

#pragma once

#include "cuda/rpc_attention/parameters.cuh"

namespace molex::rpc {

// The first word of Philox 4x32 with 7 rounds; key = seed, counter = position.
MOLEX_DEVICE uint32_t philox(uint64_t seed, uint64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  // The loop stays rolled: unrolled for every element of a tile, it would take registers from the products.
  MOLEX_NO_UNROLL for (int round = 0; round < 7; ++round) {
    const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u, b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// Dropout of the attention of one head: 0, or 1 / (1 - p), for a row and a key. It keeps only the parameters:
// anything more would take registers from the products of every tile.
struct Dropout {
  const Problem& p;
  int64_t head;
  bool active;

  MOLEX_DEVICE Dropout(const Problem& problem, int64_t index, bool last_iteration)
      : p(problem), head(index), active(last_iteration && problem.seed) {}

  MOLEX_DEVICE float operator()(int row, int key) const {
    const uint64_t position = (static_cast<uint64_t>(head) * p.length + row) * p.length + key;
    return philox(static_cast<uint64_t>(*p.seed), position) >= p.dropped ? p.kept_scale : 0.0f;
  }
};

}  // namespace molex::rpc
