// Rows of floats for native kernels: operands and results have any supported dtype, arithmetic is fp32.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/common/vector.h"

namespace molex {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Untyped memory of a contiguous tensor; `data` is null where there is no tensor.
struct Source {
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Float;

  explicit operator bool() const { return data != nullptr; }
};

struct Target {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;

  explicit operator bool() const { return data != nullptr; }
};

// Whether a register's worth of halves takes one instruction each way (F16C). All processors with AVX2 have
// it.
template <class Registers>
constexpr bool converts_halves(Registers) {
#if defined(MOLEX_SEVERAL)
  return Registers::kLanes >= 8;
#elif defined(__F16C__) && defined(__GNUC__)
  return true;
#else
  return false;
#endif
}

#if defined(MOLEX_SEVERAL) || (defined(__F16C__) && defined(__GNUC__) && !defined(__clang__))
constexpr int kHalves = 8;  // that one instruction converts
typedef short HalfBits __attribute__((vector_size(kHalves * sizeof(short))));

MOLEX_INLINE void widen_halves(const c10::Half* from, float* to) {
  HalfBits bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  store(to, __builtin_ia32_vcvtph2ps256(bits));
}

MOLEX_INLINE void narrow_halves(const float* from, c10::Half* to) {
  constexpr int kToNearestEven = 0;
  const HalfBits bits = __builtin_ia32_vcvtps2ph256(load<kHalves>(from), kToNearestEven);
  __builtin_memcpy(to, &bits, sizeof(bits));
}
#elif defined(__F16C__) && defined(__clang__)
constexpr int kHalves = 8;
typedef _Float16 Halves __attribute__((vector_size(kHalves * sizeof(_Float16))));

MOLEX_INLINE void widen_halves(const c10::Half* from, float* to) {
  Halves x;
  __builtin_memcpy(&x, from, sizeof(x));
  store(to, __builtin_convertvector(x, Floats<kHalves>));
}

MOLEX_INLINE void narrow_halves(const float* from, c10::Half* to) {
  const Halves x = __builtin_convertvector(load<kHalves>(from), Halves);
  __builtin_memcpy(to, &x, sizeof(x));
}
#else
constexpr int kHalves = 1;
MOLEX_INLINE void widen_halves(const c10::Half* from, float* to) { *to = static_cast<float>(*from); }
MOLEX_INLINE void narrow_halves(const float* from, c10::Half* to) { *to = static_cast<c10::Half>(*from); }
#endif

// Converts from c10::BFloat16 or c10::Half to fp32.
inline constexpr auto widen =
    versions([](auto registers, const auto* from, float* to, int64_t count) MOLEX_LAMBDA_INLINE {
      using Narrow = std::remove_cv_t<std::remove_pointer_t<decltype(from)>>;
      int64_t i = 0;
      if constexpr (std::is_same_v<Narrow, c10::Half> && converts_halves(decltype(registers){})) {
        for (; i + kHalves <= count; i += kHalves) widen_halves(from + i, to + i);
      }
      for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
    });

// Rounds fp32 to c10::BFloat16 or c10::Half, to the nearest, ties to even.
inline constexpr auto narrow =
    versions([](auto registers, const float* from, auto* to, int64_t count) MOLEX_LAMBDA_INLINE {
      using Narrow = std::remove_pointer_t<decltype(to)>;
      int64_t i = 0;
      if constexpr (std::is_same_v<Narrow, c10::Half> && converts_halves(decltype(registers){})) {
        for (; i + kHalves <= count; i += kHalves) narrow_halves(from + i, to + i);
      }
      for (; i < count; ++i) to[i] = static_cast<Narrow>(from[i]);
    });

// Returns floats [first, first + count) of a source: its own memory if that is fp32, else `scratch`.
inline const float* read(const Source& source, int64_t first, int64_t count, float* scratch) {
  switch (source.dtype) {
    case ScalarType::Float:
      return static_cast<const float*>(source.data) + first;
    case ScalarType::BFloat16:
      widen(static_cast<const c10::BFloat16*>(source.data) + first, scratch, count);
      return scratch;
    default:
      widen(static_cast<const c10::Half*>(source.data) + first, scratch, count);
      return scratch;
  }
}

// Returns where to write floats for a target: its own memory if that is fp32, else `scratch`.
inline float* place(const Target& target, int64_t first, float* scratch) {
  return target.dtype == ScalarType::Float ? static_cast<float*>(target.data) + first : scratch;
}

// Rounds what was written at `place` into a target that is not fp32; does nothing for fp32.
inline void write(const Target& target, int64_t first, int64_t count, const float* from) {
  if (target.dtype == ScalarType::BFloat16) {
    narrow(from, static_cast<c10::BFloat16*>(target.data) + first, count);
  } else if (target.dtype == ScalarType::Half) {
    narrow(from, static_cast<c10::Half*>(target.data) + first, count);
  }
}

// Sums term(i) in several vectors side by side. `wider(i)` returns LANES terms from i on, as many as a
// register of the machine holds: of wider vectors GCC makes several times slower code. The order of the sum
// depends on the count alone, not on LANES.
template <int LANES, class Wider, class Term>
MOLEX_INLINE float sum_terms(int64_t count, const Wider& wider, const Term& term) {
  constexpr int kSums = 4, kParts = kWide / LANES;
  Floats<LANES> sums[kSums][kParts] = {};
  const auto add = [&](int k, int64_t i) MOLEX_LAMBDA_INLINE {
    for (int part = 0; part < kParts; ++part) sums[k][part] += wider(i + part * LANES);
  };
  int64_t i = 0;
  for (; i + kSums * kWide <= count; i += kSums * kWide) {
    for (int k = 0; k < kSums; ++k) add(k, i + k * kWide);
  }
  for (; i + kWide <= count; i += kWide) add(0, i);
  float rest = 0.0f;
  for (; i < count; ++i) rest += term(i);
  for (int part = 0; part < kParts; ++part) {
    sums[0][part] = (sums[0][part] + sums[1][part]) + (sums[2][part] + sums[3][part]);
  }
  return rest + sum_of_parts(sums[0]);
}

template <int LANES>
MOLEX_INLINE float sum_of(const float* values, int64_t count) {
  return sum_terms<LANES>(
      count,
      [=](int64_t i) MOLEX_LAMBDA_INLINE { return load<LANES>(values + i); },
      [=](int64_t i) MOLEX_LAMBDA_INLINE { return values[i]; });
}

template <int LANES>
MOLEX_INLINE float dot_of(const float* a, const float* b, int64_t count) {
  return sum_terms<LANES>(
      count,
      [=](int64_t i) MOLEX_LAMBDA_INLINE { return load<LANES>(a + i) * load<LANES>(b + i); },
      [=](int64_t i) MOLEX_LAMBDA_INLINE { return a[i] * b[i]; });
}

inline constexpr auto dot =
    versions([](auto registers, const float* a, const float* b, int64_t count)
                 MOLEX_LAMBDA_INLINE { return dot_of<registers.kLanes>(a, b, count); });

inline constexpr auto add =
    versions([](auto, float* to, const float* from, int64_t count) MOLEX_LAMBDA_INLINE {
      for (int64_t i = 0; i < count; ++i) to[i] += from[i];
    });

inline constexpr auto add_scaled =
    versions([](auto, float* to, const float* from, float weight, int64_t count) MOLEX_LAMBDA_INLINE {
      for (int64_t i = 0; i < count; ++i) to[i] += weight * from[i];
    });

inline constexpr auto scale_into =
    versions([](auto, float* to, const float* from, float weight, int64_t count) MOLEX_LAMBDA_INLINE {
      for (int64_t i = 0; i < count; ++i) to[i] = weight * from[i];
    });

inline constexpr auto scale = versions([](auto, float* to, float weight, int64_t count) MOLEX_LAMBDA_INLINE {
  for (int64_t i = 0; i < count; ++i) to[i] *= weight;
});

// Scratch rows of one thread.
class Scratch {
 public:
  Scratch(int rows, int64_t width) : width_(width), data_(rows * width) {}
  float* operator[](int row) { return data_.data() + row * width_; }

 private:
  int64_t width_;
  std::vector<float> data_;
};

inline bool is_kernel_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// The contiguous form of an optional tensor. It has to live as long as its Source.
inline std::optional<Tensor> packed(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

inline Source source_of(const Tensor& tensor) {
  STD_TORCH_CHECK(is_kernel_dtype(tensor.scalar_type()), "expected float32, bfloat16 or float16");
  return {tensor.const_data_ptr(), tensor.scalar_type()};
}

inline Source source_of(const std::optional<Tensor>& tensor) {
  return tensor ? source_of(*tensor) : Source{};
}

// A tensor's elements as floats, in a copy.
inline std::vector<float> floats_of(const Tensor& tensor) {
  const Tensor kept = torch::stable::contiguous(tensor);
  std::vector<float> values(kept.numel());
  const float* from = read(source_of(kept), 0, kept.numel(), values.data());
  if (from != values.data()) std::copy_n(from, kept.numel(), values.data());
  return values;
}

// Empty if there is no tensor.
inline std::vector<float> floats_of(const std::optional<Tensor>& tensor) {
  return tensor ? floats_of(*tensor) : std::vector<float>();
}

// The value of a tensor of one element.
inline float scalar_of(const Tensor& tensor) {
  float scratch;
  return *read(source_of(tensor), 0, 1, &scratch);
}

inline Target target_of(Tensor& tensor) { return {tensor.mutable_data_ptr(), tensor.scalar_type()}; }

}  // namespace molex
