// The router's forward pass on a CPU: weighting of features, product with the gate and top-k, piece by piece.

#include <string>
#include <tuple>

#include "cpu/common/gemm.h"
#include "cpu/common/matmul.h"
#include "cpu/common/memory.h"
#include "cpu/routing/choice.h"
#include "cpu/routing/router.h"
#include "registration.h"

namespace molex::router {
namespace {

constexpr int64_t kFew = 384;         // with fewer tokens, transposing the gate does not pay
constexpr int64_t kCached = 1 << 16;  // floats of the gate, and of weighted tokens, in use at a time
constexpr int64_t kRows = 12;         // a multiple of the rows of a tile of a product, 6 or 4

// Writes the gate [E, D] as floats [D, padded], with zeros from column E on. Each cache line of the result is
// written at once.
void transpose(const Source& gate, int64_t experts, int64_t width, int64_t padded, float* to) {
  constexpr int64_t kBlock = 64;  // features
  torch::stable::parallel_for(0, parts(width, kBlock), 1, [&](int64_t begin, int64_t end) {
    const std::vector<float> zeros(kBlock);
    std::vector<float> scratch(kWide * kBlock);
    for (int64_t first = begin * kBlock; first < std::min(end * kBlock, width); first += kBlock) {
      const int64_t count = std::min(kBlock, width - first);
      for (int64_t start = 0; start < padded; start += kWide) {
        const float* from[kWide];
        for (int64_t i = 0; i < kWide; ++i) {
          const int64_t e = start + i;
          from[i] = e < experts ? read(gate, e * width + first, count, &scratch[i * kBlock]) : zeros.data();
        }
        for (int64_t q = 0; q < count; ++q) {
          for (int64_t i = 0; i < kWide; ++i) to[(first + q) * padded + start + i] = from[i][q];
        }
      }
    }
  });
}

// expert_index [T, K], expert_weight [T, K] and logits [T, E].
std::tuple<Tensor, Tensor, Tensor> router_fwd(const Tensor& x,
                                              const Tensor& gate,
                                              std::optional<Tensor> gate_bias,
                                              std::optional<Tensor> expert_bias,
                                              std::optional<Tensor> table,
                                              std::optional<Tensor> labels,
                                              std::optional<Tensor> mix,
                                              int64_t top_k,
                                              std::string score,
                                              int64_t num_groups,
                                              int64_t top_groups,
                                              bool renormalize,
                                              double scaling) {
  const int64_t tokens = x.size(0), width = x.size(1), experts = gate.size(0), padded = wide_of(experts);
  const Tokens from(x, table, labels, mix);
  const TopK find_top_k(expert_bias, experts, top_k, {num_groups, top_groups}, {score, renormalize, scaling});
  const std::vector<float> bias = floats_of(gate_bias);
  Tensor index = new_result(x, {tokens, top_k}, ScalarType::Long);
  Tensor weight = new_result(x, {tokens, top_k}, ScalarType::Float);
  Tensor logits = new_result(x, {tokens, experts}, ScalarType::Float);
  int64_t* chosen = index.mutable_data_ptr<int64_t>();
  float *scores = weight.mutable_data_ptr<float>(), *out = logits.mutable_data_ptr<float>();

  const Tensor rows = torch::stable::contiguous(gate);
  const bool few = tokens < kFew;
  Arena gates(Arena::bytes(width * (few ? experts : padded)));
  float* const floats = gates.floats(width * (few ? experts : padded));
  const float* weights = floats;
  if (few) {
    weights = read(source_of(rows), 0, experts * width, floats);
  } else {
    transpose(source_of(rows), experts, width, padded, floats);
  }
  // Rows of x are as long as the gate's share of the cache allows: whole rows are read from memory fastest.
  const int64_t depth = few ? width : std::min(std::max(kCached / padded, kFeatures), width);
  const int64_t most = std::clamp(kCached / std::max<int64_t>(depth, 1), kRows, kPiece);

  // Every thread gets the same number of pieces, each of whole tiles of rows: single rows take longer.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t rounds = std::max<int64_t>(1, parts(tokens, threads * most));
  const int64_t piece = std::max(kRows, parts(parts(tokens, threads * rounds), kRows) * kRows);
  torch::stable::parallel_for(0, parts(tokens, piece), 1, [&](int64_t begin, int64_t end) {
    Arena arena(Arena::bytes(piece * depth) + Arena::bytes(piece * padded) + Arena::bytes(find_top_k.size()));
    float *tile = arena.floats(piece * depth), *z = arena.floats(piece * padded);
    float* scratch = arena.floats(find_top_k.size());
    for (int64_t first = begin * piece; first < std::min(end * piece, tokens); first += piece) {
      const int64_t count = std::min(piece, tokens - first);
      for (int64_t at = 0; at < width; at += depth) {
        const int64_t features = std::min(depth, width - at);
        const Rows x = from.weighted_rows(first, count, at, features, tile);
        if (few) {
          product_inner({x.data, x.stride, weights, width, z, padded, count, experts, features, false});
        } else {
          product(
              {x.data, x.stride, weights + at * padded, padded, z, padded, count, padded, features, at > 0});
        }
      }
      for (int64_t t = 0; t < count; ++t) {
        float* row = z + t * padded;
        if (!bias.empty()) add(row, bias.data(), experts);
        std::copy_n(row, experts, out + (first + t) * experts);
      }
      for (int64_t t = 0; t < count; t += kTogether) {
        const int64_t together = std::min(kTogether, count - t), at = (first + t) * top_k;
        find_top_k(z + t * padded, padded, together, chosen + at, scores + at, scratch);
      }
    }
  });
  return {index, weight, logits};
}

}  // namespace
}  // namespace molex::router

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("router_fwd", molex::cpu_kernel<&molex::router::router_fwd>);
}
