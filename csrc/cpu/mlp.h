// What the host side and the kernel of mlp share. No torch headers here: see vec.h.
#pragma once

#include <stdint.h>

#include "common/isa.h"

namespace tokenfusion {

// A linear layer in bfloat16: its weight is [outputs, inputs], rows `weight_stride` elements apart.
struct MlpLayer {
  const void* weight;
  int64_t weight_stride, inputs, outputs;
  const float* bias;  // [outputs rounded up to panels], zeros beyond
  char* packed;       // written by pack
};

// Rows of x and out lie `x_stride` and `out_stride` elements apart.
struct MlpParams {
  const void* x;
  void* out;
  int64_t x_stride, out_stride;
  MlpLayer first, second;
};

struct MlpKernels {
  int64_t panel;         // outputs that are computed together
  int64_t rows;          // of a block, at most
  int64_t row_multiple;  // which costs as much as any part of it
  int64_t (*packed_bytes)(const MlpLayer&);
  void (*pack)(const MlpLayer&, int64_t first_panel, int64_t end_panel);
  int64_t (*scratch_bytes)(const MlpParams&);
  void (*run)(const MlpParams&, int64_t first_row, int64_t count, void* scratch);  // null where there is no AMX
};

TOKENFUSION_DECLARE_KERNELS(MlpKernels, mlp)

}  // namespace tokenfusion
