// The matrix products of dynamic_mixing by vectors; operands lie in a thread's cache. For dynamic_mixing_kernels.cpp
// alone.
#pragma once

#include "common/start.h"
#include "dynamic_mixing_lines.h"

#if TF_VECTOR_BYTES == 64
#include <immintrin.h>
#define TF_TARGET_BF16 __attribute__((target("avx512bf16")))
#endif

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

// Of a block of a product, whose sums are in registers: with AVX2 in 12 of 16.
constexpr int kRows = TF_VECTOR_BYTES == 64 ? 8 : TF_VECTOR_BYTES == 32 ? 6 : 4;
constexpr bool kHasTriples = TF_VECTOR_BYTES == 32;  // of vectors, with four rows
constexpr int64_t kDepth = 64;                       // a longer sum would lose precision

// c[r][j] = start + sum_k a[r * a_row + k * a_depth] b[k][j], for whole vectors of columns j.
template <typename A>
struct Product {
  int64_t depth;
  const A* a;
  int64_t a_row, a_depth;
  const A* b;
  int64_t b_pitch;
  A* c;
  int64_t c_pitch;
  const A* bias;

  template <Start start, int rows, int vectors>
  TF_INLINE void block(int64_t row, int64_t column) const {
    constexpr int lanes = VecOf<A>::lanes;
    A* const out = c + row * c_pitch + column;
    Vec<A> sums[rows][vectors] = {};
    const A* left = a + row * a_row;
    const A* right = b + column;
    for (int64_t k = 0; k < depth; ++k, left += a_depth, right += b_pitch) {
      Vec<A> columns[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) columns[v] = load(right + v * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sums[r][v] += columns[v] * left[r * a_row];
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        A* const at = out + r * c_pitch + v * lanes;
        if constexpr (start == Start::kBias) sums[r][v] += load(bias + column + v * lanes);
        if constexpr (start == Start::kSum) sums[r][v] += load(at);
        store(at, sums[r][v]);
      }
  }

  template <Start start, int vectors, int rows = vectors == 3 ? 4 : kRows>
  TF_INLINE void panel(int64_t row, int64_t end, int64_t column) const {
    for (; row + rows <= end; row += rows) block<start, rows, vectors>(row, column);
    if constexpr (rows > 1) panel<start, vectors, rows == 6 ? 4 : rows / 2>(row, end, column);
  }

  template <Start start>
  void all(int64_t rows, int64_t columns) const {
    constexpr int lanes = VecOf<A>::lanes;
    int64_t j = 0;
    if constexpr (kHasTriples)
      if (columns > 2 * lanes && (columns + lanes - 1) / lanes % 2 != 0) panel<start, 3>(0, rows, 0), j = 3 * lanes;
    for (; j + lanes < columns; j += 2 * lanes) panel<start, 2>(0, rows, j);
    if (j < columns) panel<start, 1>(0, rows, j);
  }

  template <Start start>
  void run(int64_t rows, int64_t columns) const {
    Product part = *this;
    part.depth = depth < kDepth ? depth : kDepth;
    part.template all<start>(rows, columns);
    for (int64_t k = kDepth; k < depth; k += kDepth) {
      part.a = a + k * a_depth;
      part.b = b + k * b_pitch;
      part.depth = depth - k < kDepth ? depth - k : kDepth;
      part.template all<Start::kSum>(rows, columns);
    }
  }
};

#ifdef TF_TARGET_BF16
// One panel c[r][j] = bias[j] + sum_k a[r][k] b[k][j] of bf16 numbers, by instructions that multiply pairs of them
// exactly and add them up in float. `a` and `b` hold pairs along k.
struct PairProduct {
  int64_t depth;  // in pairs
  const uint32_t* a;
  int64_t a_row;
  const uint32_t* b;  // [depth, panel]
  float* c;
  int64_t c_pitch;
  const float* bias;

  template <int rows>
  TF_INLINE TF_TARGET_BF16 void block(int64_t row) const {
    constexpr int lanes = VecOf<float>::lanes;
    __m512 sums[rows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_loadu_ps(bias + v * lanes);
    const uint32_t *left = a + row * a_row, *right = b;
    for (int64_t k = 0; k < depth; ++k, ++left, right += kPanel<float>) {
      __m512bh columns[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) columns[v] = (__m512bh)_mm512_loadu_si512(right + v * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(int(left[r * a_row]));
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], pair, columns[v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(c + (row + r) * c_pitch + v * lanes, sums[r][v]);
  }

  TF_TARGET_BF16 void run(int64_t rows) const {
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) block<kRows>(row);
    for (; row < rows; ++row) block<1>(row);
  }
};
#endif

template <typename Element>
class VectorProducts {
 public:
  typedef Element T;
  typedef typename Accumulator<T>::type A;

  const Params& p;

 private:
  Memory memory;

 public:
  const Scratch<A> s;

  VectorProducts(const Params& params, void* first) : p(params), memory{static_cast<char*>(first)}, s(p, memory) {
    const int64_t rows = p.tile * p.segments;
    x = memory.take<A>(p.tokens * s.channels);
    grad_transposed = memory.take<A>(width * s.tokens);
    grad_weights = memory.take<A>(p.tokens * s.tokens);
    compressed = memory.take<A>(rows * s.inputs);
    pairs = memory.take<uint32_t>(p.pairs ? rows * s.inputs / 2 : 0);
  }
  char* end() const { return memory.next; }

  void begin() const {}
  void finish() const {}

  // s.rows = the logits of the segments of `count` lines.
  void generate(int64_t first, int64_t count) const {
    gather_compressed<T>(p, first, count, s.inputs, compressed);
    const int64_t rows = count * p.segments;
#ifdef TF_TARGET_BF16
    if constexpr (sizeof(A) == 4)
      if (p.pairs) return generate_from_pairs(rows);
#endif
    for (int64_t j = 0; j < p.tokens * p.tokens; j += kPanel<A>) {
      const Product<A> product = {depth,
                                  compressed,
                                  s.inputs,
                                  1,
                                  static_cast<const A*>(p.weight_panels) + j * depth,
                                  kPanel<A>,
                                  s.rows + j,
                                  s.logits,
                                  static_cast<const A*>(p.bias) + j};
      product.template run<Start::kBias>(rows, kPanel<A>);
    }
  }

  void read(int64_t line) const { read_line<T>(p, p.x, line, s, x); }

  // s.mixed of a segment, and after the last one, of all: each overwrites what the one before it spilt.
  void mix(int64_t segment) const {
    const Product<A> product = {
        p.tokens,   s.weights, 1, s.tokens, x + segment * width, s.channels, s.mixed + segment * width,
        s.channels, nullptr};
    product.template run<Start::kZero>(p.tokens, width);
  }

  // For the two that follow, where s.grad has been read, too.
  void read_for_gradients(int64_t line) const { read(line); }

  // s.mixed of a segment = the gradient of x.
  void make_grad_x(int64_t segment) const {
    const Product<A> product = {
        p.tokens,   s.weights, s.tokens, 1, s.grad + segment * width, s.channels, s.mixed + segment * width,
        s.channels, nullptr};
    product.template run<Start::kZero>(p.tokens, width);
  }

  // [N, tokens], indexed [source, target].
  const A* grad_weights_of(int64_t segment) const {
    const A* const grad = s.grad + segment * width;
    for (int64_t c = 0; c < width; ++c)
      for (int64_t n = 0; n < p.tokens; ++n) grad_transposed[c * s.tokens + n] = grad[n * s.channels + c];
    const Product<A> product = {width,    x + segment * width, s.channels, 1,      grad_transposed,
                                s.tokens, grad_weights,        s.tokens,   nullptr};
    product.template run<Start::kZero>(p.tokens, s.tokens);
    return grad_weights;
  }

  void write(const View& view, int64_t line) const { write_line<T>(p, view, line, s, s.mixed); }

  // For the two that follow.
  void read_logit_gradients(int64_t) const {}

  // Of the logits' gradients, in s.rows. The gradient of the weight is [N * N rounded up to panels, s.inputs].
  void add_to_grad_weight(int64_t rows, A* grad_weight) const {
    const Product<A> product = {rows, s.rows, 1, s.logits, compressed, s.inputs, grad_weight, s.inputs, nullptr};
    product.template run<Start::kSum>(p.tokens * p.tokens, depth);
  }

  void make_grad_compressed(int64_t rows) const {
    const Product<A> product = {
        p.tokens * p.tokens, s.rows,   s.logits, 1, static_cast<const A*>(p.weight_rows), s.inputs,
        s.grad_compressed,   s.inputs, nullptr};
    product.template run<Start::kZero>(rows, depth);
  }

 private:
  const int64_t width = p.channels / p.segments, depth = p.tokens * p.reduced;
  A* x;                // [N, channels]
  A* grad_transposed;  // [D / S, tokens]
  A* grad_weights;     // [N, tokens]
  A* compressed;       // [tile * S, inputs]
  uint32_t* pairs;     // [tile * S, inputs / 2], bf16 pairs of them

#ifdef TF_TARGET_BF16
  void generate_from_pairs(int64_t rows) const {
    const int64_t steps = (depth + 1) / 2;
    bf16* const narrowed = reinterpret_cast<bf16*>(pairs);
    for (int64_t i = 0; i < rows * s.inputs; i += VecOf<A>::lanes) store(narrowed + i, load(compressed + i));
    for (int64_t j = 0; j < p.tokens * p.tokens; j += kPanel<A>) {
      const PairProduct product = {steps,
                                   pairs,
                                   s.inputs / 2,
                                   static_cast<const uint32_t*>(p.weight_panels) + j * steps,
                                   s.rows + j,
                                   s.logits,
                                   static_cast<const A*>(p.bias) + j};
      product.run(rows);
    }
  }
#endif
};

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
