#include "dynamic_mixing_amx.h"
#include "dynamic_mixing_lines.h"
#include "dynamic_mixing_vectors.h"

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

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

template <typename Products>
void forward(const Params& p, int64_t begin, int64_t end, void* memory) {
  typedef typename Products::A A;
  const Products products(p, memory);
  const Scratch<A>& s = products.s;
  products.begin();
  for (int64_t first = begin; first < end; first += p.tile) {
    const int64_t count = end - first < p.tile ? end - first : p.tile;
    products.generate(first, count);
    for (int64_t line = 0; line < count; ++line) {
      products.read(first + line);
      for (int64_t segment = 0; segment < p.segments; ++segment) {
        softmax(p, s.rows + (line * p.segments + segment) * s.logits, s);
        products.mix(segment);
      }
      products.write(p.mixed, first + line);
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
  products.finish();
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
void softmax_backward(const Params& p, const A* grad_weights, A* logits, const Scratch<A>& s) {
  constexpr int lanes = VecOf<A>::lanes;
  for (int64_t j = 0; j < p.tokens; j += lanes) {
    Vec<A> delta{};
    for (int64_t i = 0; i < p.tokens; ++i)
      delta += load(s.weights + i * s.tokens + j) * load(grad_weights + i * s.tokens + j);
    store(s.delta + j, delta);
  }
  for (int64_t i = 0; i < p.tokens; ++i)  // in order: each row overwrites what the last one spilt
    for (int64_t j = 0; j < p.tokens; j += lanes) {
      const int64_t at = i * s.tokens + j;
      store(logits + i * p.tokens + j, load(s.weights + at) * (load(grad_weights + at) - load(s.delta + j)));
    }
}

template <typename Products>
void backward(const Params& p, int64_t part, void* memory) {
  typedef typename Products::T T;
  typedef typename Products::A A;
  const Products products(p, memory);
  const Scratch<A>& s = products.s;
  const int64_t squared = p.tokens * p.tokens, outputs = round_up(squared, kPanel<A>);
  const int64_t tiles = (p.batch * p.lines + p.tile - 1) / p.tile, end_tile = tiles * (part + 1) / p.parts;
  A* const grad_weight = static_cast<A*>(p.grad_weight) + part * outputs * s.inputs;
  A* const grad_bias = static_cast<A*>(p.grad_bias) + part * outputs;
  products.begin();
  for (int64_t tile = tiles * part / p.parts; tile < end_tile; ++tile) {
    const int64_t first = tile * p.tile, left = p.batch * p.lines - first;
    const int64_t count = left < p.tile ? left : p.tile, rows = count * p.segments;
    products.generate(first, count);
    for (int64_t line = 0; line < count; ++line) {
      read_gradient<T>(p, first + line, s);
      products.read_for_gradients(first + line);
      for (int64_t segment = 0; segment < p.segments; ++segment) {
        A* const logits = s.rows + (line * p.segments + segment) * s.logits;
        softmax(p, logits, s);
        if (p.grad_x.data != nullptr) products.make_grad_x(segment);
        softmax_backward(p, products.grad_weights_of(segment), logits, s);
      }
      if (p.grad_x.data != nullptr) products.write(p.grad_x, first + line);
    }
    products.read_logit_gradients(rows);
    if (p.grad_weight != nullptr) {
      products.add_to_grad_weight(rows, grad_weight);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < squared; j += VecOf<A>::lanes)
          store(grad_bias + j, load(grad_bias + j) + load(s.rows + r * s.logits + j));
    }
    if (p.grad_compressed.data != nullptr) {
      products.make_grad_compressed(rows);
      for (int64_t line = 0; line < count; ++line)
        for (int64_t n = 0; n < p.tokens; ++n) {
          T* out = token<T>(p, p.grad_compressed, first + line, n);
          const A* in = s.grad_compressed + line * p.segments * s.inputs + n * p.reduced;
          for (int64_t segment = 0; segment < p.segments; ++segment, in += s.inputs)
            for (int64_t i = 0; i < p.reduced; ++i) narrow(out++, in[i]);
        }
    }
  }
  products.finish();
}

template <typename Products>
int64_t scratch_bytes(const Params& p) {
  return Products(p, nullptr).end() - static_cast<char*>(nullptr);
}

template <typename Products>
constexpr DynamicMixingKernels::ForDtype for_products() {
  return {kPanel<typename Products::A>, scratch_bytes<Products>, forward<Products>, backward<Products>};
}

bool multiplies_pairs() {
#ifdef TF_TARGET_BF16
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

#if TF_AMX
constexpr DynamicMixingKernels::ForDtype kBfloat16Tiles = for_products<AmxProducts>();
#else
constexpr DynamicMixingKernels::ForDtype kBfloat16Tiles = for_products<VectorProducts<bf16>>();
#endif

}  // namespace

const DynamicMixingKernels dynamic_mixing = {for_products<VectorProducts<float>>(),
                                             for_products<VectorProducts<bf16>>(),
                                             for_products<VectorProducts<double>>(), kBfloat16Tiles, multiplies_pairs};

}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
