// A thread's buffers, and the lines of tokens that it reads and writes. For dynamic_mixing_kernels.cpp alone.
#pragma once

#include "common/memory.h"
#include "dynamic_mixing.h"

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

typedef DynamicMixingParams Params;
typedef DynamicMixingView View;

constexpr int kVectors = 2;  // of a panel, whose columns a product computes together

template <typename A>
constexpr int64_t kPanel = kVectors * VecOf<A>::lanes;

// What every way of multiplying works on. A vector that begins inside a row may end beyond it: rows are wider than what
// they hold.
template <typename A>
struct Scratch {
  int64_t tokens, channels, inputs, logits;  // pitches
  A *mixed, *grad;                           // [N, channels]
  A* weights;                                // [N, tokens], indexed [source, target]
  A* grad_compressed;                        // [tile * S, inputs]
  A* rows;                                   // [tile * S, logits]; in backward then their gradients
  A *total, *delta;                          // [channels], [tokens]

  Scratch(const Params& p, Memory& memory) {
    constexpr int64_t lanes = VecOf<A>::lanes, line = 64 / sizeof(A);
    const int64_t rows_of_tile = round_up(p.tile * p.segments, p.tiles ? 32 : 1);
    const int64_t tokens_of_tiles = round_up(p.tokens, p.tiles ? 16 : 1);
    tokens = round_up(p.tokens, lanes);
    channels = round_up(p.channels + lanes, lanes);
    inputs = round_up(p.tokens * p.reduced, kPanel<A>);
    logits = round_up(round_up(p.tokens * p.tokens, kPanel<A>) + lanes, 2 * line) + line;
    mixed = memory.take<A>(tokens_of_tiles * channels);
    grad = memory.take<A>(p.tokens * channels);
    weights = memory.take<A>(p.tokens * tokens);
    grad_compressed = memory.take<A>(rows_of_tile * inputs);
    rows = memory.take<A>(rows_of_tile * logits);
    total = memory.take<A>(channels);
    delta = memory.take<A>(tokens);
  }
};

template <typename T>
TF_INLINE T* token(const Params& p, const View& view, int64_t line, int64_t index) {
  return static_cast<T*>(const_cast<void*>(view.data)) + line / p.lines * view.batch_stride +
         line % p.lines * view.line_stride + index * view.token_stride;
}

template <typename T, typename A>
void read_line(const Params& p, const View& view, int64_t line, const Scratch<A>& s, A* out) {
  for (int64_t n = 0; n < p.tokens; ++n) {
    const T* const row = token<T>(p, view, line, n);
    each_vector<A>(p.channels,
                   [&](int64_t c, int64_t count) { store(out + n * s.channels + c, load_lanes(row + c, count)); });
  }
}

template <typename T, typename A>
void write_line(const Params& p, const View& view, int64_t line, const Scratch<A>& s, const A* in) {
  for (int64_t n = 0; n < p.tokens; ++n) {
    T* const row = token<T>(p, view, line, n);
    each_vector<A>(p.channels,
                   [&](int64_t c, int64_t count) { store_lanes(row + c, load(in + n * s.channels + c), count); });
  }
}

TF_INLINE void assign(bf16& to, bf16 from) { to = from; }
template <typename A, typename T>
TF_INLINE void assign(A& to, T from) {
  to = widen(from);
}

// Of the segments of `count` lines, the numbers that generate their logits: a row of `out`, `pitch` wide, for each.
template <typename T, typename E>
void gather_compressed(const Params& p, int64_t first, int64_t count, int64_t pitch, E* out) {
  const int64_t d = p.reduced;
  for (int64_t line = 0; line < count; ++line)
    for (int64_t n = 0; n < p.tokens; ++n) {
      const T* in = token<T>(p, p.compressed, first + line, n);
      E* to = out + line * p.segments * pitch + n * d;
      for (int64_t segment = 0; segment < p.segments; ++segment, to += pitch)
        for (int64_t i = 0; i < d; ++i) assign(to[i], *in++);
    }
}

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
