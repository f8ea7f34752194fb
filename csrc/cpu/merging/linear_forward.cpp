// The merged linear layer's forward pass on a CPU. A thread merges some rows of the weight for a few segments
// and multiplies with them at once, so that merged weights never leave a cache. Segments that need the same
// rows follow one another, so that the deltas are read from memory once.

#include <algorithm>
#include <vector>

#include "cpu/common/gemm.h"
#include "cpu/common/matmul.h"
#include "cpu/common/memory.h"
#include "cpu/common/tile_product.h"
#include "cpu/merging/tile_forward.h"
#include "registration.h"

namespace {

using molex::Arena;
using molex::AsFloats;
using molex::Matrix;
using molex::Piece;
using molex::Source;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSegments = 4;  // segments whose weights are merged together
constexpr int64_t kChunk = 512;   // elements of a weight that every expert contributes to at a time

// The same in bf16 on matrix tiles.
void forward_on_tiles(const Tensor& x,
                      const Tensor& base,
                      const Tensor& deltas,
                      const Tensor& gates,
                      const std::optional<Tensor>& bias,
                      Tensor& y) {
  const Tensor rows = torch::stable::contiguous(x), start = torch::stable::contiguous(base);
  const Tensor from = torch::stable::contiguous(deltas);
  const std::vector<float> gate = molex::floats_of(gates), shift = molex::floats_of(bias);
  const auto bits = [](const Tensor& tensor) {
    return static_cast<const uint16_t*>(tensor.const_data_ptr());
  };
  molex::merging::forward_on_tiles({bits(rows),
                                    bits(start),
                                    bits(from),
                                    gate.data(),
                                    bias ? shift.data() : nullptr,
                                    static_cast<uint16_t*>(y.mutable_data_ptr()),
                                    x.size(0),
                                    x.size(1),
                                    x.size(2),
                                    base.size(0),
                                    deltas.size(0)});
}

// y_s = x_s (base + sum_e gates_se deltas_e)^T + bias_s. x [S, T, D].
Tensor camex_linear_fwd(const Tensor& x,
                        const Tensor& base,
                        const Tensor& deltas,
                        const Tensor& gates,
                        std::optional<Tensor> bias) {
  const int64_t segments = x.size(0), tokens = x.size(1), width = x.size(2), columns = base.size(0);
  const int64_t count = deltas.size(0), size = columns * width;
  Tensor y = molex::new_result(x, {segments, tokens, columns});
  if (x.scalar_type() == ScalarType::BFloat16 && y.numel() > 0 && width > 0 && molex::has_tiles()) {
    forward_on_tiles(x, base, deltas, gates, bias, y);
    return y;
  }
  const AsFloats from_base(base), from_deltas(deltas), from_gates(gates);
  const float *start = from_base.data(), *from = from_deltas.data(), *gate = from_gates.data();
  const Tensor kept = torch::stable::contiguous(x);
  const std::optional<Tensor> packed = molex::packed(bias);
  const Source rows = molex::source_of(kept), biases = molex::source_of(packed);
  const molex::Target to = molex::target_of(y);
  // Products are written straight to y if both are fp32.
  const ScalarType dtype = molex::product_dtype(rows.dtype);
  const bool direct = rows.dtype == ScalarType::Float, widens = dtype != rows.dtype,
             narrows = dtype != ScalarType::Float;
  const std::vector<Piece> pieces = molex::parts_of(0, 0, columns, molex::kPiece);
  int64_t tallest = 0;
  for (const Piece& piece : pieces) tallest = std::max(tallest, piece.rows);
  const int64_t bytes = Arena::bytes(kSegments * tallest * width) +
                        Arena::bytes(narrows ? tallest * width : 0, dtype) +
                        Arena::bytes(widens ? tokens * width : 0) +
                        Arena::bytes(direct ? 0 : tokens * tallest, dtype) + 2 * Arena::bytes(tallest);
  const int64_t groups = (segments + kSegments - 1) / kSegments, tasks = pieces.size() * groups;
  const auto work = [&](const auto& next) {
    molex::Multiplier products(rows.dtype);
    Arena arena(bytes);
    float* const merged = arena.floats(kSegments * tallest * width);
    const Matrix narrow = arena.matrix(narrows ? tallest : 0, width, dtype);
    const Matrix fp32 = arena.matrix(widens ? tokens : 0, width, ScalarType::Float);
    const Matrix product = arena.matrix(direct ? 0 : tokens, tallest, dtype);
    float *bias_scratch = arena.floats(tallest), *row_scratch = arena.floats(tallest);
    for (int64_t index = next(); index < tasks; index = next()) {
      const int64_t first = pieces[index / groups].first, height = pieces[index / groups].rows;
      const int64_t group = index % groups * kSegments, members = std::min(kSegments, segments - group);
      const int64_t part = height * width;
      for (int64_t at = 0; at < part; at += kChunk) {
        const int64_t length = std::min(kChunk, part - at), there = first * width + at;
        for (int64_t s = 0; s < members; ++s) std::copy_n(start + there, length, merged + s * part + at);
        molex::product({gate + group * count,
                        count,
                        from + there,
                        size,
                        merged + at,
                        part,
                        members,
                        length,
                        count,
                        true});
      }
      for (int64_t s = group; s < group + members; ++s) {
        Matrix weight = molex::matrix_of(merged + (s - group) * part, ScalarType::Float, height, width);
        if (narrows) {
          molex::write(narrow.target(), 0, part, merged + (s - group) * part);
          weight = narrow.band(0, height);
        }
        Matrix rows_of_segment =
            molex::matrix_of(const_cast<void*>(rows.data), rows.dtype, segments * tokens, width)
                .band(s * tokens, tokens);
        if (widens) {
          molex::read(rows, s * tokens * width, tokens * width, static_cast<float*>(fp32.data));
          rows_of_segment = fp32;
        }
        const int64_t corner = s * tokens * columns + first;
        const Matrix out = direct
                               ? Matrix{static_cast<float*>(to.data) + corner, dtype, tokens, height, columns}
                               : molex::matrix_of(product.data, dtype, tokens, height);
        products(out, rows_of_segment, weight.transposed());
        if (direct && !biases) continue;
        const float* shift =
            biases ? molex::read(biases, s * columns + first, height, bias_scratch) : nullptr;
        for (int64_t t = 0; t < tokens; ++t) {
          float* row = const_cast<float*>(molex::read(out.source(), t * out.row_stride, height, row_scratch));
          if (shift) molex::add(row, shift, height);
          molex::write(to, corner + t * columns, height, row);
        }
      }
    }
  };
  molex::share(tasks, work, !molex::multiplies_on_tiles(rows.dtype));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("camex_linear_fwd", molex::cpu_kernel<&camex_linear_fwd>);
}
