// A matrix product with packed operands, for operators that sum several products, or whose rows lie scattered in
// memory. No torch headers here: see vec.h.
//
//     out[i][j] (+)= bias[j] + sum over terms of scale[j] * (sum over k of a(i, k) b(j, k))
//
// b is packed once, by `pack`, and shared by all calls and threads. `run` packs a, a few rows at a time, and is the
// work of one thread. Sums are float. bfloat16 is multiplied in pairs by builds for processors that may have
// instructions for it, and widened to float by the others.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace tokenfusion {

// Element (i, k) is at i * line_stride + k * depth_stride, in elements; one of the two strides is 1. With line_offsets
// (and a depth_stride of 1), line i begins at line_offsets[i] instead.
struct GemmLines {
  const void* data;
  int64_t line_stride, depth_stride;
  const int64_t* line_offsets;  // or null
};

struct GemmTerm {
  GemmLines a;
  int64_t depth;
  const void* b;       // packed
  const float* scale;  // [columns], or null for ones; of all terms or of none
};

struct GemmCall {
  const GemmTerm* terms;
  int64_t count, rows, columns;
  const float* bias;  // [columns], or null for zeros
  void* out;          // row i at i * out_stride, or at out_offsets[i]
  int64_t out_stride;
  const int64_t* out_offsets;  // or null
  // With run_offsets, `runs` matrices b of that many columns each are packed one after the other, at multiples of
  // bytes(columns, depth), and the product with b number r is written at run_offsets[r] from there.
  int64_t runs;
  const int64_t* run_offsets;  // or null
  bool accumulate;
  void* scratch;  // scratch_bytes(the sum of the terms' depths, count), aligned to 64 bytes
};

struct GemmKernels {
  struct ForDtype {
    int64_t rows;   // rows that are computed together
    int64_t panel;  // columns that are packed together: where j is a multiple, b from column j on is at bytes(j, depth)
    int64_t (*bytes)(int64_t columns, int64_t depth);                                // of b packed
    void (*pack)(const GemmLines& b, int64_t columns, int64_t depth, void* packed);  // aligned to 64 bytes
    int64_t (*scratch_bytes)(int64_t depth, int64_t terms);
    void (*run)(const GemmCall&);
  };
  ForDtype float32, bfloat16, bfloat16_tiles;
  bool (*takes_bfloat16)();  // not where pairs are packed and no instruction multiplies them; tiles need those of AMX
};

TOKENFUSION_DECLARE_KERNELS(GemmKernels, gemm)

}  // namespace tokenfusion
