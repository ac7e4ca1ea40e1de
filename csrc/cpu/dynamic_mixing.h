// What the host side and the kernels of dynamic_mixing share. No torch headers here: see vec.h.
#pragma once

#include <stdint.h>

#include "common/isa.h"

namespace tokenfusion {

// A tensor [batch, lines, tokens, channels] seen along the direction of mixing. Strides are in elements, that of the
// channels is 1.
struct DynamicMixingView {
  const void* data;
  int64_t batch_stride, line_stride, token_stride;
};

// N = tokens of a line, D = channels, S = segments, K = N * d numbers that generate the logits of a segment. A work
// item is a line; a kernel takes `tile` lines at a time, whose segments are rows of the products with the generator's
// weight. Logits of a row are numbered source * N + target.
struct DynamicMixingParams {
  DynamicMixingView x;           // D channels
  DynamicMixingView compressed;  // S * d channels
  const void* weight_panels;     // accumulation dtype, [N * N / panel, rounded up, K, panel], zero-padded
  bool pairs;                    // weight_panels holds bf16 pairs along K, [N * N / panel, K / 2, panel, 2], instead
  // Tiles (AMX) multiply bf16. K of the pairs in weight_panels is rounded up to panels then; weight_rows holds pairs
  // along N * N, [N * N / 2 rounded up to panels, K rounded up to panels, 2]; and grad_weight has its last two
  // dimensions exchanged.
  bool tiles;
  const void* bias;  // accumulation dtype, [N * N rounded up to panels], zero-padded
  int64_t batch, lines, tokens, channels, segments, reduced, tile;

  DynamicMixingView mixed;  // D channels, written
  void* line_sums;          // accumulation dtype, [batch * lines, D], sums of mixed over a line; or null

  // Backward. A part is a range of items with its own sums of the weight's and the bias's gradients.
  DynamicMixingView grad_mixed;
  const void* grad_mean;              // accumulation dtype, [batch, D], added to grad_mixed; or null
  const void* weight_rows;            // accumulation dtype, [N * N, K], both rounded up to panels, zero-padded
  DynamicMixingView grad_x;           // written; data may be null
  DynamicMixingView grad_compressed;  // written; data may be null
  void* grad_weight;  // accumulation dtype, [parts, N * N, K], both rounded up to panels, zeros; or null
  void* grad_bias;    // accumulation dtype, [parts, N * N rounded up to panels], zeros
  int64_t parts;
};

struct DynamicMixingKernels {
  typedef void (*Lines)(const DynamicMixingParams&, int64_t begin, int64_t end, void* scratch);
  typedef void (*Part)(const DynamicMixingParams&, int64_t part, void* scratch);

  struct ForDtype {
    int64_t panel;  // columns that a product computes together
    int64_t (*scratch_bytes)(const DynamicMixingParams&);
    Lines forward;
    Part backward;
  };
  ForDtype float32, bfloat16, float64, bfloat16_tiles;
  bool (*multiplies_pairs)();  // whether those of bfloat16 take pairs on this processor
};

TOKENFUSION_DECLARE_KERNELS(DynamicMixingKernels, dynamic_mixing)

}  // namespace tokenfusion
