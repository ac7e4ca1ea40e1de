// Tiles of tokens: how a thread reads them and multiplies them by the queries. For single_query_attention_kernels.cpp
// alone.
#pragma once

#include "common/vec.h"
#include "single_query_attention.h"

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

typedef SingleQueryAttentionParams Params;
typedef SingleQueryAttentionPart Part;

constexpr int kTile = 16;                      // tokens held in cache at a time
constexpr int kPair = 2;                       // queries that share each load of a token
constexpr int kVectors = TF_VECTOR_BYTES / 8;  // vectors of channels accumulated in registers together, at most

// Buffers of one thread. Channels are padded with zeros to whole vectors, queries to whole pairs. Rows lie an odd
// number of cache lines apart, so that a column of them does not fall into one set of the cache.
template <typename A>
struct Scratch {
  int64_t channels, pitch, queries;
  A *query, *grad_context;            // [queries, pitch]
  A *context, *grad_query;            // [queries, pitch]
  A* tile;                            // [kTile, pitch], tokens less their means
  A *scores, *weights;                // [queries, kTile]
  A* total;                           // [queries, lanes], partial sums of the online softmax
  A *maximum, *keep;                  // [queries], of the online softmax
  A *delta, *query_mean, *grad_mean;  // [queries]

  static int64_t layout(Scratch* s, void* memory, int64_t channels, int64_t queries) {
    const int64_t c = round_up(channels, VecOf<A>::lanes), q = round_up(queries, kPair);
    A* next = static_cast<A*>(memory);
    A** const matrices[] = {&s->query, &s->grad_context, &s->context, &s->grad_query};
    A** const rows[] = {&s->scores, &s->weights};
    A** const vectors[] = {&s->maximum, &s->keep, &s->delta, &s->query_mean, &s->grad_mean};
    const int64_t line = 64 / sizeof(A),
                  pitch = round_up(c, line) / line % 2 ? round_up(c, line) : round_up(c, line) + line;
    for (A** m : matrices) *m = next, next += q * pitch;
    for (A** r : rows) *r = next, next += round_up(q * kTile, line);
    for (A** v : vectors) *v = next, next += round_up(q, line);
    s->total = next, next += q * VecOf<A>::lanes;
    s->tile = next, next += kTile * pitch;
    s->channels = c, s->pitch = pitch, s->queries = q;
    return reinterpret_cast<char*>(next) - static_cast<char*>(memory);
  }
};

template <typename T>
int64_t scratch_bytes(int64_t channels, int64_t queries) {
  typedef typename Accumulator<T>::type A;
  Scratch<A> s;
  return Scratch<A>::layout(&s, nullptr, channels, queries);
}

// f(channel, Constant<how many vectors from there on>) over padded channels, widest first.
template <typename A, int vectors = kVectors, typename F>
TF_INLINE void each_block(int64_t channels, F f, int64_t c = 0) {
  constexpr int width = vectors * VecOf<A>::lanes;
  for (; c + width <= channels; c += width) f(c, Constant<vectors>());
  if constexpr (vectors > 1) each_block<A, vectors / 2>(channels, f, c);
}

// Copies rows into a zero-padded matrix of the accumulation type.
template <typename T, typename A>
void widen_rows(const T* rows, int64_t stride, int64_t count, int64_t channels, A* out, const Scratch<A>& s) {
  for (int64_t r = 0; r < s.queries; ++r) {
    A* const row = out + r * s.pitch;
    if (r < count) {
      each_vector<A>(channels, [&](int64_t c, int64_t n) { store(row + c, load_lanes(rows + r * stride + c, n)); });
    } else {
      for (int64_t c = 0; c < s.channels; c += VecOf<A>::lanes) store(row + c, Vec<A>{});
    }
  }
}

template <typename A>
A row_sum(const A* row, const Scratch<A>& s) {
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
template <typename T>
struct TileRows {
  const T* row[kTile];
  int count;

  TileRows(const Params& p, const Part& part, int64_t first) {
    count = part.end - first < kTile ? int(part.end - first) : kTile;
    const bool has_extra = p.extra_token != nullptr;
    const T* const tokens = static_cast<const T*>(p.tokens) + part.at_token;
    for (int t = 0; t < kTile; ++t) {
      const int64_t j = first + (t < count ? t : count - 1);
      row[t] = has_extra && j == 0 ? static_cast<const T*>(p.extra_token) + part.image * p.extra_token_stride
                                   : tokens + (j - has_extra) * p.tokens_stride;
    }
  }
};

// Fills s.tile with the rows, less their means where they are normalised: n_t = tile[t] * rstd[t].
template <typename T, typename A>
TF_INLINE void load_tile(const Params& p, const TileRows<T>& rows, const Scratch<A>& s, A (&rstd)[kTile]) {
  constexpr int lanes = VecOf<A>::lanes;
  static_assert(kTile % lanes == 0, "a tile is made of whole groups of rows");
  for (int first = 0; first < kTile; first += lanes) {
    const T* const* row = rows.row + first;
    A* const tile = s.tile + first * s.pitch;
    Vec<A> sums[lanes], mean{};
    if (p.normalize) {
      for (int t = 0; t < lanes; ++t) {
        Vec<A> sum{};
        each_vector<A>(p.channels, [&](int64_t c, int64_t n) { sum += load_lanes(row[t] + c, n); });
        sums[t] = sum;
      }
      mean = sum_each<A>(sums) / A(p.channels);
    }
    for (int t = 0; t < lanes; ++t) {
      Vec<A> sum{};
      each_vector<A>(p.channels, [&](int64_t c, int64_t n) {
        const Vec<A> centred = first_lanes<A>(load_lanes(row[t] + c, n) - mean[t], n);
        store(tile + t * s.pitch + c, centred);
        sum += centred * centred;
      });
      sums[t] = sum;
    }
    const Vec<A> variance = sum_each<A>(sums) / A(p.channels) + A(p.eps);
    for (int t = 0; t < lanes; ++t) rstd[first + t] = p.normalize ? 1 / __builtin_sqrt(variance[t]) : 1;
  }
}

// out[q][t] = matrix[q] . n_t
template <typename A>
TF_INLINE void dot_tile(const A* matrix, const A (&rstd)[kTile], const Scratch<A>& s, A* out, Prefetch& next) {
  constexpr int lanes = VecOf<A>::lanes;
  constexpr int tokens = lanes / kPair;
  for (int t = 0; t < kTile; t += tokens) {
    const A* const tile = s.tile + t * s.pitch;
    for (int64_t q = 0; q < s.queries; q += kPair) {
      const A* const query = matrix + q * s.pitch;
      Vec<A> sums[lanes] = {};
      for (int64_t c = 0; c < s.channels; c += lanes) {
        next.line();
        const Vec<A> first = load(query + c), second = load(query + s.pitch + c);
#pragma GCC unroll 8
        for (int i = 0; i < tokens; ++i) {
          const Vec<A> token = load(tile + i * s.pitch + c);
          sums[i] += first * token;
          sums[tokens + i] += second * token;
        }
      }
      const Vec<A> dots = sum_each<A>(sums);
      __builtin_memcpy(out + q * kTile + t, &dots, sizeof(dots) / 2);
      __builtin_memcpy(out + (q + 1) * kTile + t, reinterpret_cast<const char*>(&dots) + sizeof(dots) / 2,
                       sizeof(dots) / 2);
    }
  }
  for (int64_t q = 0; q < s.queries; ++q)
    for (int t = 0; t < kTile; t += lanes) store(out + q * kTile + t, load(out + q * kTile + t) * load(rstd + t));
}

// out[q] = out[q] * keep[q] + sum_t weights[q][t] tile[t]
template <typename A>
TF_INLINE void accumulate_tile(const A* weights, const Scratch<A>& s, A* out, Prefetch& next) {
  constexpr int lanes = VecOf<A>::lanes;
  each_block<A>(s.channels, [&](int64_t c, auto vectors) {
    for (int64_t q = 0; q < s.queries; q += kPair) {
      constexpr int count = decltype(vectors)::value;
      A* const rows[kPair] = {out + q * s.pitch + c, out + (q + 1) * s.pitch + c};
      Vec<A> sums[kPair][count];
#pragma GCC unroll 8
      for (int i = 0; i < count; ++i) {
        sums[0][i] = load(rows[0] + i * lanes) * s.keep[q];
        sums[1][i] = load(rows[1] + i * lanes) * s.keep[q + 1];
      }
      for (int t = 0; t < kTile; ++t) {
        next.line();
        const A w0 = weights[q * kTile + t], w1 = weights[(q + 1) * kTile + t];
#pragma GCC unroll 8
        for (int i = 0; i < count; ++i) {
          const Vec<A> token = load(s.tile + t * s.pitch + c + i * lanes);
          sums[0][i] += token * w0;
          sums[1][i] += token * w1;
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < count; ++i) {
        store(rows[0] + i * lanes, sums[0][i]);
        store(rows[1] + i * lanes, sums[1][i]);
      }
    }
  });
}

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
