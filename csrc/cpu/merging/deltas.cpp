// What each expert adds to the base, on a CPU, and its gradients. Experts are processed one by one, so that
// the intermediate results of the curvature's products stay in the cache.

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/common/gemm.h"
#include "cpu/common/memory.h"
#include "cpu/common/rows.h"
#include "registration.h"

namespace {

using molex::product;
using molex::product_inner;
using molex::product_transposed;
using molex::Source;
using molex::Target;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kChunk = 512;    // elements that every expert contributes to at a time
constexpr int64_t kColumns = 384;  // columns of one product with out1, whose rows are o2 D apart

constexpr auto subtract =
    molex::versions([](auto, const float* a, const float* b, float* out, int64_t count) MOLEX_LAMBDA_INLINE {
      for (int64_t i = 0; i < count; ++i) out[i] = a[i] - b[i];
    });

constexpr auto add_difference =
    molex::versions([](auto, const float* a, const float* b, float* out, int64_t count) MOLEX_LAMBDA_INLINE {
      for (int64_t i = 0; i < count; ++i) out[i] += a[i] - b[i];
    });

MOLEX_INLINE float sign(float x) { return (x > 0.0f ? 1.0f : 0.0f) - (x < 0.0f ? 1.0f : 0.0f); }

constexpr auto signs = molex::versions([](auto, float* x, int64_t count) MOLEX_LAMBDA_INLINE {
  for (int64_t i = 0; i < count; ++i) x[i] = sign(x[i]);
});

// out = x where tau = expert - base has the sign of the majority, else 0.
constexpr auto keep_ties = molex::versions([](auto,
                                              const float* expert,
                                              const float* base,
                                              const float* majority,
                                              const float* x,
                                              float* out,
                                              int64_t count) MOLEX_LAMBDA_INLINE {
  for (int64_t i = 0; i < count; ++i) out[i] = sign(expert[i] - base[i]) == majority[i] ? x[i] : 0.0f;
});

template <class Body>
void for_chunks(int64_t size, const Body& body) {
  torch::stable::parallel_for(0, (size + kChunk - 1) / kChunk, 16, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kChunk; first < std::min(end * kChunk, size); first += kChunk) {
      body(first, std::min(kChunk, size - first));
    }
  });
}

// The base [O, D], the experts [E, O, D] and the sign mask, read as floats. Holds the tensors that it points
// into.
class Weights {
 public:
  Weights(const Tensor& base, const Tensor& experts, bool ties)
      : base_(torch::stable::contiguous(base)),
        experts_(torch::stable::contiguous(experts)),
        start_(molex::source_of(base_)),
        from_(molex::source_of(experts_)),
        size_(base.numel()),
        count_(experts.size(0)) {
    if (ties) find_majority();
  }

  int64_t size() const { return size_; }
  int64_t count() const { return count_; }

  // Writes some elements of tau_e.
  void tau(int64_t e, int64_t first, int64_t length, float* out) const {
    std::vector<float> scratch;
    const float* zero = read(start_, first, length, scratch);
    subtract(molex::read(from_, e * size_ + first, length, out), zero, out, length);
  }

  // out = x under the mask of expert e.
  void mask(int64_t e, int64_t first, int64_t length, const float* x, float* out) const {
    std::vector<float> one, two;
    const float *zero = read(start_, first, length, one),
                *expert = read(from_, e * size_ + first, length, two);
    keep_ties(expert, zero, majority_.data() + first, x, out, length);
  }

 private:
  static const float* read(const Source& source, int64_t first, int64_t length, std::vector<float>& scratch) {
    if (source.dtype != ScalarType::Float) scratch.resize(length);
    return molex::read(source, first, length, scratch.data());
  }

  // The sign of sum_e tau_e, summed in the order of e.
  void find_majority() {
    majority_.assign(size_, 0.0f);
    for_chunks(size_, [&](int64_t first, int64_t length) {
      std::vector<float> one, two;
      const float* zero = read(start_, first, length, one);
      float* sum = majority_.data() + first;
      for (int64_t e = 0; e < count_; ++e) {
        add_difference(read(from_, e * size_ + first, length, two), zero, sum, length);
      }
      signs(sum, length);
    });
  }

  Tensor base_, experts_;
  Source start_, from_;
  int64_t size_, count_;
  std::vector<float> majority_;
};

// The curvature's factors [r, E, m, m] as floats. O = o1 o2 and D = d1 d2; a block is o2 rows of a weight.
class Factors {
 public:
  Factors(const Tensor& first, const Tensor& second, const Tensor& third, const Tensor& fourth)
      : ranks(first.size(0)),
        o1(first.size(3)),
        o2(second.size(3)),
        d1(third.size(3)),
        d2(fourth.size(3)),
        width(d1 * d2),
        block(o2 * width),
        experts_(first.size(1)) {
    const Tensor* given[] = {&first, &second, &third, &fourth};
    for (int i = 0; i < 4; ++i) values_[i] = molex::floats_of(*given[i]);
    transposed_.resize(values_[3].size());
    const int64_t area = d2 * d2;
    for (int64_t i = 0; i < ranks * experts_; ++i)
      transpose(in2(0, 0) + i * area, d2, d2, transposed_.data() + i * area);
  }

  const int64_t ranks, o1, o2, d1, d2, width, block;

  int64_t side(int i) const { return (const int64_t[]){o1, o2, d1, d2}[i]; }
  const float* out1(int64_t rank, int64_t e) const { return at(0, rank, e); }
  const float* out2(int64_t rank, int64_t e) const { return at(1, rank, e); }
  const float* in1(int64_t rank, int64_t e) const { return at(2, rank, e); }
  const float* in2(int64_t rank, int64_t e) const { return at(3, rank, e); }
  const float* in2_transposed(int64_t rank, int64_t e) const {
    return transposed_.data() + (rank * experts_ + e) * d2 * d2;
  }

  // For a block tau: by_in2 is the product of in2 with its last index, by_in1 that of in1 with the index
  // before.
  void inner(int64_t rank, int64_t e, const float* tau, float* by_in2, float* by_in1) const {
    product({tau, d2, in2_transposed(rank, e), d2, by_in2, d2, o2 * d1, d2, d2, false});
    for (int64_t at = 0; at < block; at += width) {
      product({in1(rank, e), d1, by_in2 + at, d2, by_in1 + at, d2, d1, d2, d1, false});
    }
  }

  // Writes the transpose of a matrix [rows, columns].
  static void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
    }
  }

 private:
  const float* at(int i, int64_t rank, int64_t e) const {
    return values_[i].data() + (rank * experts_ + e) * side(i) * side(i);
  }

  int64_t experts_;
  std::vector<float> values_[4], transposed_;
};

std::optional<Factors> factors_of(const Optional& out1,
                                  const Optional& out2,
                                  const Optional& in1,
                                  const Optional& in2) {
  if (!out1 || !out2 || !in1 || !in2) return std::nullopt;
  return std::optional<Factors>(std::in_place, *out1, *out2, *in1, *in2);
}

// Calls body(first column, columns) for pieces of a block's columns.
template <class Body>
void for_columns(const Factors& f, const Body& body) {
  torch::stable::parallel_for(0, (f.block + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t column = begin * kColumns; column < std::min(end * kColumns, f.block); column += kColumns) {
      body(column, std::min(kColumns, f.block - column));
    }
  });
}

// Computes M_e tau_e without the product with out1, which runs across the blocks: half [o1, block].
void apply_inner(const Factors& f, const Weights& weights, int64_t rank, int64_t e, float* half) {
  torch::stable::parallel_for(0, f.o1, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> tau(f.block), by_in2(f.block), by_in1(f.block);
    for (int64_t first = begin * f.block; first < end * f.block; first += f.block) {
      weights.tau(e, first, f.block, tau.data());
      f.inner(rank, e, tau.data(), by_in2.data(), by_in1.data());
      product(
          {f.out2(rank, e), f.o2, by_in1.data(), f.width, half + first, f.width, f.o2, f.width, f.o2, false});
    }
  });
}

// Delta_e = mask_e M_e tau_e, of the experts' dtype; summed over the ranks in fp32.
Tensor camex_deltas_fwd(const Tensor& base,
                        const Tensor& experts,
                        Optional out1,
                        Optional out2,
                        Optional in1,
                        Optional in2,
                        bool ties) {
  const Weights weights(base, experts, ties);
  const int64_t size = weights.size();
  Tensor result = molex::new_result(experts, experts.sizes());
  const Target to = molex::target_of(result);
  if (size == 0) return result;
  const std::optional<Factors> factors = factors_of(out1, out2, in1, in2);
  if (!factors) {
    for_chunks(size, [&](int64_t first, int64_t length) {
      std::vector<float> scratch(length);
      for (int64_t e = 0; e < weights.count(); ++e) {
        float* row = molex::place(to, e * size + first, scratch.data());
        weights.tau(e, first, length, row);
        if (ties) weights.mask(e, first, length, row, row);
        molex::write(to, e * size + first, length, row);
      }
    });
    return result;
  }
  const Factors& f = *factors;
  Tensor between = molex::new_result(experts, {size}, ScalarType::Float);
  Tensor fp32 = molex::new_result(experts, {to.dtype == ScalarType::Float ? 0 : size}, ScalarType::Float);
  float* half = between.mutable_data_ptr<float>();
  for (int64_t e = 0; e < weights.count(); ++e) {
    float* sum = molex::place(to, e * size, fp32.mutable_data_ptr<float>());
    for (int64_t rank = 0; rank < f.ranks; ++rank) {
      apply_inner(f, weights, rank, e, half);
      for_columns(f, [&](int64_t column, int64_t length) {
        product({f.out1(rank, e),
                 f.o1,
                 half + column,
                 f.block,
                 sum + column,
                 f.block,
                 f.o1,
                 length,
                 f.o1,
                 rank > 0});
        if (rank + 1 < f.ranks) return;
        for (int64_t at = column; at < size; at += f.block) {
          if (ties) weights.mask(e, at, length, sum + at, sum + at);
          molex::write(to, e * size + at, length, sum + at);
        }
      });
    }
  }
  return result;
}

// Gradients of one expert's factors, in parts that are added in order.
class FactorSums {
 public:
  FactorSums(const Factors& f, bool wanted) : f_(f), wanted_(wanted) {
    if (!wanted) return;
    parts_[0].resize((f.block + kColumns - 1) / kColumns * f.o1 * f.o1);
    for (int i = 1; i < 4; ++i) parts_[i].resize(f.o1 * f.side(i) * f.side(i));
  }

  bool wanted() const { return wanted_; }
  float* part(int i, int64_t index) { return parts_[i].data() + index * f_.side(i) * f_.side(i); }

  void write(int i, const Target& to, int64_t first) const {
    const int64_t area = f_.side(i) * f_.side(i), count = static_cast<int64_t>(parts_[i].size()) / area;
    std::vector<double> sums(area, 0.0);
    for (int64_t index = 0; index < count; ++index) {
      for (int64_t j = 0; j < area; ++j) sums[j] += parts_[i][index * area + j];
    }
    std::vector<float> values(sums.begin(), sums.end());
    float* there = molex::place(to, first, values.data());
    if (there != values.data()) std::copy(values.begin(), values.end(), there);
    molex::write(to, first, area, values.data());
  }

 private:
  const Factors& f_;
  bool wanted_;
  std::vector<float> parts_[4];
};

// Goes back through out1, which runs across the blocks: down [o1, block] = out1^T upstream. Adds up the
// gradient of out1. `upstream` gives some elements of the gradient of M_e tau_e; `half` is scratch, [o1,
// block].
template <class Upstream>
void back_through_out1(const Factors& f,
                       const Weights& weights,
                       const Upstream& upstream,
                       int64_t rank,
                       int64_t e,
                       FactorSums& sums,
                       float* half,
                       float* down) {
  if (sums.wanted()) apply_inner(f, weights, rank, e, half);
  for_columns(f, [&](int64_t column, int64_t length) {
    std::vector<float> given(f.o1 * length);
    for (int64_t i = 0; i < f.o1; ++i) upstream(i * f.block + column, length, given.data() + i * length);
    if (sums.wanted()) {
      float* part = sums.part(0, column / kColumns);
      product_inner({given.data(), length, half + column, f.block, part, f.o1, f.o1, f.o1, length, false});
    }
    product_transposed(
        {f.out1(rank, e), f.o1, given.data(), length, down + column, f.block, f.o1, length, f.o1, false});
  });
}

// Goes back from `down` through the other three factors, block by block. If dtau is wanted, all ranks but the
// first add to it.
void back_through_blocks(const Factors& f,
                         const Weights& weights,
                         int64_t rank,
                         int64_t e,
                         FactorSums& sums,
                         const float* down,
                         float* dtau) {
  const int64_t kept = sums.wanted() ? f.block : 0;
  torch::stable::parallel_for(0, f.o1, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> from_out2(f.block), from_in1(f.block);
    std::vector<float> tau(kept), by_in2(kept), by_in1(kept), transposed(kept), other(kept);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * f.block;
      const float* above = down + first;
      if (sums.wanted()) {
        weights.tau(e, first, f.block, tau.data());
        f.inner(rank, e, tau.data(), by_in2.data(), by_in1.data());
        product_inner(
            {above, f.width, by_in1.data(), f.width, sums.part(1, i), f.o2, f.o2, f.o2, f.width, false});
      }
      product_transposed(
          {f.out2(rank, e), f.o2, above, f.width, from_out2.data(), f.width, f.o2, f.width, f.o2, false});
      for (int64_t at = 0; at < f.block; at += f.width) {
        product_transposed(
            {f.in1(rank, e), f.d1, &from_out2[at], f.d2, &from_in1[at], f.d2, f.d1, f.d2, f.d1, false});
        if (!sums.wanted()) continue;
        // The index of in1 is not the first of a block. After transposition all rows of a block are one
        // product.
        Factors::transpose(&from_out2[at], f.d1, f.d2, &transposed[at]);
        Factors::transpose(&by_in2[at], f.d1, f.d2, &other[at]);
      }
      if (sums.wanted()) {
        float *in1 = sums.part(2, i), *in2 = sums.part(3, i);
        product_transposed(
            {transposed.data(), f.d1, other.data(), f.d1, in1, f.d1, f.d1, f.d1, f.o2 * f.d2, false});
        product_transposed(
            {from_in1.data(), f.d2, tau.data(), f.d2, in2, f.d2, f.d2, f.d2, f.o2 * f.d1, false});
      }
      if (!dtau) continue;
      const float* in2 = f.in2(rank, e);
      const int64_t rows = f.o2 * f.d1;
      product({from_in1.data(), f.d2, in2, f.d2, dtau + first, f.d2, rows, f.d2, f.d2, rank > 0});
    }
  });
}

// Gradients of base, experts and factors; those not needed are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> camex_deltas_bwd(const Tensor& ddeltas,
                                                                            const Tensor& base,
                                                                            const Tensor& experts,
                                                                            Optional out1,
                                                                            Optional out2,
                                                                            Optional in1,
                                                                            Optional in2,
                                                                            bool ties,
                                                                            std::vector<bool> needs) {
  const Weights weights(base, experts, ties);
  const int64_t size = weights.size(), count = weights.count();
  const Tensor kept = torch::stable::contiguous(ddeltas);
  const Source given = molex::source_of(kept);
  const auto like = [&](const Tensor& tensor, bool need) {
    return need ? molex::new_result(tensor, tensor.sizes()) : molex::new_result(tensor, {0});
  };
  Tensor dbase = like(base, needs[0]), dexperts = like(experts, needs[1]);
  const Optional* options[] = {&out1, &out2, &in1, &in2};
  std::vector<Tensor> dfactors;
  for (int i = 0; i < 4; ++i) dfactors.push_back(like(*options[i] ? **options[i] : base, needs[2 + i]));
  const auto outcome = [&] {
    return std::tuple(dbase, dexperts, dfactors[0], dfactors[1], dfactors[2], dfactors[3]);
  };
  if (size == 0) {  // the factors' gradients are then sums of nothing
    for (Tensor& dfactor : dfactors) torch::stable::zero_(dfactor);
    return outcome();
  }

  // The gradient dtau of one expert is its own gradient and, with the opposite sign, part of the base's.
  const Target to = molex::target_of(dexperts), to_base = molex::target_of(dbase);
  const bool own = needs[1] && to.dtype == ScalarType::Float, both = needs[0] || needs[1];
  const bool wide_base = needs[0] && to_base.dtype != ScalarType::Float;
  Tensor spare = molex::new_result(base, {own || !both ? 0 : size}, ScalarType::Float);
  Tensor sum = molex::new_result(base, {wide_base ? size : 0}, ScalarType::Float);
  float* total = needs[0] ? molex::place(to_base, 0, sum.mutable_data_ptr<float>()) : nullptr;
  if (total) std::fill_n(total, size, 0.0f);

  const std::optional<Factors> factors = factors_of(out1, out2, in1, in2);
  const int64_t between = factors ? size : 0;
  Tensor scratch = molex::new_result(base, {2 * between}, ScalarType::Float);
  float *half = scratch.mutable_data_ptr<float>(), *down = half + between;
  std::optional<FactorSums> sums;
  if (factors) sums.emplace(*factors, needs[2] || needs[3] || needs[4] || needs[5]);

  for (int64_t e = 0; e < count; ++e) {
    // The gradient of M_e tau_e is the upstream gradient under the mask.
    const auto upstream = [&](int64_t first, int64_t length, float* out) {
      const float* values = molex::read(given, e * size + first, length, out);
      if (ties) {
        weights.mask(e, first, length, values, out);
      } else if (values != out) {
        std::copy_n(values, length, out);
      }
    };
    float* dtau = own    ? static_cast<float*>(to.data) + e * size
                  : both ? spare.mutable_data_ptr<float>()
                         : nullptr;
    for (int64_t rank = 0; factors && rank < factors->ranks; ++rank) {
      back_through_out1(*factors, weights, upstream, rank, e, *sums, half, down);
      back_through_blocks(*factors, weights, rank, e, *sums, down, dtau);
      for (int i = 0; i < 4; ++i) {
        const int64_t area = factors->side(i) * factors->side(i);
        if (needs[2 + i]) sums->write(i, molex::target_of(dfactors[i]), (rank * count + e) * area);
      }
    }
    if (!both) continue;
    for_chunks(size, [&](int64_t first, int64_t length) {
      if (!factors) upstream(first, length, dtau + first);
      if (needs[1]) molex::write(to, e * size + first, length, dtau + first);
      if (total) molex::add_scaled(total + first, dtau + first, -1.0f, length);
    });
  }
  if (wide_base) molex::write(to_base, 0, size, total);
  return outcome();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("camex_deltas_fwd", molex::cpu_kernel<&camex_deltas_fwd>);
  library.impl("camex_deltas_bwd", molex::cpu_kernel<&camex_deltas_bwd>);
}
