// Momentum updates over the experts' outputs: combine, dropout, step and LayerNorm in one pass.
//
// Work is cut into spans: rows where there is a norm or a combine, else pieces of the flat tensor. A
// span's operands stay in the first cache. Sums over tokens go to a fixed number of chunks, which are
// added in order: the result does not depend on the number of threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "layer_norm.h"
#include "memory.h"
#include "philox.h"
#include "rows.h"

namespace {

using molex::add_scaled;
using molex::Dropout;
using molex::normalise;
using molex::normalise_backward;
using molex::scale_and_shift;
using molex::scale_into;
using molex::Scratch;
using molex::Source;
using molex::sum_of;
using molex::Target;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSpan = 1024;   // elements of a span without norm and combine
constexpr int64_t kChunks = 64;   // partial sums of the parameters' gradients
constexpr int64_t kGrain = 8192;  // elements below which a thread is not worth waking

enum class Kind { kLinear, kNesterov, kSignum, kAdam, kAdEMAMix };

Kind kind_of(const std::string& name) {
  if (name == "linear") return Kind::kLinear;
  if (name == "nesterov") return Kind::kNesterov;
  if (name == "signum") return Kind::kSignum;
  if (name == "adam") return Kind::kAdam;
  STD_TORCH_CHECK(name == "ademamix", "kind: unknown rule ", name);
  return Kind::kAdEMAMix;
}

// In the order of `Coefficients` in rules.py.
struct Numbers {
  float mu, gamma, beta1, rest1, beta2, rest2, beta3, rest3, alpha, eps, keep, scale1, scale2;
};

float scalar_of(const Tensor& tensor) {
  const Source source = molex::source_of(tensor);
  float scratch;
  return *molex::read(source, 0, 1, &scratch);
}

Numbers numbers_of(const std::vector<double>& values,
                   const std::optional<Tensor>& mu,
                   const std::optional<Tensor>& gamma) {
  STD_TORCH_CHECK(
      values.size() == sizeof(Numbers) / sizeof(float), "numbers: expected 13, got ", values.size());
  Numbers numbers;
  float* fields = reinterpret_cast<float*>(&numbers);
  for (size_t i = 0; i < values.size(); ++i) fields[i] = static_cast<float>(values[i]);
  if (mu) numbers.mu = scalar_of(*mu);
  if (gamma) numbers.gamma = scalar_of(*gamma);
  return numbers;
}

// What a span reads and writes. Unused pointers are null; old states are null where they are 0.
struct Forward {
  const float *x, *f, *s0, *s1, *s2;
  float *y, *n0, *n1, *n2;
};

struct Backward {
  const float *dy, *f, *s0, *s1, *s2, *g0, *g1, *g2;
  float *df, *d0, *d1, *d2, *dmu, *dgamma;
};

struct Step {
  float step, n0, n1, n2;
};

constexpr int num_states(Kind kind) { return kind == Kind::kAdEMAMix ? 3 : kind == Kind::kAdam ? 2 : 1; }

// FROM_STATE: f holds the new state (rules with one state).
template <Kind KIND, bool FROM_STATE>
MOLEX_INLINE Step step_at(float f, float s0, float s1, float s2, const Numbers& c) {
  if constexpr (KIND == Kind::kAdam || KIND == Kind::kAdEMAMix) {
    const float n0 = c.beta1 * s0 + c.rest1 * f;
    const float n1 = c.beta2 * s1 + c.rest2 * f * f;
    if constexpr (KIND == Kind::kAdam) return {c.gamma * n0 / std::sqrt(n1 + c.eps), n0, n1, 0.0f};
    const float n2 = c.beta3 * s2 + c.rest3 * f;
    return {c.gamma * (c.scale1 * n0 + c.alpha * n2) / (std::sqrt(c.scale2 * n1) + c.eps), n0, n1, n2};
  } else {
    const float sign = static_cast<float>(f > 0.0f) - static_cast<float>(f < 0.0f);
    const float push =
        FROM_STATE ? f - c.mu * s0 : c.gamma * (KIND == Kind::kSignum ? (f == f ? sign : f) : f);
    const float n0 = FROM_STATE ? f : c.mu * s0 + push;
    return {KIND == Kind::kNesterov ? c.mu * n0 + push : n0, n0, 0.0f, 0.0f};
  }
}

template <Kind KIND, bool HAS_STATE>
MOLEX_INLINE void forward_span(const Forward& a, int64_t count, Numbers c) {
  const float *x = a.x, *f = a.f, *s0 = a.s0, *s1 = a.s1, *s2 = a.s2;
  float *y = a.y, *n0 = a.n0, *n1 = a.n1, *n2 = a.n2;
  constexpr int kStates = num_states(KIND);
  MOLEX_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const Step made = step_at<KIND, false>(f[i],
                                           HAS_STATE ? s0[i] : 0.0f,
                                           HAS_STATE && kStates > 1 ? s1[i] : 0.0f,
                                           HAS_STATE && kStates > 2 ? s2[i] : 0.0f,
                                           c);
    y[i] = c.keep * x[i] - made.step;
    n0[i] = made.n0;
    if constexpr (kStates > 1) n1[i] = made.n1;
    if constexpr (kStates > 2) n2[i] = made.n2;
  }
}

// y = keep x - step alone, for the norm's backward pass.
template <Kind KIND, bool HAS_STATE, bool FROM_STATE>
MOLEX_INLINE void output_span(const Forward& a, int64_t count, Numbers c) {
  const float *x = a.x, *f = a.f, *s0 = a.s0, *s1 = a.s1, *s2 = a.s2;
  float* y = a.y;
  constexpr int kStates = num_states(KIND);
  MOLEX_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const Step made = step_at<KIND, FROM_STATE>(f[i],
                                                HAS_STATE ? s0[i] : 0.0f,
                                                HAS_STATE && kStates > 1 ? s1[i] : 0.0f,
                                                HAS_STATE && kStates > 2 ? s2[i] : 0.0f,
                                                c);
    y[i] = c.keep * x[i] - made.step;
  }
}

// HAS_FORWARD: the operands of the step are there. Without them only df and d0 of a linear rule.
// HAS_NUMBERS: the gradients of mu and gamma are wanted, element by element.
template <Kind KIND, bool HAS_STATE, bool HAS_FORWARD, bool FROM_STATE, bool HAS_NUMBERS>
MOLEX_INLINE void backward_span(const Backward& b, int64_t count, Numbers c) {
  const float *dy = b.dy, *f = b.f, *s0 = b.s0, *s1 = b.s1, *s2 = b.s2;
  const float *g0 = b.g0, *g1 = b.g1, *g2 = b.g2;
  float *df = b.df, *d0 = b.d0, *d1 = b.d1, *d2 = b.d2;
  float *dmu = b.dmu, *dgamma = b.dgamma;
  constexpr int kStates = num_states(KIND);
  MOLEX_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const float d = -dy[i];  // the gradient of the step
    const float fi = HAS_FORWARD ? f[i] : 0.0f;
    const float s = HAS_FORWARD && HAS_STATE ? s0[i] : 0.0f;
    Step made{};
    if constexpr (HAS_FORWARD) {
      made = step_at<KIND, FROM_STATE>(
          fi, s, HAS_STATE && kStates > 1 ? s1[i] : 0.0f, HAS_STATE && kStates > 2 ? s2[i] : 0.0f, c);
    }
    if constexpr (KIND == Kind::kAdam) {
      const float inverse = 1.0f / std::sqrt(made.n1 + c.eps);
      const float along = d * c.gamma * inverse;
      const float t0 = g0[i] + along;
      const float t1 = g1[i] - 0.5f * along * made.n0 * inverse * inverse;
      df[i] = c.rest1 * t0 + 2.0f * c.rest2 * fi * t1;
      d0[i] = c.beta1 * t0;
      d1[i] = c.beta2 * t1;
      if constexpr (HAS_NUMBERS) dgamma[i] = d * made.n0 * inverse;
    } else if constexpr (KIND == Kind::kAdEMAMix) {
      const float root = std::sqrt(c.scale2 * made.n1);
      const float inverse = 1.0f / (root + c.eps);
      const float along = d * c.gamma * inverse;
      const float mixed = c.scale1 * made.n0 + c.alpha * made.n2;
      const float slope = made.n1 > 0.0f ? 0.5f * c.scale2 / root : 0.0f;
      const float t0 = g0[i] + along * c.scale1;
      const float t1 = g1[i] - along * mixed * inverse * slope;
      const float t2 = g2[i] + along * c.alpha;
      df[i] = c.rest1 * t0 + 2.0f * c.rest2 * fi * t1 + c.rest3 * t2;
      d0[i] = c.beta1 * t0;
      d1[i] = c.beta2 * t1;
      d2[i] = c.beta3 * t2;
      if constexpr (HAS_NUMBERS) dgamma[i] = d * mixed * inverse;
    } else {
      const bool nesterov = KIND == Kind::kNesterov;
      const float t0 = g0[i] + (nesterov ? c.mu * d : d);
      const float t = nesterov ? t0 + d : t0;
      df[i] = KIND == Kind::kSignum ? 0.0f : c.gamma * t;
      d0[i] = c.mu * t0;
      if constexpr (HAS_NUMBERS) {
        dmu[i] = t0 * s + (nesterov ? d * made.n0 : 0.0f);
        dgamma[i] = t * fi;
      }
    }
  }
}

template <Kind KIND, bool FROM_STATE>
MOLEX_INLINE void backward_any(const Backward& b, int64_t count, const Numbers& c) {
  if (b.dmu) {
    b.s0 ? backward_span<KIND, true, true, FROM_STATE, true>(b, count, c)
         : backward_span<KIND, false, true, FROM_STATE, true>(b, count, c);
  } else {
    b.s0 ? backward_span<KIND, true, true, FROM_STATE, false>(b, count, c)
         : backward_span<KIND, false, true, FROM_STATE, false>(b, count, c);
  }
}

#define MOLEX_FORWARD(NAME, KIND)                                                                      \
  MOLEX_CLONES void forward_##NAME(const Forward& a, int64_t count, const Numbers& c) {                \
    a.s0 ? forward_span<Kind::KIND, true>(a, count, c) : forward_span<Kind::KIND, false>(a, count, c); \
  }
MOLEX_FORWARD(linear, kLinear)
MOLEX_FORWARD(nesterov, kNesterov)
MOLEX_FORWARD(signum, kSignum)
MOLEX_FORWARD(adam, kAdam)
MOLEX_FORWARD(ademamix, kAdEMAMix)

// Rules with one state, and those with more: these never start from the new state.
#define MOLEX_BACKWARD_ONE(NAME, KIND)                                                                     \
  MOLEX_CLONES void output_##NAME(const Forward& a, int64_t count, const Numbers& c, bool from_state) {    \
    if (from_state) {                                                                                      \
      a.s0 ? output_span<Kind::KIND, true, true>(a, count, c)                                              \
           : output_span<Kind::KIND, false, true>(a, count, c);                                            \
    } else {                                                                                               \
      a.s0 ? output_span<Kind::KIND, true, false>(a, count, c)                                             \
           : output_span<Kind::KIND, false, false>(a, count, c);                                           \
    }                                                                                                      \
  }                                                                                                        \
  MOLEX_CLONES void backward_##NAME(const Backward& b, int64_t count, const Numbers& c, bool from_state) { \
    if (!b.f) {                                                                                            \
      backward_span<Kind::KIND, false, false, false, false>(b, count, c);                                  \
    } else {                                                                                               \
      from_state ? backward_any<Kind::KIND, true>(b, count, c)                                             \
                 : backward_any<Kind::KIND, false>(b, count, c);                                           \
    }                                                                                                      \
  }
MOLEX_BACKWARD_ONE(linear, kLinear)
MOLEX_BACKWARD_ONE(nesterov, kNesterov)
MOLEX_BACKWARD_ONE(signum, kSignum)

#define MOLEX_BACKWARD_MORE(NAME, KIND)                                                         \
  MOLEX_CLONES void output_##NAME(const Forward& a, int64_t count, const Numbers& c, bool) {    \
    a.s0 ? output_span<Kind::KIND, true, false>(a, count, c)                                    \
         : output_span<Kind::KIND, false, false>(a, count, c);                                  \
  }                                                                                             \
  MOLEX_CLONES void backward_##NAME(const Backward& b, int64_t count, const Numbers& c, bool) { \
    backward_any<Kind::KIND, false>(b, count, c);                                               \
  }
MOLEX_BACKWARD_MORE(adam, kAdam)
MOLEX_BACKWARD_MORE(ademamix, kAdEMAMix)

using ForwardFn = void (*)(const Forward&, int64_t, const Numbers&);
using OutputFn = void (*)(const Forward&, int64_t, const Numbers&, bool);
using BackwardFn = void (*)(const Backward&, int64_t, const Numbers&, bool);

ForwardFn forward_of(Kind kind) {
  constexpr ForwardFn kFunctions[] = {
      forward_linear, forward_nesterov, forward_signum, forward_adam, forward_ademamix};
  return kFunctions[static_cast<int>(kind)];
}

OutputFn output_of(Kind kind) {
  constexpr OutputFn kFunctions[] = {
      output_linear, output_nesterov, output_signum, output_adam, output_ademamix};
  return kFunctions[static_cast<int>(kind)];
}

BackwardFn backward_of(Kind kind) {
  constexpr BackwardFn kFunctions[] = {
      backward_linear, backward_nesterov, backward_signum, backward_adam, backward_ademamix};
  return kFunctions[static_cast<int>(kind)];
}

MOLEX_CLONES void add_sum(double* to, const float* values, int64_t count) { *to += sum_of(values, count); }

MOLEX_CLONES void drop(const Dropout& d, float* f, int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    f[i] = d(f[i], static_cast<uint64_t>(first + i));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> momentum_fwd_cpu(const Tensor& x,
                                                                    const Tensor& f,
                                                                    std::optional<Tensor> s0,
                                                                    std::optional<Tensor> s1,
                                                                    std::optional<Tensor> s2,
                                                                    std::optional<Tensor> expert_weight,
                                                                    std::optional<Tensor> offsets,
                                                                    std::optional<Tensor> inverse,
                                                                    std::optional<Tensor> norm_weight,
                                                                    std::optional<Tensor> norm_bias,
                                                                    std::optional<Tensor> mu,
                                                                    std::optional<Tensor> gamma,
                                                                    std::optional<Tensor> seed,
                                                                    std::vector<double> numbers,
                                                                    std::string kind,
                                                                    int64_t num_states,
                                                                    std::optional<double> norm_eps,
                                                                    double dropout_p,
                                                                    bool keeps_f) {
  const int64_t tokens = x.size(0), width = x.size(1), total = tokens * width;
  const Numbers c = numbers_of(numbers, mu, gamma);
  const ForwardFn forward = forward_of(kind_of(kind));
  const Dropout dropping(seed, dropout_p);

  const std::optional<Tensor> packed[] = {torch::stable::contiguous(x),
                                          torch::stable::contiguous(f),
                                          molex::packed(s0),
                                          molex::packed(s1),
                                          molex::packed(s2)};
  const Source from_x = molex::source_of(packed[0]), from_f = molex::source_of(packed[1]);
  const Source from_s[] = {
      molex::source_of(packed[2]), molex::source_of(packed[3]), molex::source_of(packed[4])};
  const ScalarType state_dtype = s0 ? s0->scalar_type() : ScalarType::Float;

  Tensor y = molex::new_result(x, {tokens, width});
  std::vector<Tensor> states;
  for (int64_t i = 0; i < 3; ++i) {
    states.push_back(i < num_states ? molex::new_result(x, {tokens, width}, state_dtype)
                                    : molex::new_result(x, {0}, state_dtype));
  }
  Tensor kept = keeps_f ? molex::new_result(f, {tokens, width}) : torch::stable::new_empty(f, {0});
  const Target to_y = molex::target_of(y), to_kept = molex::target_of(kept);
  const Target to_n[] = {
      molex::target_of(states[0]), molex::target_of(states[1]), molex::target_of(states[2])};

  const std::optional<Tensor> weight_of_norm = molex::packed(norm_weight),
                              bias_of_norm = molex::packed(norm_bias);
  Scratch parameters(2, norm_eps ? width : 0);
  const float* scale = nullptr;
  const float* shift = nullptr;
  if (norm_eps && weight_of_norm)
    scale = molex::read(molex::source_of(weight_of_norm), 0, width, parameters[0]);
  if (norm_eps && bias_of_norm) shift = molex::read(molex::source_of(bias_of_norm), 0, width, parameters[1]);

  const bool combined = expert_weight.has_value();
  const int64_t top_k = combined ? expert_weight->size(1) : 0;
  const std::optional<Tensor> weights = molex::packed(expert_weight), rows = molex::packed(inverse);
  std::vector<float> gates_scratch(combined ? tokens * top_k : 0);
  const float* gates = nullptr;
  const int64_t* row_of = nullptr;
  int64_t num_here = 0;
  if (combined) {
    gates = molex::read(molex::source_of(weights), 0, tokens * top_k, gates_scratch.data());
    row_of = rows->const_data_ptr<int64_t>();
    const Tensor ends = torch::stable::contiguous(*offsets);
    num_here = ends.const_data_ptr<int32_t>()[ends.size(0) - 1];
  }

  const int64_t span = combined || norm_eps ? width : kSpan;
  const int64_t spans = (total + span - 1) / span;
  torch::stable::parallel_for(0, spans, std::max<int64_t>(1, kGrain / span), [&](int64_t begin, int64_t end) {
    Scratch scratch(10, span);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * span, count = std::min(span, total - first);
      const float* mine = nullptr;
      if (combined) {
        float* sum = scratch[1];
        bool any = false;
        for (int64_t k = 0; k < top_k; ++k) {
          const int64_t row = row_of[index * top_k + k];
          if (row >= num_here) continue;
          const float* one = molex::read(from_f, row * width, count, scratch[0]);
          any ? add_scaled(sum, one, gates[index * top_k + k], count)
              : scale_into(sum, one, gates[index * top_k + k], count);
          any = true;
        }
        if (!any) std::memset(sum, 0, count * sizeof(float));
        if (dropping.on) drop(dropping, sum, first, count);
        mine = sum;
        if (keeps_f) {
          float* there = molex::place(to_kept, first, sum);
          if (there != sum) std::memcpy(there, sum, count * sizeof(float));
          molex::write(to_kept, first, count, sum);
        }
      } else {
        mine = molex::read(from_f, first, count, scratch[1]);
      }
      Forward a{};
      a.x = molex::read(from_x, first, count, scratch[2]);
      a.f = mine;
      if (from_s[0]) a.s0 = molex::read(from_s[0], first, count, scratch[3]);
      if (from_s[1]) a.s1 = molex::read(from_s[1], first, count, scratch[4]);
      if (from_s[2]) a.s2 = molex::read(from_s[2], first, count, scratch[5]);
      a.y = molex::place(to_y, first, scratch[6]);
      float* const n[] = {molex::place(to_n[0], first, scratch[7]),
                          num_states > 1 ? molex::place(to_n[1], first, scratch[8]) : nullptr,
                          num_states > 2 ? molex::place(to_n[2], first, scratch[9]) : nullptr};
      a.n0 = n[0], a.n1 = n[1], a.n2 = n[2];
      forward(a, count, c);
      if (norm_eps) {
        normalise(a.y, count, static_cast<float>(*norm_eps));
        scale_and_shift(a.y, scale, shift, count);
      }
      molex::write(to_y, first, count, a.y);
      for (int64_t i = 0; i < num_states; ++i) molex::write(to_n[i], first, count, n[i]);
    }
  });
  return {y, states[0], states[1], states[2], kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> momentum_bwd_cpu(
    const Tensor& like,
    std::optional<Tensor> dy,
    std::optional<Tensor> g0,
    std::optional<Tensor> g1,
    std::optional<Tensor> g2,
    std::optional<Tensor> x,
    std::optional<Tensor> f,
    std::optional<Tensor> s0,
    std::optional<Tensor> s1,
    std::optional<Tensor> s2,
    std::optional<Tensor> norm_weight,
    std::optional<Tensor> mu,
    std::optional<Tensor> gamma,
    std::optional<Tensor> seed,
    std::vector<double> numbers,
    std::string kind,
    int64_t num_states,
    std::optional<double> norm_eps,
    double dropout_p,
    bool from_state,
    ScalarType x_dtype,
    ScalarType f_dtype,
    ScalarType state_dtype,
    std::vector<bool> needs) {
  const int64_t tokens = like.size(0), width = like.size(1), total = tokens * width;
  const Numbers c = numbers_of(numbers, mu, gamma);
  const BackwardFn backward = backward_of(kind_of(kind));
  const OutputFn output = output_of(kind_of(kind));
  const Dropout dropping(seed, dropout_p);

  constexpr int kDy = 0, kG0 = 1, kG1 = 2, kG2 = 3, kX = 4, kF = 5, kS0 = 6, kS1 = 7, kS2 = 8, kInputs = 9;
  const std::optional<Tensor> packed[kInputs] = {molex::packed(dy),
                                                 molex::packed(g0),
                                                 molex::packed(g1),
                                                 molex::packed(g2),
                                                 molex::packed(x),
                                                 molex::packed(f),
                                                 molex::packed(s0),
                                                 molex::packed(s1),
                                                 molex::packed(s2)};
  Source from[kInputs];
  for (int i = 0; i < kInputs; ++i) from[i] = molex::source_of(packed[i]);

  constexpr int kDx = 0, kDf = 1, kD0 = 2, kD1 = 3, kD2 = 4, kOutputs = 5;
  const ScalarType dtypes[kOutputs] = {x_dtype, f_dtype, state_dtype, state_dtype, state_dtype};
  std::vector<Tensor> gradients;
  Target to[kOutputs];
  for (int i = 0; i < kOutputs; ++i) {
    gradients.push_back(needs[i] ? molex::new_result(like, {tokens, width}, dtypes[i])
                                 : molex::new_result(like, {0}, dtypes[i]));
    if (needs[i]) to[i] = molex::target_of(gradients[i]);
  }
  const bool needs_norm = needs[5], needs_numbers = needs[6];
  const std::optional<Tensor> weight_of_norm = molex::packed(norm_weight);
  Scratch parameters(1, norm_eps ? width : 0);
  const float* scale = nullptr;
  if (norm_eps && weight_of_norm)
    scale = molex::read(molex::source_of(weight_of_norm), 0, width, parameters[0]);

  const int64_t span = norm_eps ? width : kSpan;
  const int64_t spans = (total + span - 1) / span;
  // The chunks depend on the shape alone, so that their sums do, too.
  const int64_t chunks = std::min(kChunks, spans);
  std::vector<float> norm_sums(needs_norm ? chunks * 2 * width : 0);
  std::vector<double> number_sums(chunks * 2);
  torch::stable::parallel_for(0, chunks, total < kGrain ? chunks : 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(kInputs + kOutputs + 5, span);
    float* const zeros = scratch[kInputs + kOutputs];  // a vector starts as zeros
    float* const normed = scratch[kInputs + kOutputs + 1];
    float* const dmu = scratch[kInputs + kOutputs + 2];
    float* const dgamma = scratch[kInputs + kOutputs + 3];
    float* const before = scratch[kInputs + kOutputs + 4];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* dweight = needs_norm ? norm_sums.data() + chunk * 2 * width : nullptr;
      for (int64_t index = chunk * spans / chunks; index < (chunk + 1) * spans / chunks; ++index) {
        const int64_t first = index * span, count = std::min(span, total - first);
        const float* in[kInputs];
        for (int i = 0; i < kInputs; ++i) {
          in[i] = from[i] ? molex::read(from[i], first, count, scratch[i]) : nullptr;
        }
        float* out[kOutputs];
        for (int i = 0; i < kOutputs; ++i) {
          float* spare = scratch[kInputs + i];
          out[i] = to[i] ? molex::place(to[i], first, spare) : spare;
        }
        const float* upstream = in[kDy] ? in[kDy] : zeros;
        if (norm_eps) {
          const Forward a{in[kX], in[kF], in[kS0], in[kS1], in[kS2], normed, nullptr, nullptr, nullptr};
          output(a, count, c, from_state);
          const float inverse = normalise(normed, count, static_cast<float>(*norm_eps));
          normalise_backward(
              before, upstream, normed, inverse, scale, dweight, dweight ? dweight + width : nullptr, count);
          upstream = before;
        }
        if (to[kDx]) scale_into(out[kDx], upstream, c.keep, count);
        const Backward b{upstream,
                         in[kF],
                         in[kS0],
                         in[kS1],
                         in[kS2],
                         in[kG0] ? in[kG0] : zeros,
                         in[kG1] ? in[kG1] : zeros,
                         in[kG2] ? in[kG2] : zeros,
                         out[kDf],
                         out[kD0],
                         out[kD1],
                         out[kD2],
                         needs_numbers ? dmu : nullptr,
                         needs_numbers ? dgamma : nullptr};
        backward(b, count, c, from_state);
        if (needs_numbers) {
          add_sum(&number_sums[2 * chunk], dmu, count);
          add_sum(&number_sums[2 * chunk + 1], dgamma, count);
        }
        if (dropping.on && to[kDf]) drop(dropping, out[kDf], first, count);
        for (int i = 0; i < kOutputs; ++i) {
          if (to[i]) molex::write(to[i], first, count, out[i]);
        }
      }
    }
  });
  Tensor dnorm = needs_norm ? torch::stable::new_zeros(like, {2, width}, ScalarType::Float)
                            : molex::new_result(like, {0}, ScalarType::Float);
  Tensor dnumbers = needs_numbers ? torch::stable::new_zeros(like, {2}, ScalarType::Float)
                                  : molex::new_result(like, {0}, ScalarType::Float);
  double mu_sum = 0.0, gamma_sum = 0.0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    if (needs_norm)
      add_scaled(dnorm.mutable_data_ptr<float>(), norm_sums.data() + chunk * 2 * width, 1.0f, 2 * width);
    mu_sum += number_sums[2 * chunk];
    gamma_sum += number_sums[2 * chunk + 1];
  }
  if (needs_numbers) {
    dnumbers.mutable_data_ptr<float>()[0] = static_cast<float>(mu_sum);
    dnumbers.mutable_data_ptr<float>()[1] = static_cast<float>(gamma_sum);
  }
  return {gradients[0], gradients[1], gradients[2], gradients[3], gradients[4], dnorm, dnumbers};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("momentum_fwd_cpu", TORCH_BOX(&momentum_fwd_cpu));
  library.impl("momentum_bwd_cpu", TORCH_BOX(&momentum_bwd_cpu));
}
