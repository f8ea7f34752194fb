// Activations of one row of hidden values, and their gradients, in fp32.

#pragma once

#include <cstdint>
#include <string>

namespace molex {

// act(hidden), or act(gate) * up where the hidden vector holds two halves.
class Activation {
 public:
  // `pointwise`: relu, gelu, gelu_tanh or silu. `layout`: plain, concat or interleaved.
  Activation(const std::string& pointwise, const std::string& layout);

  // Hidden values of a row whose activated width is `width`.
  int64_t hidden(int64_t width) const { return layout_ == Layout::kPlain ? width : 2 * width; }

  // Floats that a call may use of `scratch`.
  static int64_t scratch(int64_t width) { return 4 * width; }

  // acted [width] = act(hidden).
  void forward(const float* hidden, float* acted, int64_t width, float* scratch) const;

  // Also dhidden = scale * upstream * act'(hidden).
  void backward(const float* hidden,
                const float* upstream,
                float scale,
                float* acted,
                float* dhidden,
                int64_t width,
                float* scratch) const;

 private:
  enum class Pointwise { kRelu, kGelu, kGeluTanh, kSilu } pointwise_;
  template <class Run>
  static void with(Pointwise pointwise, const Run& run);
  enum class Layout { kPlain, kConcat, kInterleaved } layout_;
};

}  // namespace molex
