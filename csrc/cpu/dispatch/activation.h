// Activations of one row of pre-activation values, and their gradients, in fp32.

#pragma once

#include <cstdint>
#include <string>

namespace molex {

// Computes act(z), or act(gate) * up if the pre-activation z holds the halves gate and up.
class Activation {
 public:
  // `pointwise`: relu, gelu, gelu_tanh or silu. `layout`: plain, concat or interleaved.
  Activation(const std::string& pointwise, const std::string& layout);

  // The number of pre-activation values of a row whose activated width is `width`.
  int64_t pre_activation_width(int64_t width) const { return layout_ == Layout::kPlain ? width : 2 * width; }

  // The number of floats that a call needs in `scratch`.
  static int64_t scratch(int64_t width) { return 4 * width; }

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
  enum class Pointwise { kRelu, kGelu, kGeluTanh, kSilu } pointwise_;
  template <class Run>
  static void with(Pointwise pointwise, const Run& run);
  enum class Layout { kPlain, kConcat, kInterleaved } layout_;
};

}  // namespace molex
