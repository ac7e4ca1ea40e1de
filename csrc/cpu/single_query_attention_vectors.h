// The products of single_query_attention by vectors. For single_query_attention_kernels.cpp alone.
#pragma once

#include "single_query_attention_tiles.h"

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

// Keeps the compiler from loading a vector again for each use.
template <typename A>
TF_INLINE Vec<A> in_register(Vec<A> v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

// Products of a tile's tokens with queries, whatever dtype the tokens had: functions of their own, as the compiler
// takes long over them, and a call for each tile costs nothing.
template <typename Sum>
class TileProducts {
 public:
  typedef Sum A;
  static constexpr int kTile = 16;  // tokens held in cache at a time

  const Params& p;
  const Scratch<A, kTile> s;

  TileProducts(const Params& params, void* memory) : p(params), s(memory, p.channels, p.queries) {}

  // out[q] = out[q] * keep[q] + sum_t weights[q][t] (tile[t] - mean[t]). What the means have of it is taken from each
  // tile's: the sums of many would be large beside what is left.
  TF_NOINLINE void accumulate(const A* weights, A* out, Prefetch& to_advance) const {
    constexpr int lanes = VecOf<A>::lanes;
    for (int64_t q = 0; q < s.queries; ++q) {
      Vec<A> sum{};
      for (int t = 0; t < kTile && has_means; t += lanes) sum += load(weights + q * kTile + t) * load(mean + t);
      of_means[q] = sum_lanes<A>(sum);
    }
    Prefetch next = to_advance;  // in a register
    each_block<A>(s.channels, [&](int64_t c, auto vectors) {
      each_group(s.queries, [&](int64_t q, auto group) {
        constexpr int count = decltype(vectors)::value, queries = decltype(group)::value;
        A* const rows = out + q * s.pitch + c;
        Vec<A> sums[queries][count];
#pragma GCC unroll 3
        for (int j = 0; j < queries; ++j)
#pragma GCC unroll 8
          for (int i = 0; i < count; ++i)
            sums[j][i] = load(rows + j * s.pitch + i * lanes) * s.keep[q + j] - of_means[q + j];
        for (int t = 0; t < kTile; ++t) {
          next.line();
          const A* const token_row = tile + t * step + c;
          Vec<A> w[queries];
#pragma GCC unroll 3
          for (int j = 0; j < queries; ++j) w[j] = broadcast(weights[(q + j) * kTile + t]);
#pragma GCC unroll 8
          for (int i = 0; i < count; ++i) {
            const Vec<A> token = in_register<A>(load(token_row + i * lanes));
#pragma GCC unroll 3
            for (int j = 0; j < queries; ++j) sums[j][i] += token * w[j];
          }
        }
#pragma GCC unroll 3
        for (int j = 0; j < queries; ++j)
#pragma GCC unroll 8
          for (int i = 0; i < count; ++i) store(rows + j * s.pitch + i * lanes, sums[j][i]);
      });
    });
    to_advance = next;
  }

  // Gradient of the tile's tokens: with dn_t = sum_q p_qt dcontext_q + ds_qt query_q, that of token t is
  // rstd_t (dn_t - mean(dn_t) - n_t mean(dn_t n_t)), whose means come from sums that are known already: grad_mean is
  // the first and slope is rstd_t times the second. out is null for rows beyond the tile's count and for those that
  // need none.
  template <typename Gradient>
  TF_NOINLINE void write_token_gradients(const A (&rstd)[kTile], const A (&grad_mean)[kTile], const A (&slope)[kTile],
                                         Gradient* const (&out)[kTile], int count) const {
    constexpr int lanes = VecOf<A>::lanes;
    const bool adds = p.add_gradients;
    each_block<A>(s.channels, [&](int64_t c, auto vectors) {
      for (int t = 0; t < count; t += 2) {
        constexpr int width = decltype(vectors)::value;
        const int64_t left = p.channels - c - (width - 1) * lanes;
        Vec<A> sums[2][width] = {};
        for (int64_t q = 0; q < s.queries; ++q) {
          const A p0 = s.scores[q * kTile + t], p1 = s.scores[q * kTile + t + 1];
          const A d0 = s.weights[q * kTile + t], d1 = s.weights[q * kTile + t + 1];
#pragma GCC unroll 8
          for (int i = 0; i < width; ++i) {
            const Vec<A> grad = load(s.grad_context + q * s.pitch + c + i * lanes);
            const Vec<A> query = load(s.query + q * s.pitch + c + i * lanes);
            sums[0][i] += grad * p0;
            sums[1][i] += grad * p1;
            sums[0][i] += query * d0;
            sums[1][i] += query * d1;
          }
        }
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
          if (out[t + r] == nullptr) continue;
          Gradient* const to = out[t + r] + c;
          const A* const token = tile + (t + r) * step + c;
          const A offset = grad_mean[t + r] - (has_means ? mean[t + r] * slope[t + r] : 0);
          const Vec<A> factor = broadcast(rstd[t + r]), slopes = broadcast(slope[t + r]), offsets = broadcast(offset);
#pragma GCC unroll 8
          for (int i = 0; i < width; ++i) {
            const int64_t n = i < width - 1 ? lanes : left;  // the last vector alone may end the row
            Vec<A> grad = (sums[r][i] - offsets - load(token + i * lanes) * slopes) * factor;
            if (adds) grad += load_lanes(to + i * lanes, n);
            store_lanes(to + i * lanes, grad, n);
          }
        }
      }
    });
  }

 protected:
  const A* tile;  // tokens, `step` apart: n_t = (tile[t] - mean[t]) rstd_t
  int64_t step;
  bool has_means;  // else they are zeros
  A mean[kTile];
  A* of_means;  // [queries], of a tile: sum_t weights[q][t] mean[t]

  // out[q][t] = matrix[q] . n_t, where rows of the matrix have no mean if the tokens have theirs.
  TF_NOINLINE void multiply(const A* matrix, const A (&rstd)[kTile], A* out, Prefetch& to_advance) const {
    constexpr int lanes = VecOf<A>::lanes;
    Prefetch next = to_advance;  // in a register
    constexpr int tokens = lanes / kPair;
    for (int t = 0; t < kTile; t += tokens) {
      const A* const token_rows = tile + t * step;
      each_group(s.queries, [&](int64_t q, auto group) {
        constexpr int queries = decltype(group)::value;
        const A* const query = matrix + q * s.pitch;
        Vec<A> sums[(queries + queries % kPair) * tokens] = {};
        for (int64_t c = 0; c < s.channels; c += lanes) {
          next.line();
          Vec<A> rows[queries];
#pragma GCC unroll 3
          for (int j = 0; j < queries; ++j) rows[j] = load(query + j * s.pitch + c);
#pragma GCC unroll 8
          for (int i = 0; i < tokens; ++i) {
            const Vec<A> token = in_register<A>(load(token_rows + i * step + c));
#pragma GCC unroll 3
            for (int j = 0; j < queries; ++j) sums[j * tokens + i] += rows[j] * token;
          }
        }
#pragma GCC unroll 3
        for (int j = 0; j < queries; j += kPair) {
          Vec<A> of_pair[lanes];
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) of_pair[i] = sums[j * tokens + i];
          const Vec<A> dots = sum_each<A>(of_pair);
          for (int i = 0; i < kPair && j + i < queries; ++i)
            __builtin_memcpy(out + (q + j + i) * kTile + t, reinterpret_cast<const A*>(&dots) + i * tokens,
                             sizeof(dots) / kPair);
        }
      });
    }
    to_advance = next;
    for (int64_t q = 0; q < s.queries; ++q)
      for (int t = 0; t < kTile; t += lanes) store(out + q * kTile + t, load(out + q * kTile + t) * load(rstd + t));
  }
};

template <typename Dtype>
class VectorProducts : public TileProducts<typename Accumulator<Dtype>::type> {
  typedef TileProducts<typename Accumulator<Dtype>::type> Base;

 public:
  typedef Dtype T;
  typedef typename Base::A A;
  using Base::kTile;
  using Base::p;
  using Base::s;

  VectorProducts(const Params& params, void* memory) : Base(params, memory), copied(static_cast<A*>(s.end)) {
    of_means = copied + kTile * s.pitch;
  }
  void* end() const { return of_means + round_up(s.queries, 64 / sizeof(A)); }

  // Before the tiles of a part, whose sums go to `out`. Products with normalised tokens, which have no mean, are the
  // same with rows less theirs.
  void begin(A* out) const {
    for (int64_t i = 0; i < s.queries * s.pitch; i += VecOf<A>::lanes) store(out + i, Vec<A>{});
    if (!p.normalize) return;
    centre(s.query, s.query_mean);
    if (p.grad_context != nullptr) centre(s.grad_context, s.grad_mean);
  }

  // s.scores[q][t] = query[q] . n_t and, backward, s.weights[q][t] = grad_context[q] . n_t
  TF_INLINE void dot(const TileRows<T, kTile>& rows, A (&rstd)[kTile], Prefetch& next) {
    place(rows, rstd);
    this->multiply(s.query, rstd, s.scores, next);
    if (p.grad_context != nullptr) this->multiply(s.grad_context, rstd, s.weights, next);
  }

  // After the tiles of a part.
  void finish(A*) const {}

 private:
  static constexpr int kChains = 4;
  static constexpr A kNear = 0.25;  // by the variance: products with means further from zero would lose digits
  static constexpr A kFar = 1000;   // by the variance: the rounding of such a mean shows in what is left

  A* copied;  // [kTile, pitch]
  using Base::has_means;
  using Base::mean;
  using Base::of_means;
  using Base::step;
  using Base::tile;

  void centre(A* matrix, A* row_means) const {
    for (int64_t q = 0; q < s.queries; ++q) {
      A* const row = matrix + q * s.pitch;
      each_vector<A>(p.channels,
                     [&](int64_t c, int64_t n) { store(row + c, first_lanes<A>(load(row + c) - row_means[q], n)); });
      row_means[q] = 0;
    }
  }

  // The tile lies in place where that is possible, its rows do not fall into one set of the cache, and their means are
  // near zero.
  TF_INLINE void place(const TileRows<T, kTile>& rows, A (&rstd)[kTile]) {
    has_means = false;
    if constexpr (sizeof(T) == sizeof(A)) {
      constexpr int64_t page = 4096 / sizeof(A);
      if (rows.evenly_spaced && p.channels == s.channels && p.tokens_stride % page != 0) {
        tile = rows.row[0];
        step = p.tokens_stride;
        if (!p.normalize) {
          for (A& of_row : rstd) of_row = 1;
          return;
        }
        if ((has_means = measure(rows, rstd))) return;
      }
    }
    copy_tile(rows, rstd);
    tile = copied;
    step = s.pitch;
  }

  // Of rows as they are, in one pass; whether the means are near zero.
  TF_NOINLINE bool measure(const TileRows<T, kTile>& rows, A (&rstd)[kTile]) {
    constexpr int lanes = VecOf<A>::lanes;
    bool near = true;
    for (int first = 0; first < kTile; first += lanes) {
      Vec<A> sums[lanes], squares[lanes];
      for (int t = 0; t < lanes; ++t) {
        const T* const row = rows.row[first + t];
        Vec<A> sum[kChains] = {}, square[kChains] = {};
        each_chain(p.channels, [&](int64_t c, int64_t, int chain) {
          const Vec<A> x = load(row + c);
          sum[chain] += x;
          square[chain] += x * x;
        });
        sums[t] = sum_of(sum), squares[t] = sum_of(square);
      }
      const Vec<A> means = sum_each<A>(sums) / A(p.channels);
      const Vec<A> variance = sum_each<A>(squares) / A(p.channels) - means * means;
      store(mean + first, means);
      for (int t = 0; t < lanes; ++t) {
        near = near && means[t] * means[t] <= kNear * variance[t];
        rstd[first + t] = 1 / __builtin_sqrt(variance[t] + A(p.eps));
      }
    }
    return near;
  }

  // Copies the rows, less their means where they are normalised: n_t = tile[t] * rstd[t].
  TF_NOINLINE void copy_tile(const TileRows<T, kTile>& rows, A (&rstd)[kTile]) const {
    constexpr int lanes = VecOf<A>::lanes;
    static_assert(kTile % lanes == 0, "a tile is made of whole groups of rows");
    for (int first = 0; first < kTile; first += lanes) {
      Vec<A> squares[lanes];
      A means[lanes];
      for (int t = 0; t < lanes; ++t) {
        const T* const row = rows.row[first + t];
        A* const out = copied + (first + t) * s.pitch;
        Vec<A> sums[kChains] = {}, products[kChains] = {};
        if (p.normalize)
          each_chain(p.channels, [&](int64_t c, int64_t n, int chain) { sums[chain] += load_lanes(row + c, n); });
        const A mean = means[t] = sum_lanes<A>(sum_of(sums)) / A(p.channels);
        each_chain(p.channels, [&](int64_t c, int64_t n, int chain) {
          const Vec<A> centred = first_lanes<A>(load_lanes(row + c, n) - mean, n);
          store(out + c, centred);
          products[chain] += centred * centred;
        });
        squares[t] = sum_of(products);
      }
      const Vec<A> variances = sum_each<A>(squares) / A(p.channels);
      for (int t = 0; t < lanes; ++t) {
        A variance = variances[t];
        if (means[t] * means[t] > kFar * variance) variance = centre_again(copied + (first + t) * s.pitch);
        rstd[first + t] = p.normalize ? 1 / __builtin_sqrt(variance + A(p.eps)) : 1;
      }
    }
  }

  // Returns the variance.
  A centre_again(A* row) const {
    const A mean = row_sum(row, s) / A(p.channels);
    Vec<A> squares{};
    each_vector<A>(p.channels, [&](int64_t c, int64_t n) {
      const Vec<A> centred = first_lanes<A>(load(row + c) - mean, n);
      store(row + c, centred);
      squares += centred * centred;
    });
    return sum_lanes<A>(squares) / A(p.channels);
  }

  // f as of each_vector, and which of several independent sums the vector goes to.
  template <typename F>
  static TF_INLINE void each_chain(int64_t channels, F f) {
    constexpr int64_t lanes = VecOf<A>::lanes, group = kChains * lanes;
    const int64_t whole = channels / group * group;
    for (int64_t c = 0; c < whole; c += group)
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) f(c + i * lanes, lanes, i);
    each_vector<A>(channels - whole, [&](int64_t c, int64_t n) { f(whole + c, n, 0); });
  }
  static TF_INLINE Vec<A> sum_of(const Vec<A> (&v)[kChains]) { return (v[0] + v[1]) + (v[2] + v[3]); }
};

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
