#include "common/vec.h"
#include "dynamic_mixing.h"
#include "dynamic_mixing_products.h"

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

typedef DynamicMixingParams Params;
typedef DynamicMixingView View;

// Buffers of one thread. A vector that begins inside a row may end beyond it: rows are wider than what they hold.
template <typename A>
struct Scratch {
  int64_t tokens, channels, inputs, logits;  // pitches
  A *x, *mixed, *grad, *grad_transposed;     // [N, channels], the last [D / S, tokens]
  A *weights, *grad_weights;                 // [N, tokens], indexed [source, target]
  A *compressed, *grad_compressed;           // [tile * S, inputs]
  uint32_t* pairs;                           // [tile * S, inputs / 2], bf16 pairs of compressed
  A* rows;                                   // [tile * S, logits]; in backward then their gradients
  A *total, *delta;                          // [channels], [tokens]
  char* end;

  Scratch(const Params& p, void* memory) {
    constexpr int64_t lanes = VecOf<A>::lanes, line = 64 / sizeof(A);
    const int64_t rows_of_tile = p.tile * p.segments;
    tokens = round_up(p.tokens, lanes);
    channels = round_up(p.channels + lanes, lanes);
    inputs = round_up(p.tokens * p.reduced, kPanel<A>);
    logits = round_up(round_up(p.tokens * p.tokens, kPanel<A>) + lanes, 2 * line) + line;
    A* next = static_cast<A*>(memory);
    const auto take = [&](int64_t count) {
      A* const taken = next;
      next += round_up(count, line);
      return taken;
    };
    x = take(p.tokens * channels);
    mixed = take(p.tokens * channels);
    grad = take(p.tokens * channels);
    grad_transposed = take(p.channels / p.segments * tokens);
    weights = take(p.tokens * tokens);
    grad_weights = take(p.tokens * tokens);
    compressed = take(rows_of_tile * inputs);
    grad_compressed = take(rows_of_tile * inputs);
    pairs = reinterpret_cast<uint32_t*>(take(p.pairs ? rows_of_tile * inputs / 2 : 0));
    rows = take(rows_of_tile * logits);
    total = take(channels);
    delta = take(tokens);
    end = reinterpret_cast<char*>(next);
  }
};

template <typename T>
int64_t scratch_bytes(const Params& p) {
  return Scratch<typename Accumulator<T>::type>(p, nullptr).end - static_cast<char*>(nullptr);
}

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

#ifdef TF_TARGET_BF16
template <typename A>
void generate_from_pairs(const Params& p, int64_t rows, const Scratch<A>& s) {
  const int64_t depth = (p.tokens * p.reduced + 1) / 2;
  bf16* const narrowed = reinterpret_cast<bf16*>(s.pairs);
  for (int64_t i = 0; i < rows * s.inputs; i += VecOf<A>::lanes) store(narrowed + i, load(s.compressed + i));
  for (int64_t j = 0; j < p.tokens * p.tokens; j += kPanel<A>) {
    const PairProduct product = {depth,
                                 s.pairs,
                                 s.inputs / 2,
                                 static_cast<const uint32_t*>(p.weight_panels) + j * depth,
                                 s.rows + j,
                                 s.logits,
                                 static_cast<const A*>(p.bias) + j};
    product.run(rows);
  }
}
#endif

// Logits of the segments of `count` lines, from numbers that are gathered from the compressed tokens.
template <typename T, typename A>
void generate(const Params& p, int64_t first, int64_t count, const Scratch<A>& s) {
  const int64_t d = p.reduced, depth = p.tokens * d, squared = p.tokens * p.tokens;
  for (int64_t line = 0; line < count; ++line)
    for (int64_t n = 0; n < p.tokens; ++n) {
      const T* in = token<T>(p, p.compressed, first + line, n);
      A* out = s.compressed + line * p.segments * s.inputs + n * d;
      for (int64_t segment = 0; segment < p.segments; ++segment, out += s.inputs)
        for (int64_t i = 0; i < d; ++i) out[i] = widen(*in++);
    }
#ifdef TF_TARGET_BF16
  if constexpr (sizeof(A) == 4)
    if (p.pairs) return generate_from_pairs(p, count * p.segments, s);
#endif
  for (int64_t j = 0; j < squared; j += kPanel<A>) {
    const Product<A> product = {depth,
                                s.compressed,
                                s.inputs,
                                1,
                                static_cast<const A*>(p.weight_panels) + j * depth,
                                kPanel<A>,
                                s.rows + j,
                                s.logits,
                                static_cast<const A*>(p.bias) + j};
    product.template run<Start::kBias>(count * p.segments, kPanel<A>);
  }
}

// s.weights = softmax over the sources of one row of logits.
template <typename A>
void softmax(const Params& p, const A* logits, const Scratch<A>& s) {
  for (int64_t j = 0; j < p.tokens; j += VecOf<A>::lanes) {
    const A* const column = logits + j;
    A* const out = s.weights + j;
    Vec<A> maximum = load(column);
    for (int64_t i = 1; i < p.tokens; ++i) maximum = max<A>(load(column + i * p.tokens), maximum);
    Vec<A> total{};
    for (int64_t i = 0; i < p.tokens; ++i) {
      const Vec<A> weight = exp_nonpositive(load(column + i * p.tokens) - maximum);
      store(out + i * s.tokens, weight);
      total += weight;
    }
    const Vec<A> scale = A(1) / total;
    for (int64_t i = 0; i < p.tokens; ++i) store(out + i * s.tokens, load(out + i * s.tokens) * scale);
  }
}

template <typename T>
void forward(const Params& p, int64_t begin, int64_t end, void* memory) {
  typedef typename Accumulator<T>::type A;
  const Scratch<A> s(p, memory);
  const int64_t width = p.channels / p.segments;
  for (int64_t first = begin; first < end; first += p.tile) {
    const int64_t count = end - first < p.tile ? end - first : p.tile;
    generate<T>(p, first, count, s);
    for (int64_t line = 0; line < count; ++line) {
      read_line<T>(p, p.x, first + line, s, s.x);
      for (int64_t segment = 0; segment < p.segments; ++segment) {
        softmax(p, s.rows + (line * p.segments + segment) * s.logits, s);
        const Product<A> mix = {
            p.tokens,   s.weights, 1, s.tokens, s.x + segment * width, s.channels, s.mixed + segment * width,
            s.channels, nullptr};
        mix.template run<Start::kZero>(p.tokens, width);  // segments in order: each overwrites what the last one spilt
      }
      write_line<T>(p, p.mixed, first + line, s, s.mixed);
      if (p.line_sums != nullptr) {
        A* const sums = static_cast<A*>(p.line_sums) + (first + line) * p.channels;
        each_vector<A>(p.channels, [&](int64_t c, int64_t lanes) {
          Vec<A> total{};
          for (int64_t n = 0; n < p.tokens; ++n) total += load(s.mixed + n * s.channels + c);
          store_lanes(sums + c, total, lanes);
        });
      }
    }
  }
}

template <typename T, typename A>
void read_gradient(const Params& p, int64_t line, const Scratch<A>& s) {
  read_line<T>(p, p.grad_mixed, line, s, s.grad);
  if (p.grad_mean != nullptr) {
    const A* const mean = static_cast<const A*>(p.grad_mean) + line / p.lines * p.channels;
    for (int64_t n = 0; n < p.tokens; ++n)
      each_vector<A>(p.channels, [&](int64_t c, int64_t count) {
        A* const at = s.grad + n * s.channels + c;
        store(at, load(at) + load_lanes(mean + c, count));
      });
  }
}

// logits becomes their gradient, weights * (grad_weights - sum over sources of weights * grad_weights).
template <typename A>
void softmax_backward(const Params& p, A* logits, const Scratch<A>& s) {
  constexpr int lanes = VecOf<A>::lanes;
  for (int64_t j = 0; j < p.tokens; j += lanes) {
    Vec<A> delta{};
    for (int64_t i = 0; i < p.tokens; ++i)
      delta += load(s.weights + i * s.tokens + j) * load(s.grad_weights + i * s.tokens + j);
    store(s.delta + j, delta);
  }
  for (int64_t i = 0; i < p.tokens; ++i)  // in order: each row overwrites what the last one spilt
    for (int64_t j = 0; j < p.tokens; j += lanes) {
      const int64_t at = i * s.tokens + j;
      store(logits + i * p.tokens + j, load(s.weights + at) * (load(s.grad_weights + at) - load(s.delta + j)));
    }
}

template <typename T>
void backward(const Params& p, int64_t part, void* memory) {
  typedef typename Accumulator<T>::type A;
  const Scratch<A> s(p, memory);
  const int64_t width = p.channels / p.segments, squared = p.tokens * p.tokens, depth = p.tokens * p.reduced;
  const int64_t tiles = (p.batch * p.lines + p.tile - 1) / p.tile, end_tile = tiles * (part + 1) / p.parts;
  A* const grad_weight = static_cast<A*>(p.grad_weight) + part * squared * s.inputs;
  A* const grad_bias = static_cast<A*>(p.grad_bias) + part * round_up(squared, kPanel<A>);
  for (int64_t tile = tiles * part / p.parts; tile < end_tile; ++tile) {
    const int64_t first = tile * p.tile, left = p.batch * p.lines - first;
    const int64_t count = left < p.tile ? left : p.tile, rows = count * p.segments;
    generate<T>(p, first, count, s);
    for (int64_t line = 0; line < count; ++line) {
      read_line<T>(p, p.x, first + line, s, s.x);
      read_gradient<T>(p, first + line, s);
      for (int64_t segment = 0; segment < p.segments; ++segment) {
        A* const logits = s.rows + (line * p.segments + segment) * s.logits;
        A* const grad = s.grad + segment * width;
        softmax(p, logits, s);
        if (p.grad_x.data != nullptr) {
          const Product<A> product = {p.tokens,   s.weights, s.tokens, 1, grad, s.channels, s.mixed + segment * width,
                                      s.channels, nullptr};
          product.template run<Start::kZero>(p.tokens, width);
        }
        for (int64_t c = 0; c < width; ++c)
          for (int64_t n = 0; n < p.tokens; ++n) s.grad_transposed[c * s.tokens + n] = grad[n * s.channels + c];
        const Product<A> product = {width,    s.x + segment * width, s.channels, 1,      s.grad_transposed,
                                    s.tokens, s.grad_weights,        s.tokens,   nullptr};
        product.template run<Start::kZero>(p.tokens, s.tokens);
        softmax_backward(p, logits, s);
      }
      if (p.grad_x.data != nullptr) write_line<T>(p, p.grad_x, first + line, s, s.mixed);
    }
    if (p.grad_weight != nullptr) {
      const Product<A> product = {rows, s.rows, 1, s.logits, s.compressed, s.inputs, grad_weight, s.inputs, nullptr};
      product.template run<Start::kSum>(squared, depth);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < squared; j += VecOf<A>::lanes)
          store(grad_bias + j, load(grad_bias + j) + load(s.rows + r * s.logits + j));
    }
    if (p.grad_compressed.data != nullptr) {
      const Product<A> product = {
          squared,           s.rows,   s.logits, 1, static_cast<const A*>(p.weight_rows), s.inputs,
          s.grad_compressed, s.inputs, nullptr};
      product.template run<Start::kZero>(rows, depth);
      for (int64_t line = 0; line < count; ++line)
        for (int64_t n = 0; n < p.tokens; ++n) {
          T* out = token<T>(p, p.grad_compressed, first + line, n);
          const A* in = s.grad_compressed + line * p.segments * s.inputs + n * p.reduced;
          for (int64_t segment = 0; segment < p.segments; ++segment, in += s.inputs)
            for (int64_t i = 0; i < p.reduced; ++i) narrow(out++, in[i]);
        }
    }
  }
}

template <typename T>
constexpr DynamicMixingKernels::ForDtype for_dtype() {
  return {kPanel<typename Accumulator<T>::type>, scratch_bytes<T>, forward<T>, backward<T>};
}

bool multiplies_pairs() {
#ifdef TF_TARGET_BF16
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace

const DynamicMixingKernels dynamic_mixing = {for_dtype<float>(), for_dtype<bf16>(), for_dtype<double>(),
                                             multiplies_pairs};

}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
