// Merging on a CPU: the curvature's four products in the cache, the merge of a few segments' weights, and
// what the gradient of those weights sends on.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "memory.h"
#include "rows.h"

namespace {

using molex::Floats;
using molex::load;
using molex::product;
using molex::Source;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 512;    // elements of a weight that every expert contributes to in one turn
constexpr int64_t kColumns = 384;  // of the last product, whose rows are o2 D apart
constexpr int kLanes = 8;

MOLEX_CLONES void subtract(const float* a, const float* b, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = a[i] - b[i];
}

MOLEX_CLONES void add_difference(const float* a, const float* b, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] += a[i] - b[i];
}

MOLEX_INLINE float sign(float x) { return (x > 0.0f ? 1.0f : 0.0f) - (x < 0.0f ? 1.0f : 0.0f); }

MOLEX_CLONES void signs(float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = sign(x[i]);
}

// out is kept where tau = expert - base has the sign of the majority, else 0.
MOLEX_CLONES void keep_ties(
    const float* expert, const float* base, const float* majority, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = sign(expert[i] - base[i]) == majority[i] ? out[i] : 0.0f;
}

// Memory of a weight or of all experts, read as floats.
class Reader {
 public:
  explicit Reader(const Tensor& tensor)
      : kept_(torch::stable::contiguous(tensor)), source_(molex::source_of(kept_)) {}
  const float* operator()(int64_t first, int64_t count, std::vector<float>& scratch) const {
    if (source_.dtype != ScalarType::Float && scratch.size() < static_cast<size_t>(count))
      scratch.resize(count);
    return molex::read(source_, first, count, scratch.data());
  }

 private:
  Tensor kept_;
  Source source_;
};

int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

// The sign of sum_e (experts_e - base), summed in the order of e: [O, D] fp32.
Tensor camex_majority_cpu(const Tensor& base, const Tensor& experts) {
  const int64_t size = base.numel(), count = experts.size(0);
  const Reader from(experts), start(base);
  Tensor result = torch::stable::new_zeros(base, base.sizes(), ScalarType::Float);
  float* out = result.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, chunks_of(size), 16, [&](int64_t begin, int64_t end) {
    std::vector<float> one, two;
    for (int64_t first = begin * kChunk; first < std::min(end * kChunk, size); first += kChunk) {
      const int64_t length = std::min(kChunk, size - first);
      const float* zero = start(first, length, one);
      for (int64_t e = 0; e < count; ++e) {
        add_difference(from(e * size + first, length, two), zero, out + first, length);
      }
      signs(out + first, length);
    }
  });
  return result;
}

// Delta_e = mask_e M_e (experts_e - base) in fp32. Factors are [r, E, m, m] fp32, in1 and in2 such that a row
// of tau, seen as [d1, d2], becomes in1 row in2: in2 is given transposed.
Tensor camex_deltas_cpu(const Tensor& base,
                        const Tensor& experts,
                        std::optional<Tensor> out1,
                        std::optional<Tensor> out2,
                        std::optional<Tensor> in1,
                        std::optional<Tensor> in2,
                        std::optional<Tensor> majority) {
  const int64_t count = experts.size(0), rows = base.size(0), width = base.size(1), size = rows * width;
  const Reader from(experts), start(base);
  Tensor result = molex::new_result(experts, experts.sizes(), ScalarType::Float);
  if (size == 0) return result;
  float* out = result.mutable_data_ptr<float>();
  const std::optional<Tensor> most = molex::packed(majority);
  const float* ties = most ? most->const_data_ptr<float>() : nullptr;
  if (!out1 || !out2 || !in1 || !in2) {
    torch::stable::parallel_for(0, chunks_of(size), 16, [&](int64_t begin, int64_t end) {
      std::vector<float> one, two;
      for (int64_t first = begin * kChunk; first < std::min(end * kChunk, size); first += kChunk) {
        const int64_t length = std::min(kChunk, size - first);
        const float* zero = start(first, length, one);
        for (int64_t e = 0; e < count; ++e) {
          const float* expert = from(e * size + first, length, two);
          float* to = out + e * size + first;
          subtract(expert, zero, to, length);
          if (ties) keep_ties(expert, zero, ties + first, to, length);
        }
      }
    });
    return result;
  }
  const Tensor kept[] = {torch::stable::contiguous(*out1),
                         torch::stable::contiguous(*out2),
                         torch::stable::contiguous(*in1),
                         torch::stable::contiguous(*in2)};
  const int64_t ranks = out1->size(0);
  const int64_t o1 = out1->size(3), o2 = out2->size(3), d1 = in1->size(3), d2 = in2->size(3);
  const auto factor = [&](int which, int64_t rank, int64_t e) {
    const int64_t side = kept[which].size(3);
    return kept[which].const_data_ptr<float>() + (rank * count + e) * side * side;
  };
  const int64_t block = o2 * width, pieces = (block + kColumns - 1) / kColumns;
  Tensor between = molex::new_result(experts, experts.sizes(), ScalarType::Float);
  float* half = between.mutable_data_ptr<float>();
  for (int64_t rank = 0; rank < ranks; ++rank) {
    // in2, in1 and out2 touch one block of o2 rows.
    torch::stable::parallel_for(0, count * o1, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> one, two, tau(width), turned(width), inner(block);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t e = item / o1, first = item % o1 * block;
        for (int64_t row = 0; row < o2; ++row) {
          const int64_t at = first + row * width;
          subtract(from(e * size + at, width, two), start(at, width, one), tau.data(), width);
          product(tau.data(), d2, factor(3, rank, e), d2, turned.data(), d2, d1, d2, d2, false);
          product(
              factor(2, rank, e), d1, turned.data(), d2, inner.data() + row * width, d2, d1, d2, d1, false);
        }
        product(factor(1, rank, e),
                o2,
                inner.data(),
                width,
                half + e * size + first,
                width,
                o2,
                width,
                o2,
                false);
      }
    });
    // out1 goes across the blocks, some columns at a time.
    torch::stable::parallel_for(0, count * pieces, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> one, two;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t e = item / pieces, column = item % pieces * kColumns;
        const int64_t length = std::min(kColumns, block - column);
        float* to = out + e * size + column;
        const float* right = half + e * size + column;
        product(factor(0, rank, e), o1, right, block, to, block, o1, length, o1, rank > 0);
        if (!ties || rank + 1 < ranks) continue;
        for (int64_t row = 0; row < o1; ++row) {
          const int64_t at = row * block + column;
          const float* expert = from(e * size + at, length, two);
          keep_ties(expert, start(at, length, one), ties + at, to + row * block, length);
        }
      }
    });
  }
  return result;
}

// out[r * ldo + c] = <a_r, b_c>, with ROWS x COLUMNS of them held in registers, in kLanes partial sums each.
template <int ROWS, int COLUMNS>
MOLEX_INLINE void dots_tile(
    const float* a, int64_t lda, const float* b, int64_t ldb, float* out, int64_t ldo, int64_t length) {
  Floats<kLanes> sum[ROWS][COLUMNS] = {};
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    Floats<kLanes> right[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) right[c] = load<kLanes>(b + c * ldb + i);
    for (int r = 0; r < ROWS; ++r) {
      const Floats<kLanes> left = load<kLanes>(a + r * lda + i);
      for (int c = 0; c < COLUMNS; ++c) sum[r][c] += left * right[c];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < COLUMNS; ++c) {
      float total = 0.0f;
      for (int lane = 0; lane < kLanes; ++lane) total += sum[r][c][lane];
      for (int64_t j = i; j < length; ++j) total += a[r * lda + j] * b[c * ldb + j];
      out[r * ldo + c] = total;
    }
  }
}

template <int ROWS>
MOLEX_INLINE void dots_rows(const float* a,
                            int64_t lda,
                            const float* b,
                            int64_t ldb,
                            float* out,
                            int64_t ldo,
                            int64_t columns,
                            int64_t length) {
  int64_t c = 0;
  for (; c + 3 <= columns; c += 3) dots_tile<ROWS, 3>(a, lda, b + c * ldb, ldb, out + c, ldo, length);
  for (; c < columns; ++c) dots_tile<ROWS, 1>(a, lda, b + c * ldb, ldb, out + c, ldo, length);
}

// out [rows, columns] = a [rows, length] b [columns, length]^T, row-major.
MOLEX_CLONES void dots(const float* a,
                       int64_t lda,
                       const float* b,
                       int64_t ldb,
                       float* out,
                       int64_t ldo,
                       int64_t rows,
                       int64_t columns,
                       int64_t length) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    dots_rows<4>(a + r * lda, lda, b, ldb, out + r * ldo, ldo, columns, length);
  }
  for (; r < rows; ++r) dots_rows<1>(a + r * lda, lda, b, ldb, out + r * ldo, ldo, columns, length);
}

const float* floats(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(),
                  "expected a contiguous float32 tensor");
  return tensor.const_data_ptr<float>();
}

// out_s = base + sum_e gates_se deltas_e for a few segments: out [G, O D], all fp32 and contiguous.
void camex_merge_cpu(const Tensor& base, const Tensor& deltas, const Tensor& gates, Tensor out) {
  const int64_t segments = gates.size(0), count = gates.size(1), size = base.numel();
  const float *start = floats(base), *from = floats(deltas), *gate = floats(gates);
  floats(out);
  float* to = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, chunks_of(size), 8, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kChunk; first < std::min(end * kChunk, size); first += kChunk) {
      const int64_t length = std::min(kChunk, size - first);
      for (int64_t s = 0; s < segments; ++s) std::copy_n(start + first, length, to + s * size + first);
      product(gate, count, from + first, size, to + first, size, segments, length, count, true);
    }
  });
}

// What the weights' gradients dweights [G, O D] of a few segments add to those of the base and the deltas,
// and the gates' gradient <dweights_s, deltas_e> [G, E]. All fp32 and contiguous; the sums do not depend on
// the number of threads.
Tensor camex_merge_bwd_cpu(const Tensor& dweights,
                           const Tensor& deltas,
                           const Tensor& gates,
                           std::optional<Tensor> dbase,
                           std::optional<Tensor> ddeltas,
                           bool needs_gates) {
  const int64_t segments = gates.size(0), count = gates.size(1);
  const int64_t size = segments ? dweights.numel() / segments : 0, chunks = chunks_of(size);
  const float *from = floats(dweights), *with = floats(deltas), *gate = floats(gates);
  float* to_base = dbase ? dbase->mutable_data_ptr<float>() : nullptr;
  float* to_deltas = ddeltas ? ddeltas->mutable_data_ptr<float>() : nullptr;
  const int64_t pairs = needs_gates ? segments * count : 0;
  std::vector<float> partial(chunks * pairs), columns(count * segments);
  for (int64_t s = 0; s < segments; ++s) {
    for (int64_t e = 0; e < count; ++e) columns[e * segments + s] = gate[s * count + e];
  }
  const std::vector<float> ones(segments, 1.0f);
  torch::stable::parallel_for(0, chunks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk, length = std::min(kChunk, size - first);
      const float* here = from + first;
      if (to_base) product(ones.data(), 0, here, size, to_base + first, 0, 1, length, segments, true);
      if (to_deltas) {
        float* mine = to_deltas + first;
        product(columns.data(), segments, here, size, mine, size, count, length, segments, true);
      }
      if (needs_gates) {
        dots(here, size, with + first, size, &partial[chunk * pairs], count, segments, count, length);
      }
    }
  });
  Tensor result = molex::new_result(gates, {needs_gates ? segments : 0, count}, ScalarType::Float);
  std::vector<double> sums(pairs, 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < pairs; ++i) sums[i] += partial[chunk * pairs + i];
  }
  std::copy(sums.begin(), sums.end(), result.mutable_data_ptr<float>());
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("camex_majority_cpu", TORCH_BOX(&camex_majority_cpu));
  library.impl("camex_deltas_cpu", TORCH_BOX(&camex_deltas_cpu));
  library.impl("camex_merge_cpu", TORCH_BOX(&camex_merge_cpu));
  library.impl("camex_merge_bwd_cpu", TORCH_BOX(&camex_merge_bwd_cpu));
}
