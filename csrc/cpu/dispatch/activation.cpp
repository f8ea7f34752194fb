// Activations as polynomials, accurate to a few units in the last place.

#include "cpu/dispatch/activation.h"

#include <limits>

#include "cpu/common/elements.h"
#include "cpu/common/softmax.h"

namespace molex {

namespace {

// 1 / x for x from 1 on. AVX-512 divides sixteen numbers in as many cycles; an estimate of 14 bits and one
// step of Newton's are as exact but for the last bit.
template <class V>
MOLEX_INLINE V inverse_of(V x) {
#if defined(MOLEX_SEVERAL)
  if constexpr (sizeof(V) == 64) {
    V y;
    asm("vrcp14ps %1, %0" : "=v"(y) : "v"(x));
    return y + y * (1.0f - x * y);
  }
#endif
  return 1.0f / x;
}

// Rational approximation on [-4, 4], outside of which erf is +-1 in fp32.
template <class V>
MOLEX_INLINE V erf_of(V x) {
  const V most = V{} + 4.0f;
  x = select(x > most, most, select(x < -most, -most, x));
  const V s = x * x;
  V p = V{} + -2.72614225801306e-10f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  V q = V{} + -1.45660718464996e-05f;
  q = q * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return x * p / q;
}

// Activations at a float or at each lane of a vector.
template <class V>
struct Point {
  V value, slope;
};

struct Relu {
  template <class V>
  static MOLEX_INLINE Point<V> at(V x) {
    return {select(x < 0.0f, V{}, x), select(x <= 0.0f, V{}, V{} + 1.0f)};
  }
};

struct ReluSquared {
  template <class V>
  static MOLEX_INLINE Point<V> at(V x) {
    const V positive = select(x < 0.0f, V{}, x);
    return {positive * positive, 2.0f * positive};
  }
};

struct Gelu {
  template <class V>
  static MOLEX_INLINE Point<V> at(V x) {
    const V below = 0.5f + 0.5f * erf_of(x * 0.707106781f);
    return {x * below, below + x * 0.398942280f * exp_of(-0.5f * x * x)};
  }
};

// sigmoid(x) and 1 - sigmoid(x). The second is computed on its own: near 0 a subtraction would lose all its
// digits.
template <class V>
struct Sigmoids {
  V of, rest;

  MOLEX_INLINE explicit Sigmoids(V x) {
    const V below = float_of<V>(bits_of(x) | std::numeric_limits<int32_t>::min());  // -|x|
    const V power = exponential(below), large = inverse_of(1.0f + power), small = power * large;
    of = select(x < 0.0f, small, large);
    rest = select(x < 0.0f, large, small);
  }
};

// (1 + tanh(u)) / 2 = sigmoid(2 u).
struct GeluTanh {
  template <class V>
  static MOLEX_INLINE Point<V> at(V x) {
    const Sigmoids<V> s(1.59576912f * (x + 0.044715f * x * x * x));
    return {x * s.of, s.of + x * s.of * s.rest * 1.59576912f * (1.0f + 0.134145f * x * x)};
  }
};

struct Silu {
  template <class V>
  static MOLEX_INLINE Point<V> at(V x) {
    const Sigmoids<V> s(x);
    return {x * s.of, s.of + x * s.of * s.rest};
  }
};

template <class F>
constexpr auto forward_row = versions(
    [](auto registers, const float* gate, const float* up, float* acted, int64_t width) MOLEX_LAMBDA_INLINE {
      for_elements<registers.kLanes>(width, [&](auto lanes, int64_t i) MOLEX_LAMBDA_INLINE {
        const auto value = F::at(load_elements<lanes>(registers, gate + i)).value;
        store_elements<lanes>(
            registers, acted + i, up ? value * load_elements<lanes>(registers, up + i) : value);
      });
    });

template <class F>
constexpr auto backward_row = versions([](auto registers,
                                          const float* gate,
                                          const float* up,
                                          const float* upstream,
                                          float scale,
                                          float* acted,
                                          float* dgate,
                                          float* dup,
                                          int64_t width) MOLEX_LAMBDA_INLINE {
  for_elements<registers.kLanes>(width, [&](auto lanes, int64_t i) MOLEX_LAMBDA_INLINE {
    const auto point = F::at(load_elements<lanes>(registers, gate + i));
    const auto dacted = scale * load_elements<lanes>(registers, upstream + i);
    if (up) {
      const auto other = load_elements<lanes>(registers, up + i);
      store_elements<lanes>(registers, acted + i, point.value * other);
      store_elements<lanes>(registers, dgate + i, dacted * other * point.slope);
      store_elements<lanes>(registers, dup + i, dacted * point.value);
    } else {
      store_elements<lanes>(registers, acted + i, point.value);
      store_elements<lanes>(registers, dgate + i, dacted * point.slope);
    }
  });
});

// The halves of the clamped activation and their slopes. A value at a bound passes its gradient and
// NaN does not.
template <class V>
MOLEX_INLINE Point<V> clamped_gate(V x, const Clamps& c) {
  const V gate = select(x > c.limit, V{} + c.limit, x);
  const Sigmoids<V> s(c.alpha * gate);
  return {gate * s.of, s.of + c.alpha * gate * s.of * s.rest};
}

template <class V>
MOLEX_INLINE V clamped_up(V x, const Clamps& c) {
  const V most = V{} + c.up_limit;
  return select(x > most, most, select(x < -most, -most, x)) + c.up_shift;
}

constexpr auto forward_clamped = versions(
    [](auto registers, const float* gate, const float* up, Clamps clamps, float* acted, int64_t width)
        MOLEX_LAMBDA_INLINE {
          for_elements<registers.kLanes>(width, [&](auto lanes, int64_t i) MOLEX_LAMBDA_INLINE {
            store_elements<lanes>(registers,
                                  acted + i,
                                  clamped_gate(load_elements<lanes>(registers, gate + i), clamps).value *
                                      clamped_up(load_elements<lanes>(registers, up + i), clamps));
          });
        });

constexpr auto backward_clamped = versions([](auto registers,
                                              const float* gate,
                                              const float* up,
                                              Clamps clamps,
                                              const float* upstream,
                                              float scale,
                                              float* acted,
                                              float* dgate,
                                              float* dup,
                                              int64_t width) MOLEX_LAMBDA_INLINE {
  for_elements<registers.kLanes>(width, [&](auto lanes, int64_t i) MOLEX_LAMBDA_INLINE {
    using V = Lanes<lanes>;
    const V from_gate = load_elements<lanes>(registers, gate + i),
            from_up = load_elements<lanes>(registers, up + i);
    const Point<V> g = clamped_gate(from_gate, clamps);
    const V u = clamped_up(from_up, clamps), dacted = scale * load_elements<lanes>(registers, upstream + i);
    store_elements<lanes>(registers, acted + i, g.value * u);
    store_elements<lanes>(registers, dgate + i, select(from_gate <= clamps.limit, dacted * u * g.slope, V{}));
    const auto inside = (from_up >= -clamps.up_limit) & (from_up <= clamps.up_limit);
    store_elements<lanes>(registers, dup + i, select(inside, dacted * g.value, V{}));
  });
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
