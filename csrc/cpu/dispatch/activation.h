// Activations of one row of pre-activation values, and their gradients, in fp32.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace molex {

// (up + up_shift) gate sigmoid(alpha gate), of a gate of at most `limit` and an up in [-up_limit, up_limit].
struct Clamps {
  float alpha, limit, up_limit, up_shift;
};

// Computes act(z), or act(gate) * up if the pre-activation z holds the halves gate and up.
class Activation {
 public:
  // `pointwise`: relu, relu_squared, gelu, gelu_tanh, silu or clamped_swiglu, which alone has `numbers`:
  // those of `Clamps`. `layout`: plain, concat or interleaved.
  Activation(const std::string& pointwise, const std::string& layout, const std::vector<double>& numbers);

  // The number of pre-activation values of a row whose activated width is `width`.
  int64_t pre_activation_width(int64_t width) const { return layout_ == Layout::kPlain ? width : 2 * width; }

  // The number of floats that a call needs in `scratch`.
  static int64_t scratch(int64_t width) { return 4 * width; }

  bool is_gated() const { return layout_ != Layout::kPlain; }
  bool is_interleaved() const { return layout_ == Layout::kInterleaved; }

  // acted [count] = act(gate) * up, or act(gate) if up is null. They may be of several rows.
  void pointwise(const float* gate, const float* up, float* acted, int64_t count) const;

  // acted [width] = act(pre_activation).
  void forward(const float* pre_activation, float* acted, int64_t width, float* scratch) const;

  // Computes acted as well, and dpre_activation = scale * upstream * act'(pre_activation).
  void backward(const float* pre_activation,
                const float* upstream,
                float scale,
                float* acted,
                float* dpre_activation,
                int64_t width,
                float* scratch) const;

 private:
  enum class Pointwise { kRelu, kReluSquared, kGelu, kGeluTanh, kSilu, kClamped } pointwise_;
  template <class Run>
  static void with(Pointwise pointwise, const Run& run);
  enum class Layout { kPlain, kConcat, kInterleaved } layout_;
  Clamps clamps_{};
};

}  // namespace molex
