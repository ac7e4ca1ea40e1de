// How the backward kernel of dynamic_mixing is cut up into blocks, and what lies in a block's shared memory.
#pragma once

#include <type_traits>

#include "dynamic_mixing_backward.h"
#include "dynamic_mixing_plan.h"

namespace tokenfusion {
namespace dynamic_mixing {

constexpr int kBackwardRows = 16;  // of a tile at most
// Warps of a block at most: float32 needs twice the registers.
TF_HOST_DEVICE constexpr int backward_warps(int itemsize) { return itemsize == 4 ? 8 : 16; }

// Tiles of 16 tokens with which a generator never fits into shared memory.
TF_HOST_DEVICE constexpr bool is_large(int tiles, int itemsize) { return tiles * itemsize > 4; }

// Where a row is: in the tensors, and of which image and line it is a segment.
struct alignas(16) BackwardRow {
  int64_t x, grad_mixed, grad_x;
  int image, line;
};

// How the threads of a block share the pieces of all rows and tokens: each has pieces of one row.
struct Sweep {
  int at_once;  // pieces of a row and a token
  int tokens;   // at once
};

// Blocks stay and take one tile of rows after the other. Pitches are in elements, arrays begin at so many bytes.
struct BackwardPlan {
  int width, inputs, columns;  // channels of a segment; numbers that generate its logits; and the bias, and zeros
  int warps, rows;             // of a block, of a tile
  bool resident;               // the generator stays in shared memory; else each warp copies the part that it needs
  int chunk, chunks;           // channels of a segment in shared memory together
  int blocks, of_multiprocessor, tiles;
  Sweep vectors, numbers;    // of channels, in 16 bytes; of compressed numbers
  int pairs;                 // of tiles of 8 inputs
  int pairs_at_once, parts;  // whose gradients warps make, each a part of their sums
  int per_reduced;           // 2^16 / d, rounded up

  int weight_pitch, logit_pitch, input_pitch, pitch;
  int of_rows;                // BackwardRow [rows]
  int weight;                 // [n * n, weight_pitch] in the order of a row's logits; or [warps, 2 n, weight_pitch]
  int logits;                 // [rows, logit_pitch]: probabilities, then the gradients of logits
  int inputs_at;              // [rows, input_pitch]: compressed numbers, 1, zeros
  int x, grad_mixed, grad_x;  // [rows, n, pitch]
  int partial;                // float [warps, 256]
  int shared_bytes;

  // Whether it fits.
  bool layout(int padded_tokens, int itemsize, int64_t most_bytes) {
    if (resident && is_large(padded_tokens / 16, itemsize)) return false;
    const int unit = 16 / itemsize, logit_count = padded_tokens * padded_tokens;
    const auto odd = [unit](int count) {  // rows lie an odd number of 16 bytes apart: no two lanes meet in a bank
      const int units = divide_up(count, unit);
      return (units + (units % 2 == 0 ? 1 : 0)) * unit;
    };
    weight_pitch = odd(resident ? columns : 16);
    logit_pitch = odd(logit_count);
    input_pitch = odd(columns);
    pitch = odd(divide_up(chunk, 8) * 8);
    chunks = divide_up(width, chunk);
    pairs = divide_up(inputs, 16), pairs_at_once = pairs < warps ? pairs : warps;
    parts = warps / pairs_at_once;
    const int token_bytes = rows * padded_tokens * pitch * itemsize, logit_bytes = rows * logit_pitch * itemsize;
    shared_bytes = 0;
    of_rows = take(rows * sizeof(BackwardRow));
    weight = take((resident ? logit_count : warps * 2 * padded_tokens) * weight_pitch * itemsize);
    logits = take(logit_bytes);
    inputs_at = take(rows * input_pitch * itemsize);
    x = take(token_bytes), grad_mixed = take(token_bytes);
    grad_x = padded_tokens <= 32 || chunks > 1 ? x : take(token_bytes);  // else x is read after it was written
    partial = pairs <= warps && warps * 1024 <= logit_bytes ? logits : take(warps * 1024);
    return shared_bytes <= most_bytes;
  }

 private:
  int take(int bytes) {
    const int first = shared_bytes;
    shared_bytes += divide_up(bytes, 16) * 16;
    return first;
  }
};

// The roomiest that fits into `most_bytes`, the least where none does.
inline void choose_layout(BackwardPlan& plan, int padded_tokens, int itemsize, int64_t most_bytes) {
  const auto fits = [&](int warps, int rows, bool resident) {
    plan.warps = warps, plan.rows = rows, plan.resident = resident;
    plan.chunk = divide_up(plan.width, 8) * 8;
    if (plan.layout(padded_tokens, itemsize, most_bytes)) return true;
    if (rows > warps) return false;
    for (plan.chunk = (plan.chunk - 1) / 16 * 16; plan.chunk >= 16; plan.chunk -= 16)
      if (plan.layout(padded_tokens, itemsize, most_bytes)) return true;
    return false;
  };
  constexpr int kReserved = 1024;  // of the shared memory of a block, by the driver
  const int64_t half = (most_bytes - kReserved) / 2;
  for (int rows = kBackwardRows; rows > 0; rows /= 2) {
    plan.warps = 8, plan.rows = rows, plan.resident = true;
    plan.chunk = divide_up(plan.width, 8) * 8;
    plan.of_multiprocessor = 2;
    if (itemsize == 2 && plan.layout(padded_tokens, itemsize, half)) return;
    plan.of_multiprocessor = 1;
    for (int warps = backward_warps(itemsize); warps >= 4; warps /= 2)
      if (fits(warps, rows, true) || fits(warps, rows, false)) return;
  }
}

inline BackwardPlan make_backward_plan(const DynamicMixingBackward& p, int itemsize, int64_t most_bytes,
                                       int multiprocessors) {
  BackwardPlan plan{};
  plan.width = p.channels / p.segments, plan.inputs = p.tokens * p.reduced;
  plan.columns = dynamic_mixing_columns(plan.inputs), plan.per_reduced = divide_up(1 << 16, p.reduced);
  choose_layout(plan, dynamic_mixing_padded_tokens(p.tokens), itemsize, most_bytes);
  plan.tiles = divide_up(p.rows, plan.rows);
  const int most = multiprocessors * plan.of_multiprocessor;
  plan.blocks = plan.tiles < most ? plan.tiles : most;
  const auto sweep = [&plan](int pieces) {
    const int each = 32 * plan.warps / plan.rows, at_once = pieces < each ? pieces : each;
    return Sweep{at_once, each / at_once};
  };
  plan.vectors = sweep(plan.chunk / (16 / itemsize)), plan.numbers = sweep(p.reduced);
  return plan;
}

template <typename T_, int kTiles_, bool kResident_>
struct BackwardVariant {
  typedef T_ T;
  static constexpr int kTiles = kTiles_;
  static constexpr bool kResident = kResident_;
};

// f(BackwardVariant) for the dtype and the number of tokens.
template <typename F>
auto with_variant(Dtype dtype, int tokens, bool resident, F f) {
  const auto of_tiles = [&](auto element, auto tiles) {
    typedef decltype(element) T;
    constexpr int kTiles = decltype(tiles)::value;
    if constexpr (!is_large(kTiles, sizeof(T)))
      if (resident) return f(BackwardVariant<T, kTiles, true>());
    return f(BackwardVariant<T, kTiles, false>());
  };
  return with_dtype(dtype, [&](auto element) {
    switch (dynamic_mixing_padded_tokens(tokens)) {
      case 16:
        return of_tiles(element, std::integral_constant<int, 1>());
      case 32:
        return of_tiles(element, std::integral_constant<int, 2>());
      default:
        return of_tiles(element, std::integral_constant<int, 4>());
    }
  });
}

}  // namespace dynamic_mixing
}  // namespace tokenfusion
