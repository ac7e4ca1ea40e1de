// Tiles of tokens, and the buffers of the thread that works on them. For single_query_attention_kernels.cpp alone.
#pragma once

#include "common/vec.h"
#include "single_query_attention.h"

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

typedef SingleQueryAttentionParams Params;
typedef SingleQueryAttentionPart Part;

constexpr int kVectors = TF_VECTOR_BYTES / 8;        // vectors of channels accumulated in registers together, at most
constexpr int kPair = 2;                             // queries that share each load of a token
constexpr bool kHasTriples = TF_VECTOR_BYTES == 32;  // or three, whose sums leave four of 16 registers

// Queries as each_group takes them: whole pairs, or anything that pairs and triples make.
TF_INLINE int64_t padded_queries(int64_t queries) {
  return kHasTriples && queries > 1 ? queries : round_up(queries, kPair);
}

// f(first query, Constant<how many from there on>) over padded queries: triples first.
template <typename F>
TF_INLINE void each_group(int64_t queries, F f) {
  int64_t q = 0;
  if constexpr (kHasTriples)
    for (; (queries - q) % kPair != 0 || queries - q > 2 * kPair; q += kPair + 1) f(q, Constant<kPair + 1>());
  for (; q < queries; q += kPair) f(q, Constant<kPair>());
}

// Buffers of one thread, for tiles of so many tokens. Channels are padded with zeros to whole `unit`s, queries to whole
// groups. Rows lie an odd number of cache lines apart, so that a column of them does not fall into one set of the
// cache.
template <typename A, int tile>
struct Scratch {
  static constexpr int kTile = tile;
  int64_t channels, pitch, queries;
  A *query, *grad_context;            // [queries, pitch]
  A *context, *grad_query;            // [queries, pitch]
  A *scores, *weights;                // [queries, kTile], one after the other
  A* total;                           // [queries, lanes], partial sums of the online softmax
  A *maximum, *keep;                  // [queries], of the online softmax
  A *delta, *query_mean, *grad_mean;  // [queries]
  void* end;

  Scratch(void* memory, int64_t channels_, int64_t queries_, int64_t unit = VecOf<A>::lanes)
      : channels(round_up(channels_, unit)), queries(padded_queries(queries_)) {
    A* next = static_cast<A*>(memory);
    A** const matrices[] = {&query, &grad_context, &context, &grad_query};
    A** const vectors[] = {&maximum, &keep, &delta, &query_mean, &grad_mean};
    const int64_t line = 64 / sizeof(A), whole = round_up(channels, line);
    pitch = whole / line % 2 ? whole : whole + line;
    for (A** m : matrices) *m = next, next += queries * pitch;
    for (A** v : vectors) *v = next, next += round_up(queries, line);
    total = next, next += queries * VecOf<A>::lanes;
    scores = next, weights = next + queries * kTile;
    end = weights + queries * kTile;
  }
};

// f(channel, Constant<how many vectors from there on>) over padded channels, widest first.
template <typename A, int vectors = kVectors, typename F>
TF_INLINE void each_block(int64_t channels, F f, int64_t c = 0) {
  constexpr int width = vectors * VecOf<A>::lanes;
  for (; c + width <= channels; c += width) f(c, Constant<vectors>());
  if constexpr (vectors > 1) each_block<A, vectors / 2>(channels, f, c);
}

// Copies rows into a zero-padded matrix of the accumulation type.
template <typename T, typename A, int tile>
void widen_rows(const T* rows, int64_t stride, int64_t count, int64_t channels, A* out, const Scratch<A, tile>& s) {
  for (int64_t r = 0; r < s.queries; ++r) {
    A* const row = out + r * s.pitch;
    const int64_t present = r < count ? channels : 0;
    each_vector<A>(present, [&](int64_t c, int64_t n) { store(row + c, load_lanes(rows + r * stride + c, n)); });
    for (int64_t c = round_up(present, VecOf<A>::lanes); c < s.channels; c += VecOf<A>::lanes) store(row + c, Vec<A>{});
  }
}

template <typename A, int tile>
A row_sum(const A* row, const Scratch<A, tile>& s) {
  Vec<A> v{};
  for (int64_t c = 0; c < s.channels; c += VecOf<A>::lanes) v += load(row + c);
  return sum_lanes<A>(v);
}

// Fetches the next tile's lines, one at a time, while this tile is computed with.
struct Prefetch {
  const char* at;

  explicit Prefetch(const void* first) : at(static_cast<const char*>(first)) {}
  TF_INLINE void line() {
    __builtin_prefetch(at, 0, 2);
    at += 64;
  }
};

// The rows of the tokens that make up one tile. Beyond `count` the last row is repeated; its weights are zero.
template <typename T, int tile>
struct TileRows {
  const T* row[tile];
  int count;
  bool evenly_spaced;  // tokens_stride apart, all of them

  TileRows(const Params& p, const Part& part, int64_t first) {
    const bool has_extra = p.extra_token != nullptr;
    count = part.end - first < tile ? int(part.end - first) : tile;
    evenly_spaced = count == tile && !(has_extra && first == 0);
    const T* const tokens = static_cast<const T*>(p.tokens) + part.at_token;
    for (int t = 0; t < tile; ++t) {
      const int64_t j = first + (t < count ? t : count - 1);
      row[t] = has_extra && j == 0 ? static_cast<const T*>(p.extra_token) + part.image * p.extra_token_stride
                                   : tokens + (j - has_extra) * p.tokens_stride;
    }
  }
};

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
