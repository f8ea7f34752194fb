// The experts' MLP on matrix tiles, forward. All products are those of the transposes: rows of a weight are
// tiles as they lie, and the sums of 16 hidden units for 16 rows of x are, after the activation, half a tile
// of the next product. A piece's rows are packed once.

#include "cpu/dispatch/tile_experts.h"

#include <bit>
#include <vector>

#include "cpu/common/tile_blocks.h"
#include "cpu/common/tile_results.h"

namespace molex {

namespace {

// Where a piece is packed: panels of 16 rows of x, and of the activated values.
struct Panels {
  uint16_t *x, *hidden;
  int64_t rows;

  int64_t count() const { return parts(rows, kSide); }
};

struct Scratch {
  uint16_t *gathered, *copies;
  float* sums;
};

struct Up {
  const Activation* activation;
  Matrix weight;      // [H, D]
  const float* bias;  // [H] or null
  Target kept;
  int64_t first;  // the piece's first row of `kept`
  int64_t inner;
  Panels panels;
  Scratch scratch;
  int64_t begin, end;  // hidden units, from a multiple of kDeep on
};

struct Down {
  Matrix weight;  // [D, I]
  const float* bias;
  Matrix packed;  // the piece's rows
  Panels panels;
  Scratch scratch;
  int64_t begin, end;  // columns of the result
};

// Hidden units (or halves of gated ones) of a weight that are one band.
MOLEX_INLINE Matrix every(const Matrix& weight, int64_t first, int64_t count, int64_t step) {
  Matrix band = weight.band(first, count);
  band.row_stride *= step;
  return band;
}

// Writes pre-activations of two tiles side by side, or in turn, as rows of `kept`.
template <class Machine>
MOLEX_INLINE void keep(const Up& up, const float* first, const float* second, int64_t panel, int64_t unit) {
  constexpr int64_t kLanes = Machine::kLanes;
  const Activation& activation = *up.activation;
  const int64_t outer = up.weight.rows, row = panel * kSide;
  const int64_t rows = std::min(kSide, up.panels.rows - row), at = (up.first + row) * outer;
  const int64_t left = up.inner - unit;
  if (!activation.is_gated()) {
    const int64_t columns = std::min(left, kDeep);
    return write_turned<Machine>(first, second - first, nullptr, rows, columns, up.kept, at + unit, outer);
  }
  const int64_t units = std::min(left, kSide);
  if (!activation.is_interleaved()) {
    write_turned<Machine>(first, 0, nullptr, rows, units, up.kept, at + unit, outer);
    write_turned<Machine>(second, 0, nullptr, rows, units, up.kept, at + up.inner + unit, outer);
    return;
  }
  alignas(64) uint32_t made[kArea], turned[kArea];
  for (int64_t i = 0; i < kArea; i += kLanes) {
    Machine::interleave(
        load<kLanes>(first + i), load<kLanes>(second + i), reinterpret_cast<uint16_t*>(made + i));
  }
  Machine::turn_16(made, kSide, turned, kSide);
  uint16_t* const to = static_cast<uint16_t*>(up.kept.data) + at + 2 * unit;
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(to + r * outer, turned + r * kSide, units * sizeof(uint32_t));
  }
}

// Sums of hidden units that wait to be activated: some at each step of the next product, whose tiles leave
// the vector units idle.
template <class Machine>
class Activating {
 public:
  explicit Activating(const Up& up)
      : up_(up),
        gated_(up.activation->is_gated()),
        steps_(std::clamp<int64_t>(parts(up.weight.columns, kDeep), 1, kBlock)),
        hidden_(parts(up.inner, kDeep) * kTile) {}
  MOLEX_INLINE ~Activating() { flush(); }

  // The sums of two tiles, of so many units from `unit` on and of `count` panels from `first` on, are taken
  // during the next product. They may be overwritten after as many steps as the terms have tiles, or kBlock.
  MOLEX_INLINE void open(float* sums, int64_t first, int64_t count, int64_t unit, const int64_t (&units)[2]) {
    flush();
    sums_ = sums, count_ = count;
    units_[0] = units[0], units_[1] = units[1];
    to_ = up_.panels.hidden + first * hidden_ + unit * kSide;
    tiles_ = (gated_ ? 1 : 2) * count;
    // Units of a tile that are taken at once: 2, 4, 8 or 16.
    at_once_ = std::min<int64_t>(std::bit_ceil<uint64_t>(parts(tiles_ * kSide, steps_)), kSide);
    at_once_ = std::max<int64_t>(at_once_, 2);
    tile_ = unit_ = 0;
    if (up_.weight.columns == 0) flush();  // the next product has no step
  }

  // Called at each step of a product.
  MOLEX_INLINE void operator()() {
    for (int64_t left = parts(tiles_ * kSide, steps_); left > 0 && tile_ < tiles_; left -= at_once_) next();
  }

 private:
  MOLEX_INLINE void next() {
    constexpr int64_t kLanes = Machine::kLanes;
    const int64_t a = tile_ / count_, panel = tile_ % count_, size = at_once_ * kSide;
    float* const from = sums_ + tile_ * kArea + unit_ * kSide;
    alignas(64) float acted[kArea];
    up_.activation->pointwise(from, gated_ ? from + count_ * kArea : nullptr, acted, size);
    // Units that there are not are 0 also where x is infinite.
    const int64_t known = std::clamp<int64_t>(units_[a] - unit_, 0, at_once_) * kSide;
    if (known < size) std::memset(acted + known, 0, (size - known) * sizeof(float));
    uint16_t* const to = to_ + panel * hidden_ + (a * kSide + unit_) * kSide;
    for (int64_t i = 0; i < size; i += 2 * kSide) {
      for (int64_t r = i; r < i + kSide; r += kLanes) {
        Machine::interleave(load<kLanes>(acted + r), load<kLanes>(acted + r + kSide), to + 2 * r - i);
      }
    }
    unit_ += at_once_;
    if (unit_ < kSide) return;
    unit_ = 0;
    ++tile_;
  }
  MOLEX_INLINE void flush() {
    while (tile_ < tiles_) next();
  }

  const Up& up_;
  const bool gated_;
  const int64_t steps_, hidden_;
  float* sums_ = nullptr;
  uint16_t* to_ = nullptr;
  int64_t count_ = 0, units_[2] = {}, tiles_ = 0, at_once_ = kSide, tile_ = 0, unit_ = 0;
};

constexpr auto go_up = tiled([](auto machine, const Up* call) MOLEX_LAMBDA_INLINE {
  using Machine = decltype(machine);
  constexpr int64_t kLanes = Machine::kLanes;
  typename Machine::Tiles tiles;
  const Up& up = *call;
  const bool gated = up.activation->is_gated(), interleaved = up.activation->is_interleaved();
  const int64_t panels = up.panels.count(), step = gated ? kSide : kDeep;
  Activating<Machine> activating(up);
  for (int64_t unit = up.begin; unit < up.end; unit += step) {
    // Two tiles of sums: gate and up, or those of consecutive units. `of` gives their first rows.
    const int64_t second = gated ? (interleaved ? 2 * unit + 1 : up.inner + unit) : unit + kSide;
    const int64_t of[] = {gated && interleaved ? 2 * unit : unit, second};
    const int64_t units = std::min(up.inner - unit, kSide);
    const int64_t counts[] = {units, gated ? units : std::clamp<int64_t>(up.inner - second, 0, kSide)};
    const int64_t apart = interleaved ? 2 : 1, used = counts[1] ? 2 : 1;
    const Matrix bands[] = {every(up.weight, of[0], counts[0], apart),
                            counts[1] ? every(up.weight, of[1], counts[1], apart) : Matrix{}};
    const auto take = [&](int64_t first, int64_t count, float* sums) MOLEX_LAMBDA_INLINE {
      const int64_t size = count * kArea;
      if (used < 2) std::memset(sums + size, 0, size * sizeof(float));
      for (int64_t a = 0; a < used && up.bias; ++a) {
        for (int64_t i = 0; i < counts[a]; ++i) {
          const float bias = up.bias[of[a] + i * apart];
          for (int64_t p = 0; p < count; ++p) {
            float* const row = sums + a * size + p * kArea + i * kSide;
            for (int64_t r = 0; r < kSide; r += kLanes) store(row + r, load<kLanes>(row + r) + bias);
          }
        }
      }
      for (int64_t p = 0; p < count && up.kept; ++p) {
        keep<Machine>(up, sums + p * kArea, sums + size + p * kArea, first + p, unit);
      }
      activating.open(sums, first, count, unit, counts);
    };
    multiply_strip<Machine>(
        tiles, bands, used, up.panels.x, panels, up.scratch.copies, up.scratch.sums, activating, take);
  }
  const int64_t hidden = parts(up.inner, kDeep) * kTile;  // a panel's
  const int64_t end = parts(up.end, step) * step, whole = parts(up.end, kDeep) * kDeep;
  for (int64_t p = 0; p < panels && end < whole; ++p) {
    uint16_t* const to = up.panels.hidden + p * hidden + end * kSide;
    std::memset(to, 0, (whole - end) * kSide * sizeof(uint16_t));
  }
});

constexpr auto go_down = tiled([](auto machine, const Down* call) MOLEX_LAMBDA_INLINE {
  using Machine = decltype(machine);
  typename Machine::Tiles tiles;
  const Down& down = *call;
  Waiting<Machine> waiting;
  for (int64_t n = down.begin; n < down.end; n += kDeep) {
    const int64_t used = std::min(down.end - n, kDeep);
    const Matrix bands[] = {down.weight.band(n, std::min(used, kSide)),
                            down.weight.band(n + kSide, std::max<int64_t>(used - kSide, 0))};
    const auto write = [&](int64_t first, int64_t count, const float* sums) MOLEX_LAMBDA_INLINE {
      put_turned(waiting, sums, first, count, down.bias ? down.bias + n : nullptr, down.packed, n, used);
    };
    multiply_strip<Machine>(tiles,
                            bands,
                            parts(used, kSide),
                            down.panels.hidden,
                            down.panels.count(),
                            down.scratch.copies,
                            down.scratch.sums,
                            waiting,
                            write);
  }
});

constexpr auto pack_panel = tiled([](auto machine, const Matrix* rows, uint16_t* to) MOLEX_LAMBDA_INLINE {
  panel_of_pairs<decltype(machine)>(rows->transposed(), 0, to);
});

class Experts {
 public:
  Experts(const Layer& layer, const Assignments& plan, const Matrix& packed, const Target& kept)
      : layer_(layer),
        plan_(plan),
        packed_(packed),
        kept_(kept),
        x_(layer.x),
        up_(layer.w_up, ScalarType::BFloat16),
        down_(layer.w_down, ScalarType::BFloat16),
        b_up_(floats_of(layer.b_up)),
        b_down_(floats_of(layer.b_down)),
        width_(layer.x.size(1)),
        outer_(layer.w_up.size(1)),
        inner_(layer.w_down.size(2)),
        pieces_(pieces_of(
            plan.bounds, 0, plan.bounds.size() - 1, tile_piece(plan.local_rows, std::max(width_, inner_)))),
        panels_(parts(longest_of(pieces_), kSide)) {}

  void run() const {
    const int64_t cuts = cuts_of(pieces_.size());
    cuts == 1 ? run_pieces() : run_parts(cuts);
  }

 private:
  int64_t x_size() const { return panels_ * parts(width_, kDeep) * kTile; }
  int64_t sums_size() const { return strip_sums(panels_, std::max(width_, inner_)); }
  int64_t hidden_size() const { return panels_ * parts(inner_, kDeep) * kTile; }

  int64_t scratch_bytes() const {
    return Arena::bytes(x_size(), ScalarType::BFloat16) + Arena::bytes(kSide * width_, ScalarType::BFloat16) +
           Arena::bytes(kCopies, ScalarType::BFloat16) + Arena::bytes(sums_size());
  }

  static uint16_t* take(Arena& arena, int64_t count) {
    return static_cast<uint16_t*>(arena.matrix(1, count, ScalarType::BFloat16).data);
  }

  Scratch scratch(Arena& arena) const {
    return {take(arena, kSide * width_), take(arena, kCopies), arena.floats(sums_size())};
  }

  void pack(const Piece& piece, const Panels& panels, const Scratch& scratch) const {
    for (int64_t p = 0; p < panels.count(); ++p) {
      const int64_t rows = std::min(kSide, piece.rows - p * kSide);
      const Matrix gathered = matrix_of(scratch.gathered, ScalarType::BFloat16, rows, width_);
      for (int64_t r = 0; r < rows; ++r) {
        x_.copy(plan_.token(piece.first + p * kSide + r), gathered.band(r, 1));
      }
      pack_panel(&gathered, panels.x + p * parts(width_, kDeep) * kTile);
    }
  }

  void up(
      const Piece& piece, const Panels& panels, const Scratch& scratch, int64_t begin, int64_t end) const {
    const Up call{&layer_.activation,
                  up_.of(piece.expert, {}),
                  b_up_.empty() ? nullptr : b_up_.data() + piece.expert * outer_,
                  kept_,
                  piece.first,
                  inner_,
                  panels,
                  scratch,
                  begin,
                  end};
    go_up(&call);
  }

  void down(
      const Piece& piece, const Panels& panels, const Scratch& scratch, int64_t begin, int64_t end) const {
    const Down call{down_.of(piece.expert, {}),
                    b_down_.empty() ? nullptr : b_down_.data() + piece.expert * width_,
                    packed_.band(piece.first, piece.rows),
                    panels,
                    scratch,
                    begin,
                    end};
    go_down(&call);
  }

  // A thread takes whole pieces.
  void run_pieces() const {
    const int64_t bytes = scratch_bytes() + Arena::bytes(hidden_size(), ScalarType::BFloat16);
    share(pieces_.size(), [&](const auto& next) {
      const TileScope scope;
      Arena arena(bytes);
      uint16_t *const x = take(arena, x_size()), *const hidden = take(arena, hidden_size());
      const Scratch mine = scratch(arena);
      for (size_t index = next(); index < pieces_.size(); index = next()) {
        const Piece& piece = pieces_[index];
        const Panels panels{x, hidden, piece.rows};
        pack(piece, panels, mine);
        up(piece, panels, mine, 0, inner_);
        down(piece, panels, mine, 0, width_);
      }
    });
  }

  // There are few pieces: a thread takes some hidden units of one, and then, when all of them are known, some
  // columns of its result.
  void run_parts(int64_t cuts) const {
    const int64_t tasks = pieces_.size() * cuts, size = hidden_size();
    Arena shared(Arena::bytes(pieces_.size() * size, ScalarType::BFloat16));
    uint16_t* const hidden = take(shared, pieces_.size() * size);
    const auto in_parts = [&](int64_t columns, const auto& body) {
      const auto work = [&](const auto& next) {
        const TileScope scope;
        Arena arena(scratch_bytes());
        uint16_t* const x = take(arena, x_size());
        const Scratch mine = scratch(arena);
        for (int64_t task = next(); task < tasks; task = next()) {
          const int64_t index = task / cuts;
          const Columns part(task % cuts, cuts, columns);
          if (part.count == 0) continue;
          const Panels panels{x, hidden + index * size, pieces_[index].rows};
          body(pieces_[index], panels, mine, part.first, part.first + part.count);
        }
      };
      share(tasks, work, false);
    };
    in_parts(inner_, [&](const auto& piece, const auto& panels, const auto& mine, int64_t from, int64_t end) {
      pack(piece, panels, mine);
      up(piece, panels, mine, from, end);
    });
    in_parts(width_, [&](const auto& piece, const auto& panels, const auto& mine, int64_t from, int64_t end) {
      down(piece, panels, mine, from, end);
    });
  }

  const Layer& layer_;
  const Assignments& plan_;
  const Matrix packed_;
  const Target kept_;
  const Rows x_;
  const Weights up_, down_;
  const std::vector<float> b_up_, b_down_;
  const int64_t width_, outer_, inner_;
  const std::vector<Piece> pieces_;
  const int64_t panels_;
};

}  // namespace

void experts_on_tiles(const Layer& layer, const Assignments& plan, const Matrix& packed, const Target& kept) {
  Experts(layer, plan, packed, kept).run();
  if (kept) clear_rows(matrix_of(kept.data, kept.dtype, plan.rows, layer.w_up.size(1)), plan.local_rows);
}

}  // namespace molex
