// Activations as polynomials that the compiler vectorises, accurate to a few units in the last place.

#include "cpu/dispatch/activation.h"

#include "cpu/common/rows.h"
#include "cpu/common/softmax.h"

namespace molex {

namespace {

// Rational approximation on [-4, 4], outside of which erf is +-1 in fp32.
MOLEX_INLINE float erf_of(float x) {
  x = x > 4.0f ? 4.0f : x < -4.0f ? -4.0f : x;
  const float s = x * x;
  float p = -2.72614225801306e-10f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return x * p / q;
}

struct Point {
  float value, slope;
};

struct Relu {
  static MOLEX_INLINE Point at(float x) { return {x < 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f}; }
};

struct ReluSquared {
  static MOLEX_INLINE Point at(float x) {
    const float positive = x < 0.0f ? 0.0f : x;
    return {positive * positive, 2.0f * positive};
  }
};

struct Gelu {
  static MOLEX_INLINE Point at(float x) {
    const float below = 0.5f + 0.5f * erf_of(x * 0.707106781f);
    return {x * below, below + x * 0.398942280f * exp_of(-0.5f * x * x)};
  }
};

// sigmoid(x) and 1 - sigmoid(x). The second is computed on its own: near 0 a subtraction would lose all its
// digits.
struct Sigmoids {
  float of, rest;

  MOLEX_INLINE explicit Sigmoids(float x) {
    const float power = exp_of(x < 0.0f ? x : -x), large = 1.0f / (1.0f + power), small = power * large;
    of = x < 0.0f ? small : large;
    rest = x < 0.0f ? large : small;
  }
};

// (1 + tanh(u)) / 2 = sigmoid(2 u).
struct GeluTanh {
  static MOLEX_INLINE Point at(float x) {
    const Sigmoids s(1.59576912f * (x + 0.044715f * x * x * x));
    return {x * s.of, s.of + x * s.of * s.rest * 1.59576912f * (1.0f + 0.134145f * x * x)};
  }
};

struct Silu {
  static MOLEX_INLINE Point at(float x) {
    const Sigmoids s(x);
    return {x * s.of, s.of + x * s.of * s.rest};
  }
};

template <class F>
constexpr auto forward_row =
    versions([](auto, const float* gate, const float* up, float* acted, int64_t width) MOLEX_LAMBDA_INLINE {
      if (up) {
        MOLEX_INDEPENDENT
        for (int64_t i = 0; i < width; ++i) acted[i] = F::at(gate[i]).value * up[i];
      } else {
        MOLEX_INDEPENDENT
        for (int64_t i = 0; i < width; ++i) acted[i] = F::at(gate[i]).value;
      }
    });

template <class F>
constexpr auto backward_row = versions([](auto,
                                          const float* gate,
                                          const float* up,
                                          const float* upstream,
                                          float scale,
                                          float* acted,
                                          float* dgate,
                                          float* dup,
                                          int64_t width) MOLEX_LAMBDA_INLINE {
  if (up) {
    MOLEX_INDEPENDENT
    for (int64_t i = 0; i < width; ++i) {
      const Point point = F::at(gate[i]);
      const float dacted = scale * upstream[i];
      acted[i] = point.value * up[i];
      dgate[i] = dacted * up[i] * point.slope;
      dup[i] = dacted * point.value;
    }
  } else {
    MOLEX_INDEPENDENT
    for (int64_t i = 0; i < width; ++i) {
      const Point point = F::at(gate[i]);
      acted[i] = point.value;
      dgate[i] = scale * upstream[i] * point.slope;
    }
  }
});

// The halves of the clamped activation and their slopes. A value at a bound passes its gradient and
// NaN does not.
MOLEX_INLINE Point clamped_gate(float x, const Clamps& c) {
  const float gate = x > c.limit ? c.limit : x;
  const Sigmoids s(c.alpha * gate);
  return {gate * s.of, s.of + c.alpha * gate * s.of * s.rest};
}

MOLEX_INLINE Point clamped_up(float x, const Clamps& c) {
  const float up = x > c.up_limit ? c.up_limit : x < -c.up_limit ? -c.up_limit : x;
  return {up + c.up_shift, 1.0f};
}

constexpr auto forward_clamped =
    versions([](auto, const float* gate, const float* up, Clamps clamps, float* acted, int64_t width)
                 MOLEX_LAMBDA_INLINE {
                   MOLEX_INDEPENDENT
                   for (int64_t i = 0; i < width; ++i) {
                     acted[i] = clamped_gate(gate[i], clamps).value * clamped_up(up[i], clamps).value;
                   }
                 });

constexpr auto backward_clamped = versions([](auto,
                                              const float* gate,
                                              const float* up,
                                              Clamps clamps,
                                              const float* upstream,
                                              float scale,
                                              float* acted,
                                              float* dgate,
                                              float* dup,
                                              int64_t width) MOLEX_LAMBDA_INLINE {
  MOLEX_INDEPENDENT
  for (int64_t i = 0; i < width; ++i) {
    const Point g = clamped_gate(gate[i], clamps), u = clamped_up(up[i], clamps);
    const float dacted = scale * upstream[i], dg = dacted * u.value * g.slope,
                du = dacted * g.value * u.slope;
    acted[i] = g.value * u.value;
    dgate[i] = gate[i] <= clamps.limit ? dg : 0.0f;
    dup[i] = up[i] >= -clamps.up_limit && up[i] <= clamps.up_limit ? du : 0.0f;
  }
});

constexpr auto take_apart =
    versions([](auto, const float* pairs, float* even, float* odd, int64_t count) MOLEX_LAMBDA_INLINE {
      MOLEX_INDEPENDENT
      for (int64_t i = 0; i < count; ++i) {
        even[i] = pairs[2 * i];
        odd[i] = pairs[2 * i + 1];
      }
    });

constexpr auto put_together =
    versions([](auto, const float* even, const float* odd, float* pairs, int64_t count) MOLEX_LAMBDA_INLINE {
      MOLEX_INDEPENDENT
      for (int64_t i = 0; i < count; ++i) {
        pairs[2 * i] = even[i];
        pairs[2 * i + 1] = odd[i];
      }
    });

}  // namespace

// Calls run.operator()<F>() with the struct F of the activation.
template <class Run>
void Activation::with(Pointwise pointwise, const Run& run) {
  switch (pointwise) {
    case Pointwise::kRelu:
      return run.template operator()<Relu>();
    case Pointwise::kGelu:
      return run.template operator()<Gelu>();
    case Pointwise::kGeluTanh:
      return run.template operator()<GeluTanh>();
    case Pointwise::kReluSquared:
      return run.template operator()<ReluSquared>();
    case Pointwise::kSilu:
    case Pointwise::kClamped:  // which has rows of its own
      return run.template operator()<Silu>();
  }
}

Activation::Activation(const std::string& pointwise,
                       const std::string& layout,
                       const std::vector<double>& numbers)
    : pointwise_(pointwise == "relu"           ? Pointwise::kRelu
                 : pointwise == "relu_squared" ? Pointwise::kReluSquared
                 : pointwise == "gelu"         ? Pointwise::kGelu
                 : pointwise == "gelu_tanh"    ? Pointwise::kGeluTanh
                 : pointwise == "silu"         ? Pointwise::kSilu
                                               : Pointwise::kClamped),
      layout_(layout == "plain"    ? Layout::kPlain
              : layout == "concat" ? Layout::kConcat
                                   : Layout::kInterleaved) {
  const bool clamps = pointwise_ == Pointwise::kClamped;
  STD_TORCH_CHECK(!clamps || pointwise == "clamped_swiglu", "activation: unknown ", pointwise);
  STD_TORCH_CHECK(layout_ != Layout::kInterleaved || layout == "interleaved", "layout: unknown ", layout);
  STD_TORCH_CHECK(numbers.size() == (clamps ? 4 : 0), "numbers: not as many as ", pointwise, " has");
  if (!clamps) return;
  STD_TORCH_CHECK(layout_ != Layout::kPlain, "layout: expected a gated one for ", pointwise);
  const auto number = [&](int i) { return static_cast<float>(numbers[i]); };
  clamps_ = {number(0), number(1), number(2), number(3)};
}

void Activation::pointwise(const float* gate, const float* up, float* acted, int64_t count) const {
  if (pointwise_ == Pointwise::kClamped) return forward_clamped(gate, up, clamps_, acted, count);
  with(pointwise_, [&]<class F>() { forward_row<F>(gate, up, acted, count); });
}

void Activation::forward(const float* pre_activation, float* acted, int64_t width, float* scratch) const {
  const float* gate = pre_activation;
  const float* up = layout_ == Layout::kConcat ? pre_activation + width : nullptr;
  if (layout_ == Layout::kInterleaved) {
    take_apart(pre_activation, scratch, scratch + width, width);
    gate = scratch;
    up = scratch + width;
  }
  pointwise(gate, up, acted, width);
}

void Activation::backward(const float* pre_activation,
                          const float* upstream,
                          float scale,
                          float* acted,
                          float* dpre_activation,
                          int64_t width,
                          float* scratch) const {
  const auto run = [&](const float* gate, const float* up, float* dgate, float* dup) {
    if (pointwise_ == Pointwise::kClamped) {
      return backward_clamped(gate, up, clamps_, upstream, scale, acted, dgate, dup, width);
    }
    with(pointwise_,
         [&]<class F>() { backward_row<F>(gate, up, upstream, scale, acted, dgate, dup, width); });
  };
  if (layout_ != Layout::kInterleaved) {
    const bool gated = layout_ == Layout::kConcat;
    run(pre_activation, gated ? pre_activation + width : nullptr, dpre_activation, dpre_activation + width);
    return;
  }
  float *gate = scratch, *up = gate + width, *dgate = up + width, *dup = dgate + width;
  take_apart(pre_activation, gate, up, width);
  run(gate, up, dgate, dup);
  put_together(dgate, dup, dpre_activation, width);
}

}  // namespace molex
