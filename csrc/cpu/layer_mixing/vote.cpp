// The vote of all tokens for a layer, in one pass over the logits.
//
// Tokens are cut into chunks of a fixed size, whose sums are added in order: the result does not depend on
// the number of threads.

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "cpu/common/memory.h"
#include "cpu/common/rows.h"
#include "cpu/common/softmax.h"
#include "registration.h"

namespace {

using molex::Source;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 512;  // tokens

// Integers that are ordered as the floats are: both zeros are equal, and NaN is the largest.
template <int LANES>
MOLEX_INLINE molex::Ints<LANES> keys_of(const float* from) {
  using Keys = molex::Ints<LANES>;
  const molex::Floats<LANES> x = molex::load<LANES>(from);
  const Keys bits = (Keys)(x + 0.0f);
  const Keys key = bits ^ ((bits >> 31) & 0x7fffffff);
  return molex::select(x == x, key, Keys{} + std::numeric_limits<int32_t>::max());
}

// The index of the first largest of `count` values. `row` is padded to whole vectors with -inf.
template <int LANES>
MOLEX_INLINE int64_t first_largest(const float* row, int64_t count) {
  using Keys = molex::Ints<LANES>;
  Keys most = Keys{} + std::numeric_limits<int32_t>::min();
  for (int64_t i = 0; i < count; i += LANES) most = molex::larger(keys_of<LANES>(row + i), most);
  const Keys largest = Keys{} + molex::largest_lane(most);
  for (int64_t i = 0; i < count; i += LANES) {
    const Keys same = keys_of<LANES>(row + i) == largest;
    for (int lane = 0; lane < LANES; ++lane) {
      if (same[lane]) return i + lane;
    }
  }
  return 0;
}

enum class Mode { kMode, kMeanSoftmax, kMeanSigmoid };

// Adds the vote of each of `count` tokens to `sums`, except those that the mask leaves out. `sums` and `row`
// have whole vectors.
template <Mode MODE>
constexpr auto add_votes = molex::versions([](auto registers,
                                              const float* logits,
                                              const bool* mask,
                                              int64_t count,
                                              int64_t layers,
                                              float* row,
                                              float* sums) MOLEX_LAMBDA_INLINE {
  constexpr int kLanes = registers.kLanes;
  const int64_t whole = molex::wide_of(layers);
  std::fill(row, row + whole, -std::numeric_limits<float>::infinity());
  for (int64_t t = 0; t < count; ++t) {
    if (mask && !mask[t]) continue;
    const float* z = logits + t * layers;
    if constexpr (MODE == Mode::kMeanSoftmax) {
      const float inverse = 1.0f / molex::exponentials_of<kLanes>(z, 1.0f, row, layers).sum;
      for (int64_t i = 0; i < whole; i += kLanes) {
        molex::store(sums + i, molex::load<kLanes>(sums + i) + inverse * molex::load<kLanes>(row + i));
      }
    } else {
      std::copy_n(z, layers, row);
      if constexpr (MODE == Mode::kMode) {
        sums[first_largest<kLanes>(row, layers)] += 1.0f;
      } else {
        for (int64_t i = 0; i < whole; i += kLanes) {
          molex::store(sums + i,
                       molex::load<kLanes>(sums + i) + molex::sigmoid_of(molex::load<kLanes>(row + i)));
        }
      }
    }
  }
});

// The layer with the largest sum over the tokens in `mask` [T]. Of equal sums the lower layer wins.
Tensor layer_vote(const Tensor& logits, std::optional<Tensor> mask, std::string mode) {
  const int64_t tokens = logits.size(0), layers = logits.size(1), whole = molex::wide_of(layers);
  STD_TORCH_CHECK(mode == "mode" || mode == "mean_softmax" || mode == "mean_sigmoid", "mode: unknown ", mode);
  const auto add = [&](auto... arguments) {
    if (mode == "mode") return add_votes<Mode::kMode>(arguments...);
    if (mode == "mean_softmax") return add_votes<Mode::kMeanSoftmax>(arguments...);
    add_votes<Mode::kMeanSigmoid>(arguments...);
  };
  const Tensor packed = torch::stable::contiguous(logits);
  const std::optional<Tensor> counted = molex::packed(mask);
  const Source from = molex::source_of(packed);
  const bool* counts = counted ? counted->const_data_ptr<bool>() : nullptr;
  const int64_t chunks = (tokens + kChunk - 1) / kChunk;
  std::vector<float> sums(chunks * whole, 0.0f);
  torch::stable::parallel_for(0, chunks, 2, [&](int64_t begin, int64_t end) {
    molex::Scratch scratch(1, from.dtype == ScalarType::Float ? 0 : kChunk * layers), row(1, whole);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk, count = std::min(kChunk, tokens - first);
      const float* z = molex::read(from, first * layers, count * layers, scratch[0]);
      add(z, counts ? counts + first : nullptr, count, layers, row[0], &sums[chunk * whole]);
    }
  });
  Tensor result = molex::new_result(logits, {}, ScalarType::Long);
  double largest = -std::numeric_limits<double>::infinity();
  int64_t best = 0;
  for (int64_t layer = 0; layer < layers; ++layer) {
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk * whole + layer];
    // A NaN is the largest, as in `torch.argmax`.
    if (sum > largest || (sum != sum && largest == largest)) {
      largest = sum;
      best = layer;
    }
  }
  *result.mutable_data_ptr<int64_t>() = best;
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) { library.impl("layer_vote", molex::cpu_kernel<&layer_vote>); }
