#include "single_query_attention.h"
#include "vec.h"

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

typedef SingleQueryAttentionParams Params;

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

  TileRows(const Params& p, int64_t image, int64_t first, int64_t end) {
    count = end - first < kTile ? int(end - first) : kTile;
    const bool has_extra = p.extra_token != nullptr;
    const T* const tokens = static_cast<const T*>(p.tokens) + image * p.tokens_batch_stride;
    for (int t = 0; t < kTile; ++t) {
      const int64_t j = first + (t < count ? t : count - 1);
      row[t] = has_extra && j == 0 ? static_cast<const T*>(p.extra_token) + image * p.extra_token_stride
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
