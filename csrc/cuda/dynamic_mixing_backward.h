// What the host side and the kernels of dynamic_mixing's backward pass share. No torch headers here.
#pragma once

#include <cuda_runtime_api.h>

#include "common/dtype.h"
#include "dynamic_mixing.h"

namespace tokenfusion {

// Tokens of a line as the backward kernels take them: those beyond the last have no weight and no gradient.
inline int dynamic_mixing_padded_tokens(int tokens) { return tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64; }
// Columns of the generator with its bias behind the others, and zeros up to eight.
inline int dynamic_mixing_columns(int inputs) { return inputs / 8 * 8 + 8; }

// n = padded tokens, K = N * d, C = columns. A row is a segment of a line; a launch has `rows`
// of them, from first_row on.
struct DynamicMixingBackward {
  DynamicMixingView x, grad_mixed;  // D channels
  DynamicMixingView compressed;     // S * d channels
  const void* weight;               // [N * N, weight_pitch]: K columns and zeros up to 16 bytes, aligned to them
  const void* bias;                 // [N * N]
  const float* grad_mean;           // [batch, D], added to grad_mixed; or null
  int32_t first_row, rows, lines, tokens, channels, segments, reduced, weight_pitch;

  DynamicMixingView grad_x;           // written, where it has data
  DynamicMixingView grad_compressed;  // written, where it has data
  void* logit_gradients;              // [rows of the launch, n * n], written, in an order of their own; or null
  void* rows_of_inputs;               // [rows of the launch, C]: K compressed numbers, 1, zeros; written with these
};

// From logit_gradients^T rows_of_inputs [n * n, C] to the gradients of the generator; either may be null.
struct DynamicMixingGenerator {
  const float* product;
  void* grad_weight;  // [N * N, K]
  void* grad_bias;    // [N * N]
  int32_t tokens, padded_tokens, inputs, columns;
};

// The shared memory that a block needs at least, in a dtype of this many bytes.
int64_t dynamic_mixing_backward_shared_bytes(int tokens, int reduced, int itemsize);

cudaError_t run_dynamic_mixing_backward(const DynamicMixingBackward& p, Dtype dtype, cudaStream_t stream);
cudaError_t run_dynamic_mixing_generator(const DynamicMixingGenerator& p, Dtype dtype, cudaStream_t stream);

}  // namespace tokenfusion
