// The matrix products of dynamic_mixing, whose operands lie in a thread's cache. For dynamic_mixing_kernels.cpp alone.
#pragma once

#include "common/vec.h"

#if TF_VECTOR_BYTES == 64
#include <immintrin.h>
#define TF_TARGET_BF16 __attribute__((target("avx512bf16")))
#endif

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

constexpr int kRows = TF_VECTOR_BYTES == 64 ? 8 : 4;  // rows and vectors of a block of a product, held in registers
constexpr int kVectors = 2;
constexpr int64_t kDepth = 64;  // a longer sum would lose precision

template <typename A>
constexpr int64_t kPanel = kVectors * VecOf<A>::lanes;

enum class Start { kZero, kBias, kSum };

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

  template <Start start, int vectors, int rows = kRows>
  TF_INLINE void panel(int64_t row, int64_t end, int64_t column) const {
    for (; row + rows <= end; row += rows) block<start, rows, vectors>(row, column);
    if constexpr (rows > 1) panel<start, vectors, rows / 2>(row, end, column);
  }

  template <Start start>
  void all(int64_t rows, int64_t columns) const {
    constexpr int lanes = VecOf<A>::lanes;
    int64_t j = 0;
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

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
