#include "common/vec.h"
#include "single_query_attention.h"
#include "single_query_attention_amx.h"
#include "single_query_attention_tiles.h"
#include "single_query_attention_vectors.h"

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

// Online softmax of one tile: scores become p * rstd relative to the running maximum; keep is what the earlier ones
// are multiplied by.
template <typename A, int kTile>
TF_INLINE void online_softmax(const Scratch<A, kTile>& s, const A (&rstd)[kTile], int count) {
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

// Of [images or parts, all queries], the row of number i's first query.
TF_INLINE int64_t first_row_of(const Params& p, int64_t i) { return i * p.all_queries + p.first_query; }

template <typename T, typename A>
void write_context(const Params& p, const A* sums, int64_t row, A maximum, A total) {
  T* const out = static_cast<T*>(p.context) + row * p.channels;
  const A scale = 1 / total;
  each_vector<A>(p.channels, [&](int64_t c, int64_t n) { store_lanes(out + c, load_lanes(sums + c, n) * scale, n); });
  static_cast<A*>(p.statistics)[row] = maximum + A(__builtin_log(total));
}

template <typename Products>
int64_t scratch_bytes(int64_t channels, int64_t queries) {
  Params most{};
  most.channels = channels;
  most.queries = queries;
  most.normalize = true;
  most.grad_context = most.grad_tokens = &most;
  return reinterpret_cast<intptr_t>(Products(most, nullptr).end());
}

template <typename Products>
void forward(const Params& p, int64_t begin_part, int64_t end_part, void* memory) {
  typedef typename Products::T T;
  typedef typename Products::A A;
  constexpr int kTile = Products::kTile;
  Products products(p, memory);
  const Scratch<A, kTile> s = products.s;
  for (int64_t i_part = begin_part; i_part < end_part; ++i_part) {
    const Part part = p.parts[i_part];
    widen_rows(static_cast<const T*>(p.query) + part.image * p.query_batch_stride + p.first_query * p.query_stride,
               p.query_stride, p.queries, p.channels, s.query, s);
    for (int64_t q = 0; q < s.queries; ++q) {
      s.maximum[q] = -__builtin_inf();
      store(s.total + q * VecOf<A>::lanes, Vec<A>{});
      s.query_mean[q] = row_sum(s.query + q * s.pitch, s) / A(p.channels);
    }
    products.begin(s.context);
    for (int64_t first = part.begin; first < part.end; first += kTile) {
      const TileRows<T, kTile> rows(p, part, first);
      A rstd[kTile];
      Prefetch next(rows.row[0] + kTile * p.tokens_stride);
      products.dot(rows, rstd, next);
      online_softmax(s, rstd, rows.count);
      products.accumulate(s.scores, s.context, next);
    }
    products.finish(s.context);
    for (int64_t q = 0; q < p.queries; ++q) {
      // the context of no row is 0
      const A total = part.begin == part.end ? A(1) : sum_lanes<A>(load(s.total + q * VecOf<A>::lanes));
      if (part.whole) {
        write_context<T>(p, s.context + q * s.pitch, first_row_of(p, part.image) + q, s.maximum[q], total);
      } else {
        const int64_t row = first_row_of(p, i_part) + q;
        static_cast<A*>(p.partial_max)[row] = s.maximum[q];
        static_cast<A*>(p.partial_sum)[row] = total;
        A* const out = static_cast<A*>(p.partial_context) + row * p.channels;
        each_vector<A>(p.channels,
                       [&](int64_t c, int64_t n) { store_lanes(out + c, load(s.context + q * s.pitch + c), n); });
      }
    }
  }
}

// Where the partial results of a row [batch * queries] are: the first, and how many, `queries` rows apart.
struct PartsOfRow {
  int64_t first, count;

  PartsOfRow(const Params& p, int64_t row) {
    const int64_t* const of_image = p.first_part + row / p.queries;
    first = of_image[0] * p.queries + row % p.queries;
    count = of_image[1] - of_image[0];
  }
};

template <typename T>
void combine(const Params& p, int64_t begin_row, int64_t end_row) {
  typedef typename Accumulator<T>::type A;
  for (int64_t row = begin_row; row < end_row; ++row) {
    const PartsOfRow of(p, row);
    if (of.count == 1) continue;
    const A* const maxima = static_cast<const A*>(p.partial_max) + of.first;
    const A* const sums = static_cast<const A*>(p.partial_sum) + of.first;
    A* const contexts = static_cast<A*>(p.partial_context) + of.first * p.channels;
    A maximum = maxima[0];
    for (int64_t i = 1; i < of.count; ++i) {
      const A other = maxima[i * p.queries];
      maximum = other > maximum ? other : maximum;
    }
    const A origin = maximum == -__builtin_inf() ? A(0) : maximum;
    A total = 0;
    for (int64_t i = 0; i < of.count; ++i) {
      const A weight = __builtin_exp(maxima[i * p.queries] - origin);
      total += weight * sums[i * p.queries];
      const A* const from = contexts + i * p.queries * p.channels;
      for (int64_t c = 0; c < p.channels; ++c) contexts[c] = (i ? contexts[c] : A(0)) + weight * from[c];
    }
    write_context<T>(p, contexts, row, maximum, total);
  }
}

template <typename T, typename A, int kTile>
void write_query_gradient(const Params& p, const Scratch<A, kTile>& s, int64_t q, T* out) {
  // The score gradients sum to zero but for rounding in delta, whose share of the query's gradient goes here.
  const A excess = sum_lanes<A>(load(s.total + q * VecOf<A>::lanes));
  each_vector<A>(p.channels, [&](int64_t c, int64_t n) {
    store_lanes(out + c, load(s.grad_query + q * s.pitch + c) - load(s.context + q * s.pitch + c) * excess, n);
  });
}

template <typename Products>
void backward(const Params& p, int64_t begin_part, int64_t end_part, void* memory) {
  typedef typename Products::T T;
  typedef typename Products::A A;
  constexpr int lanes = VecOf<A>::lanes, kTile = Products::kTile;
  Products products(p, memory);
  const Scratch<A, kTile> s = products.s;
  for (int64_t i_part = begin_part; i_part < end_part; ++i_part) {
    const Part part = p.parts[i_part];
    const bool lone = part.whole && part.end - part.begin == 1;
    const int64_t first_row = first_row_of(p, part.image);
    widen_rows(static_cast<const T*>(p.query) + part.image * p.query_batch_stride + p.first_query * p.query_stride,
               p.query_stride, p.queries, p.channels, s.query, s);
    widen_rows(static_cast<const T*>(p.grad_context) + first_row * p.channels, p.channels, p.queries, p.channels,
               s.grad_context, s);
    widen_rows(static_cast<const T*>(p.context) + first_row * p.channels, p.channels, p.queries, p.channels, s.context,
               s);
    for (int64_t q = 0; q < s.queries; ++q) {
      Vec<A> product{};
      for (int64_t c = q * s.pitch; c < q * s.pitch + s.channels; c += lanes)
        product += load(s.grad_context + c) * load(s.context + c);
      s.delta[q] = sum_lanes<A>(product);
      store(s.total + q * lanes, Vec<A>{});
      s.keep[q] = 1;
      s.query_mean[q] = row_sum(s.query + q * s.pitch, s) / A(p.channels);
      s.grad_mean[q] = row_sum(s.grad_context + q * s.pitch, s) / A(p.channels);
    }
    products.begin(s.grad_query);
    for (int64_t first = part.begin; first < part.end; first += kTile) {
      const TileRows<T, kTile> rows(p, part, first);
      A rstd[kTile], mean[kTile] = {}, slope[kTile] = {};
      Prefetch next(rows.row[0] + kTile * p.tokens_stride);
      products.dot(rows, rstd, next);  // weights are dp, until they become ds below
      for (int64_t q = 0; q < p.queries; ++q) {
        const A lse = static_cast<const A*>(p.statistics)[first_row + q];
        for (int t = 0; t < kTile; t += lanes) {
          const int64_t at = q * kTile + t;
          const Vec<A> score = load(s.scores + at), grad_weight = load(s.weights + at);
          const Vec<A> weight = first_lanes<A>(exp_nonpositive(score - lse), rows.count - t);
          // a lone token has weight 1 whatever its score
          const Vec<A> grad_score = lone ? Vec<A>{} : weight * (grad_weight - s.delta[q]);
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
        const auto write = [&](auto* type) {
          typedef decltype(type) Gradient;
          Gradient out[kTile] = {};
          const bool has_extra = p.extra_token != nullptr;
          for (int t = 0; t < rows.count; ++t) {
            const int64_t j = first + t;
            const bool is_extra = has_extra && j == 0;
            const Gradient grad = static_cast<Gradient>(is_extra ? p.grad_extra_token : p.grad_tokens);
            const int64_t at =
                is_extra ? part.image * p.channels : part.at_token_gradient + (j - has_extra) * p.channels;
            if (grad != nullptr) out[t] = grad + at;
          }
          products.write_token_gradients(rstd, mean, slope, out, rows.count);
        };
        if (sizeof(T) < sizeof(A) && p.wide_gradients) {
          write(static_cast<A*>(nullptr));
        } else {
          write(static_cast<T*>(nullptr));
        }
      }
      if (p.grad_query != nullptr) {
        for (int64_t i = 0; i < s.queries * kTile; i += lanes)
          store(s.weights + i, load(s.weights + i) * load(rstd + i % kTile));
        products.accumulate(s.weights, s.grad_query, next);
      }
    }
    products.finish(s.grad_query);
    if (p.grad_query == nullptr) continue;
    for (int64_t q = 0; q < p.queries; ++q) {
      if (part.whole) {
        write_query_gradient(p, s, q, static_cast<T*>(p.grad_query) + (first_row + q) * p.channels);
      } else {
        write_query_gradient(p, s, q,
                             static_cast<A*>(p.partial_grad_query) + (first_row_of(p, i_part) + q) * p.channels);
      }
    }
  }
}

template <typename T>
void sum_gradients(const Params& p, int64_t begin_row, int64_t end_row) {
  typedef typename Accumulator<T>::type A;
  for (int64_t row = begin_row; row < end_row; ++row) {
    const PartsOfRow of(p, row);
    if (of.count == 1) continue;
    const A* const from = static_cast<const A*>(p.partial_grad_query) + of.first * p.channels;
    T* const out = static_cast<T*>(p.grad_query) + row * p.channels;
    each_vector<A>(p.channels, [&](int64_t c, int64_t n) {
      Vec<A> sum{};
      for (int64_t i = 0; i < of.count; ++i) sum += load_lanes(from + i * p.queries * p.channels + c, n);
      store_lanes(out + c, sum, n);
    });
  }
}

template <typename Products>
constexpr SingleQueryAttentionKernels::ForDtype for_products() {
  typedef typename Products::T T;
  return {scratch_bytes<Products>, forward<Products>, combine<T>, backward<Products>, sum_gradients<T>};
}

#if TF_AMX
// The vectors' functions, or those of AMX where it may be used.
constexpr SingleQueryAttentionKernels::ForDtype kPlain = for_products<VectorProducts<bf16>>(),
                                                kAmx = for_products<AmxProducts>();

bool by_tiles(const Params& p) { return amx_allowed() && !p.by_vectors; }

constexpr SingleQueryAttentionKernels::ForDtype kBfloat16 = {
    [](int64_t channels, int64_t queries) {  // enough for both
      const int64_t plain = kPlain.scratch_bytes(channels, queries), amx = kAmx.scratch_bytes(channels, queries);
      return plain > amx ? plain : amx;
    },
    [](const Params& p, int64_t begin, int64_t end, void* scratch) {
      by_tiles(p) ? kAmx.forward(p, begin, end, scratch) : kPlain.forward(p, begin, end, scratch);
    },
    kPlain.combine,
    [](const Params& p, int64_t begin, int64_t end, void* scratch) {
      by_tiles(p) ? kAmx.backward(p, begin, end, scratch) : kPlain.backward(p, begin, end, scratch);
    },
    kPlain.sum_gradients};
#else
constexpr SingleQueryAttentionKernels::ForDtype kBfloat16 = for_products<VectorProducts<bf16>>();
#endif

}  // namespace

const SingleQueryAttentionKernels single_query_attention = {for_products<VectorProducts<float>>(), kBfloat16,
                                                            for_products<VectorProducts<f16>>(),
                                                            for_products<VectorProducts<double>>()};

}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
