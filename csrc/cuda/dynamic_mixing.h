// What the host side and the kernels of dynamic_mixing share. No torch headers here: the kernels need none.
#pragma once

#include <stdint.h>

namespace tokenfusion {

// A tensor [batch, lines, tokens, channels] seen along the direction of mixing. Strides are in elements, that of the
// channels is 1.
struct DynamicMixingView {
  void* data;
  int64_t batch_stride, line_stride, token_stride;
  int32_t aligned;  // every segment of every token begins at a multiple of 16 bytes, and has whole ones
};

// N = tokens of a line, S = segments, D = channels, d = reduced, K = N * d numbers that generate the logits of a
// segment. A row is a segment of a line.
struct DynamicMixingParams {
  DynamicMixingView x;           // D channels
  DynamicMixingView compressed;  // S * d channels
  const void* weight;            // [N * N, weight_pitch]: K columns and zeros up to 16 bytes, aligned to them
  const void* bias;              // [N * N]
  int64_t rows;
  int32_t lines, tokens, channels, segments, reduced, weight_pitch;

  DynamicMixingView mixed;  // D channels, written
  float* line_sums;         // [batch * lines, D], sums of mixed over a line; or null
};

}  // namespace tokenfusion
