#include "common/vec.h"
#include "single_query_attention.h"
#include "single_query_attention_tiles.h"

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

// Online softmax of one tile: scores become p * rstd relative to the running maximum; keep is what the earlier ones
// are multiplied by.
template <typename A>
TF_INLINE void online_softmax(const Scratch<A>& s, const A (&rstd)[kTile], int count) {
  constexpr int lanes = VecOf<A>::lanes;
  for (int64_t q = 0; q < s.queries; ++q) {
    A* const scores = s.scores + q * kTile;
    for (int t = count; t < kTile; ++t) scores[t] = -__builtin_inf();
    Vec<A> largest = broadcast(s.maximum[q]);
    for (int t = 0; t < kTile; t += lanes) largest = max<A>(load(scores + t), largest);
    const A maximum = max_lane<A>(largest);
    const A origin = maximum == -__builtin_inf() ? A(0) : maximum;
    s.keep[q] = maximum == s.maximum[q] ? A(1) : exp_nonpositive(broadcast<A>(s.maximum[q] - origin))[0];
    Vec<A> total = load(s.total + q * lanes) * s.keep[q];
    for (int t = 0; t < kTile; t += lanes) {
      const Vec<A> weights = exp_nonpositive(load(scores + t) - origin);
      store(scores + t, weights * load(rstd + t));
      total += weights;
    }
    store(s.total + q * lanes, total);
    s.maximum[q] = maximum;
  }
}

struct Part {
  int64_t image, part, begin, end;

  Part(const Params& p, int64_t item)
      : image(item / p.parts),
        part(item % p.parts),
        begin(p.rows * part / p.parts),
        end(p.rows * (part + 1) / p.parts) {}
};

template <typename T, typename A>
void write_context(const Params& p, const A* rows, int64_t stride, int64_t image, int64_t q, A maximum, A total) {
  T* const out = static_cast<T*>(p.context) + (image * p.queries + q) * p.channels;
  const A scale = 1 / total;
  each_vector<A>(p.channels,
                 [&](int64_t c, int64_t n) { store_lanes(out + c, load_lanes(rows + q * stride + c, n) * scale, n); });
  static_cast<A*>(p.statistics)[image * p.queries + q] = maximum + A(__builtin_log(total));
}

template <typename T>
void forward(const Params& p, int64_t begin_item, int64_t end_item, void* memory) {
  typedef typename Accumulator<T>::type A;
  Scratch<A> s;
  Scratch<A>::layout(&s, memory, p.channels, p.queries);
  for (int64_t item = begin_item; item < end_item; ++item) {
    const Part part(p, item);
    widen_rows(static_cast<const T*>(p.query) + part.image * p.query_batch_stride, p.query_stride, p.queries,
               p.channels, s.query, s);
    for (int64_t i = 0; i < s.queries * s.pitch; i += VecOf<A>::lanes) store(s.context + i, Vec<A>{});
    for (int64_t q = 0; q < s.queries; ++q) {
      s.maximum[q] = -__builtin_inf();
      store(s.total + q * VecOf<A>::lanes, Vec<A>{});
    }
    for (int64_t first = part.begin; first < part.end; first += kTile) {
      const TileRows<T> rows(p, part.image, first, part.end);
      A rstd[kTile];
      Prefetch next(rows.row[0] + kTile * p.tokens_stride);
      load_tile(p, rows, s, rstd);
      dot_tile(s.query, rstd, s, s.scores, next);
      online_softmax(s, rstd, rows.count);
      accumulate_tile(s.scores, s, s.context, next);
    }
    for (int64_t q = 0; q < p.queries; ++q) {
      const A total = sum_lanes<A>(load(s.total + q * VecOf<A>::lanes));
      if (p.parts == 1) {
        write_context<T>(p, s.context, s.pitch, part.image, q, s.maximum[q], total);
      } else {
        const int64_t row = item * p.queries + q;
        static_cast<A*>(p.partial_max)[row] = s.maximum[q];
        static_cast<A*>(p.partial_sum)[row] = total;
        A* const out = static_cast<A*>(p.partial_context) + row * p.channels;
        each_vector<A>(p.channels,
                       [&](int64_t c, int64_t n) { store_lanes(out + c, load(s.context + q * s.pitch + c), n); });
      }
    }
  }
}

template <typename T>
void combine(const Params& p, int64_t begin_image, int64_t end_image) {
  typedef typename Accumulator<T>::type A;
  for (int64_t image = begin_image; image < end_image; ++image) {
    for (int64_t q = 0; q < p.queries; ++q) {
      const int64_t row = image * p.parts * p.queries + q;
      const A* const maxima = static_cast<const A*>(p.partial_max) + row;
      const A* const sums = static_cast<const A*>(p.partial_sum) + row;
      A* const contexts = static_cast<A*>(p.partial_context) + row * p.channels;
      A maximum = maxima[0];
      for (int64_t i = 1; i < p.parts; ++i) {
        const A other = maxima[i * p.queries];
        maximum = other > maximum ? other : maximum;
      }
      const A origin = maximum == -__builtin_inf() ? A(0) : maximum;
      A total = 0;
      for (int64_t i = 0; i < p.parts; ++i) {
        const A weight = __builtin_exp(maxima[i * p.queries] - origin);
        total += weight * sums[i * p.queries];
        const A* const from = contexts + i * p.queries * p.channels;
        for (int64_t c = 0; c < p.channels; ++c) contexts[c] = (i ? contexts[c] : A(0)) + weight * from[c];
      }
      write_context<T>(p, contexts - q * p.channels, p.channels, image, q, maximum, total);
    }
  }
}

// Gradient of the tile's tokens: with dn_t = sum_q p_qt dcontext_q + ds_qt query_q, that of token t is
// rstd_t (dn_t - mean(dn_t) - n_t mean(dn_t n_t)), whose means come from sums that are known already: mean is the
// first and slope is rstd_t times the second. out is null for rows beyond the tile's count and for those that need
// none.
template <typename T, typename A>
TF_INLINE void write_token_gradients(const Params& p, const Scratch<A>& s, const A* weights, const A* grad_scores,
                                     const A (&rstd)[kTile], const A (&mean)[kTile], const A (&slope)[kTile],
                                     T* const (&out)[kTile], int count) {
  constexpr int lanes = VecOf<A>::lanes;
  each_block<A>(s.channels, [&](int64_t c, auto vectors) {
    for (int t = 0; t < count; t += 2) {
      constexpr int width = decltype(vectors)::value;
      Vec<A> sums[2][width] = {};
      for (int64_t q = 0; q < s.queries; ++q) {
        const A p0 = weights[q * kTile + t], p1 = weights[q * kTile + t + 1];
        const A d0 = grad_scores[q * kTile + t], d1 = grad_scores[q * kTile + t + 1];
#pragma GCC unroll 8
        for (int i = 0; i < width; ++i) {
          const Vec<A> grad = load(s.grad_context + q * s.pitch + c + i * lanes);
          const Vec<A> query = load(s.query + q * s.pitch + c + i * lanes);
          sums[0][i] += grad * p0 + query * d0;
          sums[1][i] += grad * p1 + query * d1;
        }
      }
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        if (out[t + r] == nullptr) continue;
#pragma GCC unroll 8
        for (int i = 0; i < width; ++i) {
          const int64_t at = c + i * lanes;
          const Vec<A> centred = load(s.tile + (t + r) * s.pitch + at);
          const Vec<A> grad = (sums[r][i] - mean[t + r] - centred * slope[t + r]) * rstd[t + r];
          store_lanes(out[t + r] + at, grad, p.channels - at < lanes ? p.channels - at : lanes);
        }
      }
    }
  });
}

template <typename T>
void backward(const Params& p, int64_t begin_item, int64_t end_item, void* memory) {
  typedef typename Accumulator<T>::type A;
  constexpr int lanes = VecOf<A>::lanes;
  Scratch<A> s;
  Scratch<A>::layout(&s, memory, p.channels, p.queries);
  for (int64_t item = begin_item; item < end_item; ++item) {
    const Part part(p, item);
    const int64_t first_row = part.image * p.queries;
    widen_rows(static_cast<const T*>(p.query) + part.image * p.query_batch_stride, p.query_stride, p.queries,
               p.channels, s.query, s);
    widen_rows(static_cast<const T*>(p.grad_context) + first_row * p.channels, p.channels, p.queries, p.channels,
               s.grad_context, s);
    widen_rows(static_cast<const T*>(p.context) + first_row * p.channels, p.channels, p.queries, p.channels, s.context,
               s);
    for (int64_t q = 0; q < s.queries; ++q) {
      Vec<A> product{};
      for (int64_t c = q * s.pitch; c < q * s.pitch + s.channels; c += lanes) {
        product += load(s.grad_context + c) * load(s.context + c);
        store(s.grad_query + c, Vec<A>{});
      }
      s.delta[q] = sum_lanes<A>(product);
      store(s.total + q * lanes, Vec<A>{});
      s.keep[q] = 1;
      s.query_mean[q] = row_sum(s.query + q * s.pitch, s) / A(p.channels);
      s.grad_mean[q] = row_sum(s.grad_context + q * s.pitch, s) / A(p.channels);
    }
    for (int64_t first = part.begin; first < part.end; first += kTile) {
      const TileRows<T> rows(p, part.image, first, part.end);
      A rstd[kTile], mean[kTile] = {}, slope[kTile] = {};
      Prefetch next(rows.row[0] + kTile * p.tokens_stride);
      load_tile(p, rows, s, rstd);
      dot_tile(s.query, rstd, s, s.scores, next);
      dot_tile(s.grad_context, rstd, s, s.weights, next);  // dp, until it becomes ds below
      for (int64_t q = 0; q < p.queries; ++q) {
        const A lse = static_cast<const A*>(p.statistics)[first_row + q];
        for (int t = 0; t < kTile; t += lanes) {
          const int64_t at = q * kTile + t;
          const Vec<A> score = load(s.scores + at), grad_weight = load(s.weights + at);
          const Vec<A> weight = first_lanes<A>(exp_nonpositive(score - lse), rows.count - t);
          // a lone token has weight 1 whatever its score
          const Vec<A> grad_score = p.rows == 1 ? Vec<A>{} : weight * (grad_weight - s.delta[q]);
          store(s.scores + at, weight);
          store(s.weights + at, grad_score);
          store(s.total + q * lanes, load(s.total + q * lanes) + grad_score);
          if (p.normalize) {
            store(mean + t, load(mean + t) + weight * s.grad_mean[q] + grad_score * s.query_mean[q]);
            store(slope + t,
                  load(slope + t) + (weight * grad_weight + grad_score * score) * load(rstd + t) / A(p.channels));
          }
        }
      }
      for (int64_t i = p.queries * kTile; i < s.queries * kTile; ++i) s.scores[i] = s.weights[i] = 0;
      if (p.grad_tokens != nullptr || p.grad_extra_token != nullptr) {
        T* out[kTile] = {};
        const bool has_extra = p.extra_token != nullptr;
        for (int t = 0; t < rows.count; ++t) {
          const int64_t j = first + t;
          const bool is_extra = has_extra && j == 0;
          T* const grad = static_cast<T*>(is_extra ? p.grad_extra_token : p.grad_tokens);
          const int64_t row = is_extra ? part.image : part.image * (p.rows - has_extra) + j - has_extra;
          if (grad != nullptr) out[t] = grad + row * p.channels;
        }
        write_token_gradients<T>(p, s, s.scores, s.weights, rstd, mean, slope, out, rows.count);
      }
      if (p.grad_query != nullptr) {
        for (int64_t i = 0; i < s.queries * kTile; i += lanes)
          store(s.weights + i, load(s.weights + i) * load(rstd + i % kTile));
        accumulate_tile(s.weights, s, s.grad_query, next);
      }
    }
    // The score gradients sum to zero but for rounding in delta, whose share of the query's gradient goes here.
    if (p.grad_query != nullptr)
      for (int64_t q = 0; q < p.queries; ++q) {
        const A excess = sum_lanes<A>(load(s.total + q * lanes));
        A* const out = static_cast<A*>(p.grad_query) + (item * p.queries + q) * p.channels;
        each_vector<A>(p.channels, [&](int64_t c, int64_t n) {
          store_lanes(out + c, load(s.grad_query + q * s.pitch + c) - load(s.context + q * s.pitch + c) * excess, n);
        });
      }
  }
}

template <typename T>
constexpr SingleQueryAttentionKernels::ForDtype for_dtype() {
  return {scratch_bytes<T>, forward<T>, combine<T>, backward<T>};
}

}  // namespace

const SingleQueryAttentionKernels single_query_attention = {for_dtype<float>(), for_dtype<bf16>(), for_dtype<double>()};

}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
