// Which keys take part in the attention of a row.

#pragma once

#include "cuda/rpc_attention/parameters.cuh"

namespace molex::rpc {

struct Mask {
  const uint8_t* mask;
  int length;
  bool causal;
  int seen;  // so many keys are seen by `first` and all rows after it

  MOLEX_DEVICE Mask(const Problem& p, int64_t head, int first)
      : mask(p.key_mask ? p.key_mask + head / p.heads * p.length : nullptr),
        length(p.length),
        causal(p.causal),
        seen(mask ? 0 : (causal && first + 1 < length ? first + 1 : length)) {}

  MOLEX_DEVICE bool exists(int key) const { return key < length && (!mask || mask[key]); }
  MOLEX_DEVICE bool later(int row, int key) const { return causal && key > row; }

  // Whether rows from `row` on attend to those of `count` keys from `key` on that there are.
  MOLEX_DEVICE bool only_ends(int row, int key, int count) const {
    return !mask && (!causal || key + count <= row + 1);
  }
};

}  // namespace molex::rpc
