// Rows of matrices between global memory, shared memory and registers.

#pragma once

#include "cuda/rpc_attention/parameters.cuh"

namespace molex::rpc {

template <class E>
constexpr int kChunk = 16 / sizeof(E);  // elements of 16 bytes

// Whether rows of this many elements, so far apart, are made of whole aligned chunks.
template <class E>
MOLEX_DEVICE bool chunked(const E* from, int64_t stride, int width) {
  return width % kChunk<E> == 0 && stride % kChunk<E> == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
}

// Rows [first, first + rows) of a head's matrix into shared memory, zeros where a token or a column does not
// exist: asynchronously where the matrix is aligned. All threads of the block take part.
template <class E, int D>
MOLEX_DEVICE void load_rows(E* to, const Problem& p, const Tensor4& t, int64_t head, int first, int rows) {
  constexpr int kChunks = D / kChunk<E>;
  static_assert(kWarp % kChunks == 0);  // a thread stays in its column
  const E* from = head_of<E>(p, t, head);
  const int column = device::thread() % kChunks * kChunk<E>, step = device::threads() / kChunks;
  int row = device::thread() / kChunks;
  E* place = to + row * kPitch<D> + column;
  const E* source = from + (first + row) * t.row + column;
  if (chunked(from, t.row, p.width)) {
    MOLEX_UNROLL_BY(4) for (; row < rows; row += step) {
      const bool reads = exists(p, head, first + row) && column < p.width;
      device::copy_async_or_zero(place, reads ? source : from, reads);
      place += step * kPitch<D>;
      source += step * t.row;
    }
    return;
  }
  MOLEX_NO_UNROLL for (; row < rows; row += step) {
    const bool inside = exists(p, head, first + row);
    MOLEX_NO_UNROLL for (int c = 0; c < kChunk<E>; ++c) {
      place[c] = inside && column + c < p.width ? source[c] : device::from_float<E>(0.0f);
    }
    place += step * kPitch<D>;
    source += step * t.row;
  }
}

// `Rows` whole rows of a packed matrix into shared memory, asynchronously, by the block's `Threads`.
template <class E, int D, int Rows, int Threads>
MOLEX_DEVICE void copy_rows(E* to, const E* from) {
  constexpr int kChunks = D / kChunk<E>, kStep = Threads / kChunks, kTurns = Rows / kStep;
  static_assert(Threads % kChunks == 0);
  const int row = device::thread() / kChunks, column = device::thread() % kChunks * kChunk<E>;
  to += row * kPitch<D> + column;
  from += row * D + column;
  MOLEX_UNROLL for (int i = 0; i < kTurns; ++i) {
    device::copy_async(to + i * kStep * kPitch<D>, from + i * kStep * D);
  }
  if (Rows % kStep && row < Rows % kStep) {
    device::copy_async(to + kTurns * kStep * kPitch<D>, from + kTurns * kStep * D);
  }
}

// `Count` numbers into shared memory, asynchronously, by the first threads.
template <int Count, class T>
MOLEX_DEVICE void copy_numbers(T* to, const T* from) {
  constexpr int kChunks = Count * sizeof(T) / 16;
  static_assert(kChunks * 16 == Count * sizeof(T));
  const int i = device::thread();
  if (i < kChunks)
    device::copy_async(reinterpret_cast<uint4*>(to) + i, reinterpret_cast<const uint4*>(from) + i);
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

// Two neighbours in one word.
template <class E>
MOLEX_DEVICE float2 unpack(uint32_t word) {
  return load_pair(reinterpret_cast<const E*>(&word));
}

// A pair of a row [d], of which `within` exist and the others are 0.
template <class E>
MOLEX_DEVICE float2 load_within(const E* from, int within, bool even) {
  if (even && within > 0) return load_pair(from);
  return {within > 0 ? device::to_float(from[0]) : 0.0f, within > 1 ? device::to_float(from[1]) : 0.0f};
}

// Sixteen rows of an accumulator by way of this warp's rows of shared memory to `to`, whose rows are made of
// aligned chunks, 16 bytes at once; `rows` and `width` of them exist there. Of what stood in shared memory
// a lane may have read what it overwrites, by itself or with its warp.
template <class E, int D>
MOLEX_DEVICE void store_rows(
    E* to, int64_t stride, const float (&c)[D / 8][4], E* shared, int rows, int width) {
  constexpr int kChunks = D / kChunk<E>, kTurns = 16 * kChunks / kWarp;
  E* mine = shared + lane_row() * kPitch<D> + lane_column();
  MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
    store_pair(mine + 8 * n, c[n][0], c[n][1]);
    store_pair(mine + 8 * kPitch<D> + 8 * n, c[n][2], c[n][3]);
  }
  device::sync_warp();
  const int row = lane() / kChunks, column = lane() % kChunks * kChunk<E>;
  if (column >= width) return;
  constexpr int kStep = kWarp / kChunks;
  to += row * stride + column;
  shared += row * kPitch<D> + column;
  MOLEX_UNROLL for (int i = 0; i < kTurns; ++i) {
    if (row + i * kStep < rows) {
      *reinterpret_cast<uint4*>(to + i * kStep * stride) =
          *reinterpret_cast<const uint4*>(shared + i * kStep * kPitch<D>);
    }
  }
}

// Eight neighbours of a row, what a thread takes of an element-wise pass.
constexpr int kOctet = 8;
template <class T>
struct alignas(sizeof(T) == 1 ? 8 : 16) Octet {
  T x[kOctet];
};

// Those of a row from `from` on, of which `left` exist and the others are 0; `whole` where they can be
// loaded at once.
template <class T>
MOLEX_DEVICE Octet<T> load_octet(const T* from, bool whole, int left) {
  Octet<T> result = {};
  if (whole) {
    if (left > 0) result = *reinterpret_cast<const Octet<T>*>(from);
    return result;
  }
  MOLEX_UNROLL for (int i = 0; i < kOctet; ++i) {
    if (i < left) result.x[i] = from[i];
  }
  return result;
}

template <class T>
MOLEX_DEVICE bool whole_octets(const T* from, int64_t stride, int width) {
  return chunked(from, stride, width) && width % kOctet == 0;
}

template <class E>
MOLEX_DEVICE void store_octet(E* to, const float (&x)[kOctet]) {
  if constexpr (sizeof(E) == 2) {
    *reinterpret_cast<uint4*>(to) = {device::pack<E>(x[0], x[1]),
                                     device::pack<E>(x[2], x[3]),
                                     device::pack<E>(x[4], x[5]),
                                     device::pack<E>(x[6], x[7])};
  } else {
    Octet<float> values;
    MOLEX_UNROLL for (int i = 0; i < kOctet; ++i) values.x[i] = x[i];
    *reinterpret_cast<Octet<float>*>(to) = values;
  }
}

// Where a thread of an element-wise pass over padded matrices [B * H, padded_rows, D] stands: a block takes
// rows of one head.
template <int D, int Threads>
struct Place {
  static constexpr int kRows = Threads / (D / kOctet);
  static_assert(kRowsMultiple % kRows == 0);
  int64_t head, offset;    // of its octet in such a matrix
  int first, row, column;  // of the block, and this thread's

  MOLEX_DEVICE explicit Place(const Problem& p) {
    const int rows = static_cast<int>(padded_rows(p)), blocks = rows / kRows;
    const int of_head = device::block() / blocks;
    head = of_head;
    first = (device::block() - of_head * blocks) * kRows;
    row = first + device::thread() / (D / kOctet);
    column = device::thread() % (D / kOctet) * kOctet;
    offset = (head * rows + row) * D + column;
  }

  static int64_t blocks(const Problem& p) { return p.all_heads() * (padded_rows(p) / kRows); }
};

// Sixteen rows from `row` on of a tensor [B, H, N, d], from an accumulator. In 16 bits `shared` is used as by
// store_rows; in fp32 four lanes fill whole sectors by themselves.
template <int D, class T, class E>
MOLEX_DEVICE void store_tile(
    const Problem& p, T* tensor, int64_t head, int row, const float (&c)[D / 8][4], E* shared) {
  tensor += (head * p.length + row) * p.width;
  if constexpr (sizeof(T) == 2) {
    if (chunked(tensor, p.width, p.width)) {
      return store_rows<E, D>(tensor, p.width, c, shared, p.length - row, p.width);
    }
  }
  const int within = p.width - device::opaque(lane_column());  // compared here, not ahead of a loop
  MOLEX_UNROLL for (int i = 0; i < 2; ++i) {
    const int mine = lane_row() + 8 * i;
    if (row + mine >= p.length) continue;
    T* at = tensor + mine * p.width + lane_column();
    if (p.width % 2 == 0) {
      MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
        if (8 * n < within) store_pair(at + 8 * n, c[n][2 * i], c[n][2 * i + 1]);
      }
    } else {
      MOLEX_UNROLL for (int n = 0; n < D / 8; ++n) {
        if (8 * n < within) at[8 * n] = device::from_float<T>(c[n][2 * i]);
        if (8 * n + 1 < within) at[8 * n + 1] = device::from_float<T>(c[n][2 * i + 1]);
      }
    }
  }
}

}  // namespace molex::rpc
