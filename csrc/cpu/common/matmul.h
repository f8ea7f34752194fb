// Matrix products by ATen's BLAS, which any thread may call, and tasks that threads share.

#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "cpu/common/rows.h"

namespace molex {

// Calls body(next) on every thread. `next()` gives the number of a task that is still to be done; the body
// stops when it gets `tasks` or more. If there are fewer tasks than threads, one thread does them all outside
// a parallel region, so that the BLAS may share each product among the threads, unless there is no BLAS.
template <class Body>
void share(int64_t tasks, const Body& body, bool uses_blas = true) {
  std::atomic<int64_t> taken{0};
  const auto next = [&] { return taken.fetch_add(1, std::memory_order_relaxed); };
  const int64_t threads = torch::stable::get_num_threads();
  if (tasks < threads && (uses_blas || tasks < 2)) {
    body(next);
  } else {
    torch::stable::parallel_for(0, std::min(tasks, threads), 1, [&](int64_t, int64_t) { body(next); });
  }
}

// Consecutive rows of one expert (or of another owner) that are one task.
struct Piece {
  int64_t expert, first, rows;
};

// Cuts [0, count) into equal parts of about `size`; at least one unless it is empty.
inline std::vector<Piece> parts_of(int64_t expert, int64_t start, int64_t count, int64_t size) {
  const int64_t parts = count ? std::max<int64_t>(1, (count + size / 2) / size) : 0;
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t first = i * count / parts;
    pieces.push_back({expert, start + first, (i + 1) * count / parts - first});
  }
  return pieces;
}

// This many rows use the BLAS well and still fit in a core's cache.
constexpr int64_t kPiece = 128;

inline int64_t size_of(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; }

// Whether ATen multiplies bf16 by oneDNN, which on x86 asks for AVX-512. Its own loops take about seven times
// as long as a product in fp32.
inline bool multiplies_bf16() {
#if defined(__x86_64__)
  static const bool kHas = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512vl");
  return kHas;
#else
  return true;
#endif
}

// The dtype in which products are computed: fp32 for a dtype of which there is no fast product, else the
// dtype itself.
inline ScalarType product_dtype(ScalarType dtype) {
  const bool is_slow = dtype == ScalarType::Half || (dtype == ScalarType::BFloat16 && !multiplies_bf16());
  return is_slow ? ScalarType::Float : dtype;
}

// A matrix in memory that something else owns.
struct Matrix {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t rows = 0, columns = 0, row_stride = 0, column_stride = 1;

  Matrix transposed() const { return {data, dtype, columns, rows, column_stride, row_stride}; }

  Matrix band(int64_t first, int64_t count) const {
    char* start = static_cast<char*>(data) + first * row_stride * size_of(dtype);
    return {start, dtype, count, columns, row_stride, column_stride};
  }

  Matrix some_columns(int64_t first, int64_t count) const {
    return transposed().band(first, count).transposed();
  }

  Source source() const { return {data, dtype}; }
  Target target() const { return {data, dtype}; }

  Tensor tensor() const {
    const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
    return torch::stable::from_blob(
        data, sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
  }
};

inline Matrix matrix_of(void* data, ScalarType dtype, int64_t rows, int64_t columns) {
  return {data, dtype, rows, columns, columns};
}

// A contiguous tensor as rows of `columns` elements.
inline Matrix matrix_of(Tensor& tensor, int64_t columns) {
  return matrix_of(
      tensor.mutable_data_ptr(), tensor.scalar_type(), columns ? tensor.numel() / columns : 0, columns);
}

// Fills the rows from `first` on with zeros.
inline void clear_rows(const Matrix& to, int64_t first) {
  if (to.columns == 0) return;
  for (int64_t row = first; row < to.rows; ++row) {
    std::memset(to.band(row, 1).data, 0, to.columns * size_of(to.dtype));
  }
}

// out = a b; out has contiguous rows.
inline void multiply(const Matrix& out, const Matrix& a, const Matrix& b) {
  if (out.rows == 0 || out.columns == 0) return;
  if (a.columns == 0) return clear_rows(out, 0);
  const Tensor to = out.tensor(), a_tensor = a.tensor(), b_tensor = b.tensor();
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(to.get(), a_tensor.get(), b_tensor.get()));
}

// A copy of a matrix with any strides in `to`, as floats; one that is stored by columns is copied by columns.
inline Matrix in_floats(const Matrix& m, void* to) {
  if (m.row_stride == 1 && m.column_stride != 1) return in_floats(m.transposed(), to).transposed();
  const Matrix copy = matrix_of(to, ScalarType::Float, m.rows, m.columns);
  float* row = static_cast<float*>(to);
  const int64_t step = m.column_stride;
  for (int64_t r = 0; r < m.rows; ++r, row += m.columns) {
    const int64_t at = r * m.row_stride;
    if (m.dtype == ScalarType::Float && step == 1) {
      std::memcpy(row, static_cast<const float*>(m.data) + at, m.columns * sizeof(float));
    } else if (step == 1) {
      read(m.source(), at, m.columns, row);
    } else {
      for (int64_t c = 0; c < m.columns; ++c) row[c] = *read(m.source(), at + c * step, 1, row + c);
    }
  }
  return copy;
}

// Uninitialised memory of one thread, given out in pieces that start on cache lines.
class Arena {
 public:
  static constexpr int64_t kLine = 64;
  static int64_t bytes(int64_t elements, ScalarType dtype = ScalarType::Float) {
    return (elements * size_of(dtype) + kLine - 1) / kLine * kLine;
  }

  explicit Arena(int64_t bytes)
      : data_(static_cast<char*>(::operator new(bytes, std::align_val_t(kLine)))), next_(data_.get()) {}

  Matrix matrix(int64_t rows, int64_t columns, ScalarType dtype) {
    char* const start = next_;
    next_ += bytes(rows * columns, dtype);
    return matrix_of(start, dtype, rows, columns);
  }

  // Gives all of it out again.
  void clear() { next_ = data_.get(); }

  float* floats(int64_t count) { return static_cast<float*>(matrix(1, count, ScalarType::Float).data); }

 private:
  struct Free {
    void operator()(char* data) const { ::operator delete(data, std::align_val_t(kLine)); }
  };
  std::unique_ptr<char, Free> data_;
  char* next_;
};

}  // namespace molex
