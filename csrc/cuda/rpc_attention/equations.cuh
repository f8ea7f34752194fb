// What RPC attention's kernels share: their parameters, the element-wise equations, the mask, dropout, and
// copies of rows between global and shared memory. See launch.cuh for the method.

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
  float* low_ranks;  // [n - 1, B, H, N, d], or null
  // [n, 2, B, H, N], or null: the score of each row's largest scaled score, and the sum of
  // exp(scale (score - that)). A log of the sum would cost eps times itself in the probabilities.
  float* stats;
  void* scratch;
};

struct Backward {
  Problem problem;
  Tensor4 grad_out, grad_sparse;  // grad_sparse is fp32, its data null where there is none
  const void* out;
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

// The scale of scores in powers of 2. A scale of 0 becomes the smallest number, because masked scores are
// -infinity.
MOLEX_DEVICE float score_scale(const Problem& p) {
  constexpr float kLog2e = 1.4426950408889634f, kSmallest = 0x1p-126f;
  const float scale2 = p.scale * kLog2e;
  return scale2 > -kSmallest && scale2 < kSmallest ? kSmallest : scale2;
}

// One iteration's S, K~ = k - S - u, and w = u + k - S, from which u' = w - L'.
struct Step {
  float sparse, clean, w;
};

MOLEX_DEVICE float absolute(float x) { return x < 0.0f ? -x : x; }

// S = a - sign(a) T outside (-T, T), else 0; NaN if a or T is NaN.
MOLEX_DEVICE Step soft_threshold(float k, float low_rank, float u, float bound) {
  const float a = k - low_rank + u;
  const float sparse = absolute(a) < bound ? 0.0f : a - (a < 0.0f ? -bound : (a == 0.0f ? 0.0f : bound));
  return {sparse, k - sparse - u, u + k - sparse};
}

// The derivative of S: m = 1 outside (-T, T), and sign(a), in one byte for the backward pass.
constexpr int8_t kInside = 2;
MOLEX_DEVICE int8_t side(float a, float bound) {
  if (absolute(a) < bound) return kInside;
  return a > 0.0f ? 1 : (a < 0.0f ? -1 : 0);
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

// Which keys take part in the attention of a row.
struct Mask {
  const uint8_t* mask;
  int length;
  bool causal;

  MOLEX_DEVICE Mask(const Problem& p, int64_t head)
      : mask(p.key_mask ? p.key_mask + head / p.heads * p.length : nullptr),
        length(p.length),
        causal(p.causal) {}

  MOLEX_DEVICE bool exists(int key) const { return key < length && (!mask || mask[key]); }
  MOLEX_DEVICE bool later(int row, int key) const { return causal && key > row; }

  // Whether rows from `row` on attend to all of `count` keys from `key` on.
  MOLEX_DEVICE bool all(int row, int key, int count) const {
    return !mask && key + count <= length && (!causal || key + count <= row + 1);
  }
};

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

// Rows [first, first + rows) of a head's matrix into shared memory, zeros where a token or a column
// does not exist. All threads of the block take part; a barrier has to follow.
template <class E, int D>
MOLEX_DEVICE void load_rows(E* to, const Problem& p, const Tensor4& t, int64_t head, int first, int rows) {
  constexpr int kChunk = 16 / sizeof(E), kChunks = D / kChunk;
  const E* from = head_of<E>(p, t, head);
  const bool aligned =
      p.width % kChunk == 0 && t.row % kChunk == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
  for (int i = device::thread(); i < rows * kChunks; i += device::threads()) {
    const int row = first + i / kChunks, column = i % kChunks * kChunk;
    E* place = to + i / kChunks * kPitch<D> + column;
    const E* source = from + row * t.row + column;
    const bool inside = exists(p, head, row);
    if (aligned && inside && column < p.width) {
      *reinterpret_cast<uint4*>(place) = *reinterpret_cast<const uint4*>(source);
    } else {
      for (int c = 0; c < kChunk; ++c) {
        place[c] = inside && column + c < p.width ? source[c] : device::from_float<E>(0.0f);
      }
    }
  }
}

// `rows` whole rows of a packed matrix into shared memory, asynchronously.
template <class E, int D>
MOLEX_DEVICE void copy_rows(E* to, const E* from, int rows) {
  constexpr int kChunk = 16 / sizeof(E), kChunks = D / kChunk;
  for (int i = device::thread(); i < rows * kChunks; i += device::threads()) {
    device::copy_async(to + i / kChunks * kPitch<D> + i % kChunks * kChunk, from + i * kChunk);
  }
}

// Stores two neighbours of a row at once.
template <class E>
MOLEX_DEVICE void store_pair(E* to, float first, float second) {
  if constexpr (sizeof(E) == 2) {
    *reinterpret_cast<uint32_t*>(to) = device::pack<E>(first, second);
  } else {
    *reinterpret_cast<float2*>(to) = {first, second};
  }
}

template <class E>
MOLEX_DEVICE float2 load_pair(const E* from) {
  if constexpr (sizeof(E) == 2) {
    struct alignas(4) Pair {
      E first, second;
    } const pair = *reinterpret_cast<const Pair*>(from);
    return {device::to_float(pair.first), device::to_float(pair.second)};
  } else {
    return *reinterpret_cast<const float2*>(from);
  }
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
