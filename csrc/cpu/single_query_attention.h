// What the host side and the kernels of single_query_attention share. No torch headers here: see vec.h.
#pragma once

#include <stdint.h>

#include "common/isa.h"

namespace tokenfusion {

// Strides are in elements; the innermost dimension of every tensor is contiguous. Rows are numbered with the extra
// token, where there is one, as row 0. A work item is one part of the rows of one image: item = image * parts + part.
struct SingleQueryAttentionParams {
  const void* query;  // [batch, queries, channels]
  int64_t query_batch_stride, query_stride;
  const void* tokens;  // [batch, rows without the extra one, channels]
  int64_t tokens_batch_stride, tokens_stride;
  const void* extra_token;  // [batch, channels] or null
  int64_t extra_token_stride;
  int64_t rows, channels, queries, parts;
  bool normalize;
  double eps;

  void* context;          // [batch, queries, channels], contiguous
  void* statistics;       // log-sum-exp [batch, queries]
  void* partial_context;  // with parts > 1: [batch, parts, queries, channels], not yet divided
  void* partial_max;      // [batch, parts, queries]
  void* partial_sum;      // [batch, parts, queries]

  // Backward; context and statistics are inputs there.
  const void* grad_context;  // [batch, queries, channels], contiguous
  void* grad_query;          // accumulation dtype, [batch, parts, queries, channels], or null
  void* grad_tokens;         // contiguous, or null
  void* grad_extra_token;    // contiguous, or null
};

struct SingleQueryAttentionKernels {
  typedef void (*Items)(const SingleQueryAttentionParams&, int64_t begin, int64_t end, void* scratch);
  typedef void (*Images)(const SingleQueryAttentionParams&, int64_t begin, int64_t end);

  struct ForDtype {
    int64_t (*scratch_bytes)(int64_t channels, int64_t queries);
    Items forward;
    Images combine;  // joins the parts of forward
    Items backward;
  };
  ForDtype float32, bfloat16, float64;
};

TOKENFUSION_DECLARE_KERNELS(SingleQueryAttentionKernels, single_query_attention)

}  // namespace tokenfusion
