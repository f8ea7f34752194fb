// The merged weight of every segment on a CPU, and its gradients. One pass over the elements of a weight:
// what the experts add is made for some elements at a time, and stays in the cache while all segments use it.

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/common/gemm.h"
#include "cpu/common/matmul.h"
#include "cpu/common/memory.h"
#include "cpu/common/rows.h"
#include "registration.h"

namespace {

using molex::Arena;
using molex::product;
using molex::product_inner;
using molex::Source;
using molex::Target;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 512;      // elements of a weight that are merged at a time
constexpr int64_t kBlock = 1 << 13;  // elements that are one task, and one partial sum of the gates' gradient
constexpr int64_t kSegments = 24;    // segments that are multiplied at a time

template <class V>
MOLEX_INLINE V at(const float* from) {
  if constexpr (std::is_same_v<V, float>) {
    return *from;
  } else {
    return molex::load<sizeof(V) / sizeof(float)>(from);
  }
}

template <class V>
MOLEX_INLINE void put(float* to, V x) {
  if constexpr (std::is_same_v<V, float>) {
    *to = x;
  } else {
    molex::store(to, x);
  }
}

// Calls step(V{}, i) for whole vectors, and step(float{}, i) for what is left.
template <int LANES, class Step>
MOLEX_INLINE void for_vectors(int64_t length, const Step& step) {
  int64_t i = 0;
  for (; i + LANES <= length; i += LANES) step(molex::Floats<LANES>{}, i);
  for (; i < length; ++i) step(0.0f, i);
}

// Whether x has the sign of y, of which NaN has none.
template <class V>
MOLEX_INLINE auto same_sign(V x, V y) {
  return ((x > 0.0f) == (y > 0.0f)) & ((x < 0.0f) == (y < 0.0f));
}

// tau_e = experts_e - base for `count` experts, under the mask where `ties`; `kept` gets the mask as 1 or 0
// unless it is null. Rows are kChunk apart, those of the experts `stride`.
constexpr auto task_vectors = molex::versions([](auto registers,
                                                 const float* base,
                                                 const float* experts,
                                                 int64_t stride,
                                                 int64_t count,
                                                 int64_t length,
                                                 bool ties,
                                                 float* tau,
                                                 float* kept) MOLEX_LAMBDA_INLINE {
  for_vectors<registers.kLanes>(length, [=](auto zero, int64_t i) MOLEX_LAMBDA_INLINE {
    using V = decltype(zero);
    const V start = at<V>(base + i);
    V sum = {};
    for (int64_t e = 0; e < count; ++e) {
      const V x = at<V>(experts + e * stride + i) - start;
      put(tau + e * kChunk + i, x);
      sum += x;
    }
    if (!ties) return;
    for (int64_t e = 0; e < count; ++e) {
      const V x = at<V>(tau + e * kChunk + i);
      const auto agrees = same_sign(x, sum);
      put(tau + e * kChunk + i, molex::select(agrees, x, V{}));
      if (kept) put(kept + e * kChunk + i, molex::select(agrees, V{} + 1.0f, V{}));
    }
  });
});

// From gradients of the deltas, rows kChunk apart, and `total`, the sum of all segments' gradients: writes
// those of the experts, `stride` apart, and of the base. The experts' own is masked where there is `kept`.
constexpr auto experts_gradients = molex::versions([](auto registers,
                                                      const float* deltas,
                                                      const float* kept,
                                                      const float* total,
                                                      int64_t count,
                                                      int64_t length,
                                                      bool subtracts,
                                                      float* experts,
                                                      int64_t stride,
                                                      float* base) MOLEX_LAMBDA_INLINE {
  for_vectors<registers.kLanes>(length, [=](auto zero, int64_t i) MOLEX_LAMBDA_INLINE {
    using V = decltype(zero);
    V sum = at<V>(total + i);
    for (int64_t e = 0; e < count; ++e) {
      V x = at<V>(deltas + e * kChunk + i);
      if (kept) x = molex::select(at<V>(kept + e * kChunk + i) > 0.0f, x, V{});
      if (experts) put(experts + e * stride + i, x);
      if (subtracts) sum -= x;
    }
    if (base) put(base + i, sum);
  });
});

// What both passes read: base [O, D], experts [E, O, D] or, unless `subtracts`, the deltas in their place,
// and gates [S, E] in fp32. Holds the tensors that it points into.
class Layer {
 public:
  Layer(const Tensor& base, const Tensor& experts, const Tensor& gates, bool subtracts, bool ties)
      : size(base.numel()),
        count(experts.size(0)),
        segments(gates.size(0)),
        subtracts(subtracts),
        ties(ties),
        gates(molex::floats_of(gates)),
        base_(torch::stable::contiguous(base)),
        experts_(torch::stable::contiguous(experts)),
        start_(molex::source_of(base_)),
        from_(molex::source_of(experts_)) {}

  const int64_t size, count, segments;
  const bool subtracts, ties;
  const std::vector<float> gates;

  // Some elements of the deltas and, behind them, of the base: rows that are kChunk apart.
  void read(int64_t first, int64_t length, float* rows, float* kept) const {
    float* const last = rows + count * kChunk;
    const float* start = molex::read(start_, first, length, last);
    if (start != last) std::copy_n(start, length, last);
    const bool is_wide = from_.dtype == ScalarType::Float;
    for (int64_t e = 0; e < count && !(is_wide && subtracts); ++e) {
      float* const row = rows + e * kChunk;
      const float* expert = molex::read(from_, e * size + first, length, row);
      if (expert != row) std::copy_n(expert, length, row);
    }
    if (!subtracts) return;
    const float* experts = is_wide ? static_cast<const float*>(from_.data) + first : rows;
    task_vectors(last, experts, is_wide ? size : kChunk, count, length, ties, rows, kept);
  }

  int64_t blocks() const { return (size + kBlock - 1) / kBlock; }

 private:
  Tensor base_, experts_;
  Source start_, from_;
};

// W_s = base + sum_e gates_se Delta_e: the base is one more expert, whose gate is 1 and which is added last,
// so that the sum of the others is not rounded at its magnitude.
Tensor camex_merge_fwd(
    const Tensor& base, const Tensor& experts, const Tensor& gates, bool subtracts, bool ties) {
  const Layer l(base, experts, gates, subtracts, ties);
  const int64_t depth = l.count + 1;
  Tensor weights = molex::new_result(base, {l.segments, base.size(0), base.size(1)});
  const Target to = molex::target_of(weights);
  std::vector<float> weight(l.segments * depth, 1.0f);
  for (int64_t s = 0; s < l.segments; ++s) {
    std::copy_n(l.gates.data() + s * l.count, l.count, weight.data() + s * depth);
  }
  const bool direct = to.dtype == ScalarType::Float;
  const int64_t together = std::min(l.segments, kSegments), made = direct ? 0 : together * kChunk;
  torch::stable::parallel_for(0, l.blocks(), 1, [&](int64_t begin, int64_t end) {
    Arena arena(Arena::bytes(depth * kChunk) + Arena::bytes(made));
    float *const rows = arena.floats(depth * kChunk), *const fp32 = arena.floats(made);
    for (int64_t first = begin * kBlock; first < std::min(end * kBlock, l.size); first += kChunk) {
      const int64_t length = std::min(kChunk, l.size - first);
      l.read(first, length, rows, nullptr);
      for (int64_t s = 0; s < l.segments; s += kSegments) {
        const int64_t members = std::min(kSegments, l.segments - s), there = s * l.size + first;
        float* const out = direct ? static_cast<float*>(to.data) + there : fp32;
        const float* const factors = weight.data() + s * depth;
        const int64_t ldc = direct ? l.size : kChunk;
        product({factors, depth, rows, kChunk, out, ldc, members, length, depth, false});
        for (int64_t i = 0; i < members && !direct; ++i) {
          molex::write(to, there + i * l.size, length, fp32 + i * kChunk);
        }
      }
    }
  });
  return weights;
}

// With dW_s the gradient of a segment's weight: that of Delta_e is sum_s gates_se dW_s, dgates_se is
// <dW_s, Delta_e>, and dbase is sum_s dW_s, less the experts' gradients where the base is subtracted. Those
// not needed are empty; the gates' is fp32.
std::tuple<Tensor, Tensor, Tensor> camex_merge_bwd(const Tensor& dweights,
                                                   const Tensor& base,
                                                   const Tensor& experts,
                                                   const Tensor& gates,
                                                   bool subtracts,
                                                   bool ties,
                                                   std::vector<bool> needs) {
  const Layer l(base, experts, gates, subtracts, ties);
  const auto like = [](const Tensor& tensor, bool need) {
    return need ? molex::new_result(tensor, tensor.sizes()) : molex::new_result(tensor, {0});
  };
  Tensor dbase = like(base, needs[0]), dexperts = like(experts, needs[1]), dgates = like(gates, needs[2]);
  const Target to_base = molex::target_of(dbase), to_experts = molex::target_of(dexperts);
  const Tensor kept_dweights = torch::stable::contiguous(dweights);
  const Source given = molex::source_of(kept_dweights);
  const bool is_wide = given.dtype == ScalarType::Float, direct = to_experts.dtype == ScalarType::Float;
  const bool sums_up = needs[0] || needs[1], masks = ties && subtracts && sums_up;
  // The last row of ones sums up all segments.
  const int64_t rows = l.count + 1, pairs = needs[2] ? l.segments * l.count : 0;
  std::vector<float> turned(rows * l.segments, 1.0f);
  for (int64_t s = 0; s < l.segments; ++s) {
    for (int64_t e = 0; e < l.count; ++e) turned[e * l.segments + s] = l.gates[s * l.count + e];
  }
  std::vector<double> partial(l.blocks() * pairs, 0.0);
  const int64_t together = std::min(l.segments, kSegments);
  const int64_t widened = is_wide ? 0 : together * kChunk, mask = masks ? l.count * kChunk : 0;
  torch::stable::parallel_for(0, l.blocks(), 1, [&](int64_t begin, int64_t end) {
    Arena arena(2 * Arena::bytes(rows * kChunk) + Arena::bytes(widened) + Arena::bytes(mask) +
                Arena::bytes(kSegments * l.count));
    float *const deltas = arena.floats(rows * kChunk), *const sums = arena.floats(rows * kChunk);
    float *const fp32 = arena.floats(widened), *const kept = arena.floats(mask);
    float* const dots = arena.floats(kSegments * l.count);
    for (int64_t first = begin * kBlock; first < std::min(end * kBlock, l.size); first += kChunk) {
      const int64_t length = std::min(kChunk, l.size - first);
      if (pairs || masks) l.read(first, length, deltas, masks ? kept : nullptr);
      if (l.segments == 0) std::fill_n(sums, rows * kChunk, 0.0f);
      for (int64_t s = 0; s < l.segments; s += kSegments) {
        const int64_t members = std::min(kSegments, l.segments - s);
        const float* upstream = static_cast<const float*>(given.data) + s * l.size + first;
        for (int64_t i = 0; i < members && !is_wide; ++i) {
          upstream = fp32;
          molex::read(given, (s + i) * l.size + first, length, fp32 + i * kChunk);
        }
        const int64_t stride = is_wide ? l.size : kChunk;
        const float* const factors = turned.data() + s;
        if (sums_up) {
          product({factors, l.segments, upstream, stride, sums, kChunk, rows, length, members, s > 0});
        }
        if (!pairs) continue;
        product_inner({upstream, stride, deltas, kChunk, dots, l.count, members, l.count, length, false});
        double* const sum = partial.data() + first / kBlock * pairs + s * l.count;
        for (int64_t i = 0; i < members * l.count; ++i) sum[i] += dots[i];
      }
      if (!sums_up) continue;
      float* const total = sums + l.count * kChunk;
      float* const own = direct ? static_cast<float*>(to_experts.data) + first : sums;
      float* const start = needs[0] ? molex::place(to_base, first, total) : nullptr;
      experts_gradients(sums,
                        masks ? kept : nullptr,
                        total,
                        l.count,
                        length,
                        subtracts,
                        needs[1] ? own : nullptr,
                        direct ? l.size : kChunk,
                        start);
      for (int64_t e = 0; e < l.count && needs[1]; ++e) {
        molex::write(to_experts, e * l.size + first, length, sums + e * kChunk);
      }
      if (needs[0]) molex::write(to_base, first, length, total);
    }
  });
  std::vector<double> sums(pairs, 0.0);
  for (size_t i = 0; i < partial.size(); ++i) sums[i % pairs] += partial[i];
  if (pairs) std::copy(sums.begin(), sums.end(), dgates.mutable_data_ptr<float>());
  return {dbase, dexperts, dgates};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("camex_merge_fwd", molex::cpu_kernel<&camex_merge_fwd>);
  library.impl("camex_merge_bwd", molex::cpu_kernel<&camex_merge_bwd>);
}
