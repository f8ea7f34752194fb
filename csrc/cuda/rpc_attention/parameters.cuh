// What RPC attention's passes are called with, and where a head's numbers stand. See launch.cuh for the
// method.

#pragma once

#include "cuda/rpc_attention/fragments.cuh"

namespace molex::rpc {

enum class Dtype : int32_t { kHalf, kBFloat, kFloat };

// A tensor [B, H, N, d] with unit stride in d; strides count elements.
struct Tensor4 {
  const void* data;
  int64_t batch, head, row;
};

// What the forward and the backward pass read. Pointers of absent tensors are null.
struct Problem {
  Dtype dtype;
  int32_t batch, heads, length, width, iterations, causal;
  float scale;
  Tensor4 k, v, q;
  const float* threshold;                 // fp32, at head * head_stride + row * row_stride
  int64_t threshold_head, threshold_row;  // threshold_row is 0 for one threshold per head
  const uint8_t* key_mask;                // [B, N], 1 for a token that exists
  const int64_t* seed;                    // null without dropout
  uint32_t dropped;                       // words of Philox below it are dropped
  float kept_scale;                       // 1 / (1 - p)
  int32_t shared_limit, cluster_limit;    // of the device: bytes per block, blocks per cluster

  MOLEX_HOST_DEVICE int64_t all_heads() const { return static_cast<int64_t>(batch) * heads; }
};

struct Forward {
  Problem problem;
  void* out;         // [B, H, N, d]
  float* sparse;     // [B, H, N, d], the last iteration's S, or null
  void* out_rest;    // [B, H, N, d] in 16 bits, what rounding took from `out`, or null
  float* low_ranks;  // [n - 1, B, H, N, d], or null
  // [n, 2, B, H, N], or null: the score of each row's largest scaled score, and the sum of
  // exp(scale (score - that)). A log of the sum would cost eps times itself in the probabilities.
  float* stats;
  void* scratch;
};

struct Backward {
  Problem problem;
  Tensor4 grad_out, grad_sparse;  // grad_sparse is fp32, its data null where there is none
  const void *out, *out_rest;     // out_rest is null in fp32
  const float* low_ranks;
  const float* stats;
  void *grad_k, *grad_v, *grad_q;  // [B, H, N, d]; grad_q is null without q
  float* grad_threshold;           // as the threshold, contiguous
  void* scratch;
};

// Rows of scratch matrices are padded to whole tiles and to the padded width: [B * H, rows, D].
constexpr int kRowsMultiple = 128;
MOLEX_HOST_DEVICE int64_t padded_rows(const Problem& p) {
  return (p.length + kRowsMultiple - 1) / kRowsMultiple * kRowsMultiple;
}

MOLEX_DEVICE bool exists(const Problem& p, int64_t head, int row) {
  return row < p.length && (!p.key_mask || p.key_mask[head / p.heads * p.length + row]);
}

MOLEX_DEVICE float bound_of(const Problem& p, int64_t head, int row) {
  return row < p.length ? p.threshold[head * p.threshold_head + row * p.threshold_row] : 0.0f;
}

MOLEX_DEVICE int64_t head_offset(const Problem& p, const Tensor4& t, int64_t head) {
  return head / p.heads * t.batch + head % p.heads * t.head;
}

template <class E>
MOLEX_DEVICE const E* head_of(const Problem& p, const Tensor4& t, int64_t head) {
  return static_cast<const E*>(t.data) + head_offset(p, t, head);
}

// Cuts scratch memory into arrays. With a null base it only counts bytes.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  MOLEX_HOST_DEVICE T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return result;
  }
};

}  // namespace molex::rpc
