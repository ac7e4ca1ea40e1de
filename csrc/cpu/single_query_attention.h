// What the host side and the kernels of single_query_attention share. No torch headers here: see vec.h.
#pragma once

#include <stdint.h>

#include "common/isa.h"

namespace tokenfusion {

// Some of the rows of an image, which one thread takes at a time.
struct SingleQueryAttentionPart {
  int64_t image, begin, end;
  bool whole;                 // no other part has rows of the image
  int64_t at_token;           // where the image's tokens begin, in elements
  int64_t at_token_gradient;  // and their gradients
};

// Strides are in elements; the innermost dimension of every tensor is contiguous. Rows are numbered with the extra
// token, where there is one, as row 0.
struct SingleQueryAttentionParams {
  const void* query;  // [batch, queries, channels]
  int64_t query_batch_stride, query_stride;
  const void* tokens;  // of all images, each of which begins where its parts say
  int64_t tokens_stride;
  const void* extra_token;  // [batch, channels] or null
  int64_t extra_token_stride;
  int64_t channels;
  int64_t all_queries, first_query, queries;  // of an image, and which of them a call is for
  const SingleQueryAttentionPart* parts;      // image by image, in the order of their rows
  const int64_t* first_part;                  // [batch + 1], of each image
  bool normalize;
  double eps;
  bool by_vectors;  // whatever tiles (AMX) the processor has

  void* context;          // [batch, queries, channels], contiguous
  void* statistics;       // log-sum-exp [batch, queries]
  void* partial_context;  // of images in several parts: [parts, queries, channels], not yet divided
  void* partial_max;      // [parts, queries]
  void* partial_sum;      // [parts, queries]

  // Backward; context and statistics are inputs there.
  const void* grad_context;  // [batch, queries, channels], contiguous
  void* grad_query;          // contiguous, or null
  void* partial_grad_query;  // of images in several parts: accumulation dtype, [parts, queries, channels]
  void* grad_tokens;         // contiguous, or null
  void* grad_extra_token;    // contiguous, or null
  bool wide_gradients;       // these two are of the accumulation dtype
  bool add_gradients;        // and what they hold is added to
};

struct SingleQueryAttentionKernels {
  typedef void (*Parts)(const SingleQueryAttentionParams&, int64_t begin, int64_t end, void* scratch);
  typedef void (*Rows)(const SingleQueryAttentionParams&, int64_t begin, int64_t end);  // of [batch * queries]

  struct ForDtype {
    int64_t (*scratch_bytes)(int64_t channels, int64_t queries);
    Parts forward;
    Rows combine;  // joins the parts of forward
    Parts backward;
    Rows sum_gradients;  // of the queries, from the parts of backward
  };
  ForDtype float32, bfloat16, float16, float64;
};

TOKENFUSION_DECLARE_KERNELS(SingleQueryAttentionKernels, single_query_attention)

}  // namespace tokenfusion
