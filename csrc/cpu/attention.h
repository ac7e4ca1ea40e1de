// What the host side and the kernel of attention share. No torch headers here: see vec.h.
#pragma once

#include <stdint.h>

#include "common/isa.h"

namespace tokenfusion {

// Tokens of heads of a batch, [batch, heads, tokens, channels]. Strides are in elements, that of the channels is 1.
struct AttentionView {
  const void* data;
  int64_t batch_stride, head_stride, token_stride;
};

// A work item is one of the parts of a head's queries, of `queries_a_part` or, the last one, fewer.
struct AttentionParams {
  AttentionView q, k, v;
  AttentionView out;  // written
  int64_t heads, queries, tokens, channels;
  int64_t parts, queries_a_part;
  float scale;
};

struct AttentionKernels {
  int64_t queries_together;  // of a product
  int64_t (*scratch_bytes)(const AttentionParams&);
  void (*run)(const AttentionParams&, int64_t begin, int64_t end, void* scratch);  // null where there is no AMX
};

TOKENFUSION_DECLARE_KERNELS(AttentionKernels, attention)

}  // namespace tokenfusion
