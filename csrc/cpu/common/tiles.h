// Products of bf16 on matrix tiles: eight tiles of 16 rows of 64 bytes, sums in fp32.
//
// A body is written once, for a `Machine` that names its vectors and its tiles:
//
//   constexpr auto f = tiled([](auto machine, ...) MOLEX_LAMBDA_INLINE {
//     using Machine = decltype(machine);
//     typename Machine::Tiles tiles;
//     tiles.template zero<0>();
//     ...
//   });
//
// and runs on Intel's AMX where the processor has it and Linux permits it, or, where
// MOLEX_CPU_TILES=emulated asks for it, on plain C++ that does the same. `tile_path()` says which of the two
// runs, or that neither does; a body must not be called then. Before the first call a sample on AMX is
// compared with plain C++; where it is wrong, or with MOLEX_CPU_TILES=none, nothing runs on tiles.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string_view>

#include "cpu/common/columns.h"
#include "cpu/common/vector.h"

#if defined(MOLEX_SEVERAL) && __GNUC__ >= 12 && defined(__linux__)
#define MOLEX_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace molex {

// kWrong: the processor's AMX gives other results than the emulation, and is not used.
enum class TilePath { kNone, kWrong, kAmx, kEmulated };

#if defined(MOLEX_AMX)
inline bool amx_is_permitted() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of edx
  unsigned a, b, c, d;
  if (!kHasV4 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile))
    return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return false;  // AVX512_BF16
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#else
inline bool amx_is_permitted() { return false; }
#endif

template <int LANES>
struct Bf16Of {
  typedef uint16_t Values __attribute__((vector_size(LANES * sizeof(uint16_t))));
  typedef uint32_t Bits __attribute__((vector_size(LANES * sizeof(uint32_t))));
};

// A float rounded to bf16, to the nearest, ties to even, in the upper half of its bits.
template <int LANES>
MOLEX_INLINE typename Bf16Of<LANES>::Bits bf16_bits(Floats<LANES> x) {
  using Bits = typename Bf16Of<LANES>::Bits;
  const Bits bits = (Bits)x;
  const Bits rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  return (Bits)select(x == x, (Floats<LANES>)rounded, (Floats<LANES>)(bits | 0x7fc00000u)) & 0xffff0000u;
}

// What it computes stands outside of the templates, so that the library has it once.
class EmulatedTiles {
 public:
  // What has not been loaded is NaN.
  EmulatedTiles() { std::memset(tiles_, 0xff, sizeof(tiles_)); }

  static void configure() {}
  static void release() {}

  template <int T>
  void zero() {
    std::memset(tiles_[T], 0, sizeof(Tile));
  }
  template <int T>
  void load(const void* from, int64_t stride) {
    copy(from, stride, tiles_[T], kRowBytes);
  }
  template <int T>
  void store(void* to, int64_t stride) const {
    copy(tiles_[T], kRowBytes, to, stride);
  }
  // Adds the products of pairs; numbers below the normal ones count as 0.
  template <int C, int A, int B>
  void dot() {
    add_products(tiles_[C], tiles_[A], tiles_[B]);
  }

 private:
  static constexpr int kRows = 16, kDwords = 16, kRowBytes = kDwords * sizeof(uint32_t);
  using Tile = uint32_t[kRows][kDwords];

  static float normal(float x) { return (x < 0 ? -x : x) < std::numeric_limits<float>::min() ? 0.0f : x; }
  static float number(uint32_t bits) { return normal(std::bit_cast<float>(bits)); }

  __attribute__((noinline)) static void copy(const void* from,
                                             int64_t from_stride,
                                             void* to,
                                             int64_t stride) {
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(
          static_cast<char*>(to) + r * stride, static_cast<const char*>(from) + r * from_stride, kRowBytes);
    }
  }
  __attribute__((noinline)) static void add_products(Tile& c, const Tile& a, const Tile& b) {
    for (int m = 0; m < kRows; ++m) {
      float sums[kDwords];
      std::memcpy(sums, c[m], sizeof(sums));
      for (int k = 0; k < kDwords; ++k) {
        const float low = number(a[m][k] << 16), high = number(a[m][k] & 0xffff0000u);
        for (int n = 0; n < kDwords; ++n) {
          sums[n] = normal(sums[n] + low * number(b[k][n] << 16));
          sums[n] = normal(sums[n] + high * number(b[k][n] & 0xffff0000u));
        }
      }
      std::memcpy(c[m], sums, sizeof(sums));
    }
  }

  Tile tiles_[8];
};

// For any processor, in one version.
struct EmulatedMachine {
  static constexpr int kLanes = 4;
  using Tiles = EmulatedTiles;
  using V = Floats<kLanes>;

  // Rounds two vectors, one after the other.
  static MOLEX_INLINE void narrow(V first, V second, uint16_t* to) {
    using Values = typename Bf16Of<kLanes>::Values;
    const Values parts[] = {__builtin_convertvector(bf16_bits<kLanes>(first) >> 16, Values),
                            __builtin_convertvector(bf16_bits<kLanes>(second) >> 16, Values)};
    __builtin_memcpy(to, parts, sizeof(parts));
  }
  // Rounds two vectors, their lanes in turn.
  static MOLEX_INLINE void interleave(V even, V odd, uint16_t* to) {
    const auto pairs = bf16_bits<kLanes>(even) >> 16 | bf16_bits<kLanes>(odd);
    __builtin_memcpy(to, &pairs, sizeof(pairs));
  }
  static MOLEX_INLINE V widen_halves(const uint16_t* from) {
    V x;
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = std::bit_cast<c10::Half>(from[lane]);
    return x;
  }
  static MOLEX_INLINE void narrow_halves(V x, uint16_t* to) {
    for (int lane = 0; lane < kLanes; ++lane) to[lane] = std::bit_cast<uint16_t>(c10::Half(x[lane]));
  }
  // Exchanges the rows and columns of 16 x 16 numbers of 4 bytes; strides count numbers.
  static MOLEX_INLINE void turn_16(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
    const char* const source = static_cast<const char*>(from);
    char* const target = static_cast<char*>(to);
    for (int64_t r = 0; r < 16; r += 4) {
      for (int64_t c = 0; c < 16; c += 4) {
        V block[4];
        for (int64_t i = 0; i < 4; ++i)
          __builtin_memcpy(&block[i], source + ((r + i) * from_stride + c) * 4, sizeof(V));
        turn(block);
        for (int64_t i = 0; i < 4; ++i)
          __builtin_memcpy(target + ((c + i) * to_stride + r) * 4, &block[i], sizeof(V));
      }
    }
  }
  static void expect_write(const void*) {}
  // The 32 numbers of two rows in turn, as a row of each of two tiles of pairs.
  static MOLEX_INLINE void pair(const uint16_t* even,
                                const uint16_t* odd,
                                uint16_t* first,
                                uint16_t* second) {
    for (int i = 0; i < 16; ++i) {
      first[2 * i] = even[i], first[2 * i + 1] = odd[i];
      second[2 * i] = even[16 + i], second[2 * i + 1] = odd[16 + i];
    }
  }
};

#if defined(MOLEX_AMX)

// The instructions are written out: a function that inlines an intrinsic has to be compiled for it itself.
struct AmxTiles {
  static void configure() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) config.bytes[t] = 64, config.rows[t] = 16;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  static void release() { asm volatile("tilerelease" : : : "memory"); }

  template <int T>
  MOLEX_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  MOLEX_INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  MOLEX_INLINE void store(void* to, int64_t stride) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
  }
  template <int C, int A, int B>
  MOLEX_INLINE void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

struct AmxMachine {
  static constexpr int kLanes = 16;
  using Tiles = AmxTiles;
  using V = Floats<kLanes>;
  typedef int16_t Shorts __attribute__((vector_size(64)));

  static MOLEX_INLINE Shorts rounded_pair(V first, V second) {
    Shorts result;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(result) : "v"(first), "v"(second));
    return result;
  }
  static MOLEX_INLINE void narrow(V first, V second, uint16_t* to) {
    const Shorts result = rounded_pair(first, second);
    __builtin_memcpy(to, &result, sizeof(result));
  }
  static MOLEX_INLINE void interleave(V even, V odd, uint16_t* to) {
    const Shorts order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const Shorts result = __builtin_shuffle(rounded_pair(even, odd), order);
    __builtin_memcpy(to, &result, sizeof(result));
  }
  static MOLEX_INLINE V widen_halves(const uint16_t* from) {
    typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
    V x;
    asm("vcvtph2ps %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const Halves*>(from)));
    return x;
  }
  static MOLEX_INLINE void narrow_halves(V x, uint16_t* to) {
    typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
    asm("vcvtps2ph $0, %1, %0" : "=m"(*reinterpret_cast<Halves*>(to)) : "v"(x));
  }
  // Four numbers of each of four rows in a register are turned at a time, and whole rows are written: who
  // reads as a whole what was written in parts has to wait.
  static MOLEX_INLINE void turn_16(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
    for (int64_t c = 0; c < 16; c += 4) {
      const float* const source = static_cast<const float*>(from) + c;
      float* const target = static_cast<float*>(to) + c * to_stride;
      const V x = every_fourth(source, from_stride), y = every_fourth(source + from_stride, from_stride);
      const V z = every_fourth(source + 2 * from_stride, from_stride);
      const V w = every_fourth(source + 3 * from_stride, from_stride);
      const V a = merged<0>(x, z), b = merged<0>(y, w), d = merged<2>(x, z), e = merged<2>(y, w);
      put(merged<0>(a, b), target);
      put(merged<2>(a, b), target + to_stride);
      put(merged<0>(d, e), target + 2 * to_stride);
      put(merged<2>(d, e), target + 3 * to_stride);
    }
  }
  // Brings a line to the first-level cache to be written.
  static MOLEX_INLINE void expect_write(const void* line) { asm volatile("prefetchw (%0)" : : "r"(line)); }
  static MOLEX_INLINE void pair(const uint16_t* even,
                                const uint16_t* odd,
                                uint16_t* first,
                                uint16_t* second) {
    const Shorts low = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    Shorts rows[2];
    __builtin_memcpy(&rows[0], even, sizeof(Shorts));
    __builtin_memcpy(&rows[1], odd, sizeof(Shorts));
    const Shorts results[] = {__builtin_shuffle(rows[0], rows[1], low),
                              __builtin_shuffle(rows[0], rows[1], low + int16_t{16})};
    __builtin_memcpy(first, &results[0], sizeof(Shorts));
    __builtin_memcpy(second, &results[1], sizeof(Shorts));
  }

 private:
  // The four numbers at `from` and those 4, 8 and 12 rows on.
  static MOLEX_INLINE V every_fourth(const float* from, int64_t stride) {
    typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
    const auto four = [&](int64_t row) { return reinterpret_cast<const Four*>(from + row * stride); };
    V x;
    asm("vmovups %1, %x0" : "=v"(x) : "m"(*four(0)));
    asm("vinsertf32x4 $1, %1, %0, %0" : "+v"(x) : "m"(*four(4)));
    asm("vinsertf32x4 $2, %1, %0, %0" : "+v"(x) : "m"(*four(8)));
    asm("vinsertf32x4 $3, %1, %0, %0" : "+v"(x) : "m"(*four(12)));
    return x;
  }
  // Of each four numbers of two vectors, those from FIRST on, in turn.
  template <int FIRST>
  static MOLEX_INLINE V merged(V a, V b) {
    const Ints<16> order = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
    return __builtin_shuffle(a, b, order + FIRST);
  }
  static MOLEX_INLINE void put(V x, float* to) { __builtin_memcpy(to, &x, sizeof(x)); }
};

template <class Body, class... Arguments>
__attribute__((target("arch=x86-64-v4"))) auto run_amx(Arguments... arguments) {
  return Body{}(AmxMachine{}, arguments...);
}

#endif

// A product of small whole numbers, which any order of sums gives exactly, and its roundings.
struct TileSample {
  static constexpr int kSide = 16, kArea = kSide * kSide;
  struct Results {
    alignas(64) float sums[kArea];
    alignas(64) uint16_t narrowed[kArea], interleaved[kArea];
  };

  static uint16_t whole(int n) { return std::bit_cast<uint32_t>(static_cast<float>(n)) >> 16; }

  template <class Machine>
  MOLEX_LAMBDA_INLINE void operator()(Machine, Results* to) const {
    constexpr int kLanes = Machine::kLanes;
    alignas(64) uint16_t a[2 * kArea], b[2 * kArea];
    for (int i = 0; i < 2 * kArea; ++i) a[i] = whole(i * 7 % 29 - 14), b[i] = whole(i * 11 % 31 - 15);
    typename Machine::Tiles tiles;
    Machine::Tiles::configure();
    tiles.template zero<1>();
    tiles.template load<4>(a, 64);
    tiles.template load<7>(b, 64);
    for (int i = 0; i < 3; ++i) tiles.template dot<1, 4, 7>();
    tiles.template store<1>(to->sums, 64);
    Machine::Tiles::release();
    const float* const from = to->sums;
    for (int i = 0; i < kArea; i += 2 * kLanes) {
      Machine::narrow(load<kLanes>(from + i), load<kLanes>(from + i + kLanes), to->narrowed + i);
    }
    for (int row = 0; row < kSide; row += 2) {
      for (int i = row * kSide; i < (row + 1) * kSide; i += kLanes) {
        Machine::interleave(
            load<kLanes>(from + i), load<kLanes>(from + i + kSide), to->interleaved + 2 * i - row * kSide);
      }
    }
  }
};

// Whether this processor's instructions give what the emulation gives.
inline bool amx_is_right() {
#if defined(MOLEX_AMX)
  TileSample::Results got, expected;
  run_amx<TileSample>(&got);
  TileSample{}(EmulatedMachine{}, &expected);
  return std::memcmp(&got, &expected, sizeof(got)) == 0;
#else
  return false;
#endif
}

inline TilePath tile_path() {
  static const TilePath path = [] {
    const char* asked = std::getenv("MOLEX_CPU_TILES");
    const std::string_view value = asked ? asked : "";
    STD_TORCH_CHECK(value.empty() || value == "amx" || value == "none" || value == "emulated",
                    "MOLEX_CPU_TILES: expected amx, none or emulated, or nothing, got ",
                    asked);
    if (value == "emulated") return TilePath::kEmulated;
    if (value == "none") return TilePath::kNone;
    const bool is_there = amx_is_permitted(), is_right = is_there && amx_is_right();
    if (value == "amx") {
      STD_TORCH_CHECK(is_there,
                      "MOLEX_CPU_TILES=amx: this processor has no AMX, or the system does not permit it");
      STD_TORCH_CHECK(is_right, "MOLEX_CPU_TILES=amx: a sample on this processor's AMX is wrong");
    }
    return is_right ? TilePath::kAmx : is_there ? TilePath::kWrong : TilePath::kNone;
  }();
  return path;
}

inline bool has_tiles() { return tile_path() == TilePath::kAmx || tile_path() == TilePath::kEmulated; }

inline const char* tile_path_name() {
  switch (tile_path()) {
    case TilePath::kAmx:
      return "amx";
    case TilePath::kEmulated:
      return "emulated";
    case TilePath::kWrong:
      return "none: a sample on this processor's AMX is wrong";
    default:
      return "none";
  }
}

// Whether products of tensors of this dtype run on tiles; those of fp16 in two terms of bf16.
inline bool multiplies_on_tiles(torch::headeronly::ScalarType dtype) {
  return dtype != torch::headeronly::ScalarType::Float && has_tiles();
}

// Whether all of an op that this dtype is given in is bf16 on tiles.
inline bool on_tiles(torch::headeronly::ScalarType dtype) {
  return dtype == torch::headeronly::ScalarType::BFloat16 && has_tiles();
}

template <class Body>
struct TiledBody {
  template <class... Arguments>
  auto operator()(Arguments... arguments) const {
#if defined(MOLEX_AMX)
    if (tile_path() == TilePath::kAmx) return run_amx<Body>(arguments...);
#endif
    return Body{}(EmulatedMachine{}, arguments...);
  }
};

// Makes the versions of a body, which must not capture anything.
template <class Body>
constexpr TiledBody<Body> tiled(Body) {
  return {};
}

// The tiles of a thread are configured while this lives.
class TileScope {
 public:
  TileScope() {
#if defined(MOLEX_AMX)
    if (tile_path() == TilePath::kAmx) AmxTiles::configure();
#endif
  }
  ~TileScope() {
#if defined(MOLEX_AMX)
    if (tile_path() == TilePath::kAmx) AmxTiles::release();
#endif
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

}  // namespace molex
