// The matrix products of dynamic_mixing in bfloat16 by the tiles of AMX. For dynamic_mixing_kernels.cpp alone.
#pragma once

#include "common/amx_product.h"
#include "dynamic_mixing_vectors.h"

#if TF_AMX

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

class AmxProducts {
 public:
  typedef bf16 T;
  typedef float A;

  const Params& p;

 private:
  Memory memory;

 public:
  const Scratch<A> s;

  AmxProducts(const Params& params, void* first) : p(params), memory{static_cast<char*>(first)}, s(p, memory) {
    x_pairs = memory.take<uint32_t>(sources / 2 * pair_pitch);
    weights = memory.take<char>(p.segments * tiles_of_weights * kAmxBytes);
    compressed = memory.take<bf16>(rows * s.inputs);
    if (p.grad_mixed.data == nullptr) return;
    narrowed = memory.take<bf16>(s.channels);
    x = memory.take<bf16>(targets * p.segments * depth_of_segment);
    grad = memory.take<bf16>(targets * p.segments * depth_of_segment);
    grad_pairs = memory.take<uint32_t>(sources / 2 * pair_pitch);
    grad_transposed = memory.take<char>(targets / kAmxRows * depth_of_segment / kStep * kAmxBytes);
    grad_weights = memory.take<float>(p.segments * targets * s.tokens);
    weight_rows = memory.take<bf16>(p.segments * targets * sources);
    grad_rows = memory.take<bf16>(rows * outputs);
    grad_low_rows = memory.take<bf16>(rows * outputs);
    grad_row_pairs = memory.take<uint32_t>(rows / 2 * outputs);
    compressed_transposed = memory.take<char>(s.inputs / kAmxRows * rows / kStep * kAmxBytes);
  }
  char* end() const { return memory.next; }

  void begin() const { amx_configure_whole(); }
  void finish() const { amx_release(); }

  void generate(int64_t first, int64_t count) const {
    gather_compressed<T>(p, first, count, s.inputs, compressed);
    const TileSide left = {compressed, bytes<bf16>(s.inputs), 64, kAmxRows * bytes<bf16>(s.inputs)};
    for (int64_t j = 0; j < outputs; j += kPanel<A>) {
      const uint32_t* const panel = static_cast<const uint32_t*>(p.weight_panels) + j * (s.inputs / 2);
      const TileProduct product = {s.inputs / kStep, left,     {panel, 128, kAmxRows * 128, 64},
                                   s.rows + j,       s.logits, static_cast<const float*>(p.bias) + j};
      product.run<Start::kBias>(count * p.segments, kPanel<A>);
    }
  }

  void read(int64_t line) const {
    for (int64_t n = 0; n < p.tokens; n += 2) {
      const bf16* const even = token<bf16>(p, p.x, line, n);
      const bf16* const odd = n + 1 < p.tokens ? token<bf16>(p, p.x, line, n + 1) : nullptr;
      each_vector<A>(p.channels, [&](int64_t c, int64_t count) {
        const Vec<A> second = odd != nullptr ? load_lanes(odd + c, count) : Vec<A>{};
        store_words(x_pairs + n / 2 * pair_pitch + c, as_pairs(load_lanes(even + c, count), second));
      });
    }
  }

  // Products come one after the other: none waits for what a vector has just written.
  void mix(int64_t segment) const {
    const int64_t steps = sources / kStep;
    char* const tiles = weights + segment * tiles_of_weights * kAmxBytes;
    for (int64_t j = 0; j < targets; j += kAmxWords)
      for (int64_t i = 0; i < sources; i += kStep)
        store_transposed(tiles + (j / kAmxWords * steps + i / kStep) * kAmxBytes, kAmxWords, [&](int pair) {
          const int64_t source = i + 2 * pair;
          const float* const at = s.weights + source * s.tokens + j;
          const Vec<A> first = source < p.tokens ? load(at) : Vec<A>{};
          return as_pairs(rounded(first), rounded(source + 1 < p.tokens ? load(at + s.tokens) : Vec<A>{}));
        });
    if (segment + 1 == p.segments)
      mix_all({weights, 64, kAmxBytes, steps * kAmxBytes}, tiles_of_weights * kAmxBytes, x_pairs);
  }

  void read_for_gradients(int64_t line) const {
    for (int64_t n = 0; n < p.tokens; ++n) {
      const float *const even = s.grad + n * s.channels, *const odd = even + s.channels;
      each_vector<A>(p.channels, [&](int64_t c, int64_t) {
        store_narrow(narrowed + c, load(even + c));
        if (n % 2 == 1) return;
        const Vec<A> second = n + 1 < p.tokens ? rounded(load(odd + c)) : Vec<A>{};
        store_words(grad_pairs + n / 2 * pair_pitch + c, as_pairs(rounded(load(even + c)), second));
      });
      place_segments(token<bf16>(p, p.x, line, n), n, x);
      place_segments(narrowed, n, grad);
    }
    make_grad_weights();
  }

  void make_grad_x(int64_t segment) const {
    bf16* const rows_of_segment = weight_rows + segment * targets * sources;
    for (int64_t n = 0; n < p.tokens; ++n)
      for (int64_t j = 0; j < targets; j += kAmxWords)
        store_narrow(rows_of_segment + n * sources + j,
                     first_lanes<A>(load(s.weights + n * s.tokens + j), p.tokens - j));
    if (segment + 1 == p.segments)
      mix_all({weight_rows, bytes<bf16>(sources), 64, kAmxRows * bytes<bf16>(sources)}, bytes<bf16>(targets * sources),
              grad_pairs);
  }

  const float* grad_weights_of(int64_t segment) const { return grad_weights + segment * targets * s.tokens; }

  void write(const View& view, int64_t line) const {
    for (int64_t n = 0; n < p.tokens; ++n) {
      bf16* const row = token<bf16>(p, view, line, n);
      const float* const from = s.mixed + n * s.channels;
      each_vector<A>(p.channels, [&](int64_t c, int64_t count) {
        count < kAmxWords ? store_lanes(row + c, load(from + c), count) : store_narrow(row + c, load(from + c));
      });
    }
  }

  // For the two that follow: as sums of two bfloat16 numbers, which hold 16 bits of them.
  void read_logit_gradients(int64_t count) const {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t j = 0; j < outputs; j += kPanel<A>) {
        const float* const at = s.rows + r * s.logits + j;
        const Vec<A> first = first_lanes<A>(load(at), squared - j),
                     second = first_lanes<A>(load(at + kAmxWords), squared - j - kAmxWords);
        bf16 *const high = grad_rows + r * outputs + j, *const low = grad_low_rows + r * outputs + j;
        store_pair(high, first, second);
        store_pair(low, first - load(high), second - load(high + kAmxWords));
      }
  }

  // Here the gradient of the weight is transposed, [s.inputs, N * N rounded up to panels].
  void add_to_grad_weight(int64_t count, float* grad_weight) const {
    const int64_t steps = (count + kStep - 1) / kStep;
    for (int64_t r = 0; r < steps * kStep; r += 2)
      for (int64_t j = 0; j < outputs; j += kAmxWords) {
        const bf16* const at = grad_rows + r * outputs + j;
        const Vec<A> first = r < count ? load(at) : Vec<A>{}, second = r + 1 < count ? load(at + outputs) : Vec<A>{};
        store_words(grad_row_pairs + r / 2 * outputs + j, as_pairs(first, second));
      }
    for (int64_t i = 0; i < s.inputs; i += kAmxRows)
      for (int64_t k = 0; k < steps; ++k)
        store_transposed(compressed_transposed + (i / kAmxRows * steps + k) * kAmxBytes, kAmxWords, [&](int pair) {
          const bf16* const at = compressed + (k * kStep + 2 * pair) * s.inputs + i;
          return as_pairs(load(at), load(at + s.inputs));
        });
    const TileProduct product = {steps,
                                 {compressed_transposed, 64, kAmxBytes, steps * kAmxBytes},
                                 {grad_row_pairs, bytes<uint32_t>(outputs), kAmxRows * bytes<uint32_t>(outputs), 64},
                                 grad_weight,
                                 outputs};
    product.run<Start::kSum>(p.tokens * p.reduced, outputs);
  }

  // With the low parts: the gradient of the compression's bias, a sum over tokens, would collect what rounding leaves.
  void make_grad_compressed(int64_t count) const {
    const auto product_of = [&](const bf16* rows_of_grad) {
      return TileProduct{outputs / kStep,
                         {rows_of_grad, bytes<bf16>(outputs), 64, kAmxRows * bytes<bf16>(outputs)},
                         {p.weight_rows, bytes<uint32_t>(s.inputs), kAmxRows * bytes<uint32_t>(s.inputs), 64},
                         s.grad_compressed,
                         s.inputs};
    };
    product_of(grad_rows).run<Start::kZero>(count, p.tokens * p.reduced);
    product_of(grad_low_rows).run<Start::kSum>(count, p.tokens * p.reduced);
  }

 private:
  const int64_t width = p.channels / p.segments, depth_of_segment = round_up(width, kStep);
  const int64_t targets = round_up(p.tokens, kAmxRows), sources = round_up(p.tokens, kStep);
  const int64_t rows = round_up(p.tile * p.segments, kStep), pair_pitch = s.channels + kStep;
  const int64_t tiles_of_weights = targets / kAmxRows * sources / kStep;
  const int64_t squared = p.tokens * p.tokens, outputs = round_up(squared, kPanel<A>);
  uint32_t* x_pairs;                // [sources / 2, pair_pitch], of tokens
  char* weights;                    // [S, targets / 16, sources / 32] tiles, rows are targets
  bf16* compressed;                 // [rows, inputs]
  bf16* narrowed;                   // [channels], a token's gradient
  bf16 *x, *grad;                   // [targets, S, depth_of_segment]
  uint32_t* grad_pairs;             // [sources / 2, pair_pitch], of tokens
  char* grad_transposed;            // [targets / 16, depth_of_segment / 32] tiles, columns are targets
  float* grad_weights;              // [S, targets, s.tokens], indexed [source, target]
  bf16* weight_rows;                // [S, targets, sources], indexed [source, target]
  bf16 *grad_rows, *grad_low_rows;  // [rows, outputs]
  uint32_t* grad_row_pairs;         // [rows / 2, outputs], of rows
  char* compressed_transposed;      // [inputs / 16, rows / 32] tiles

  template <typename E>
  static constexpr int64_t bytes(int64_t count) {
    return count * sizeof(E);
  }

  // s.mixed of all segments; their left sides lie `next` bytes apart.
  void mix_all(TileSide left, int64_t next, const uint32_t* pairs) const {
    const int64_t row = bytes<uint32_t>(pair_pitch);
    for (int64_t segment = 0; segment < p.segments; ++segment) {
      const TileProduct product = {sources / kStep,
                                   left,
                                   {pairs + segment * width, row, kAmxRows * row, 64},
                                   s.mixed + segment * width,
                                   s.channels};
      product.run<Start::kZero>(p.tokens, width);  // in order: each overwrites what the last one spilt
      left.data = static_cast<const char*>(left.data) + next;
    }
  }

  void make_grad_weights() const {
    const int64_t steps = depth_of_segment / kStep, row = bytes<bf16>(p.segments * depth_of_segment);
    for (int64_t segment = 0; segment < p.segments; ++segment) {
      const int64_t first = segment * depth_of_segment;
      for (int64_t j = 0; j < targets; j += kAmxRows)
        for (int64_t k = 0; k < steps; ++k)
          store_transposed(grad_transposed + (j / kAmxRows * steps + k) * kAmxBytes, kAmxWords, [&](int i) {
            return load_words(grad + (j + i) * p.segments * depth_of_segment + first + k * kStep);
          });
      const TileProduct product = {steps,
                                   {x + first, row, 64, kAmxRows * row},
                                   {grad_transposed, 64, kAmxBytes, steps * kAmxBytes},
                                   grad_weights + segment * targets * s.tokens,
                                   s.tokens};
      product.run<Start::kZero>(p.tokens, p.tokens);
    }
  }

  void place_segments(const bf16* from, int64_t n, bf16* to) const {
    for (int64_t segment = 0; segment < p.segments; ++segment)
      for (int64_t k = 0; k < depth_of_segment; k += kStep) {
        store_words(to + (n * p.segments + segment) * depth_of_segment + k,
                    load_step(from + segment * width + k, width - k));
      }
  }
};

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion

#endif
