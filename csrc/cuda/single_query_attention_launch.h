// Launches of single_query_attention's kernels on the current device.
#pragma once

#include <cuda_runtime_api.h>

#include "common/dtype.h"
#include "single_query_attention.h"

namespace tokenfusion {

// The shared memory that a block needs at least for p's strips and query tiles; more than any GPU has where its
// registers do not suffice for them.
int64_t single_query_attention_shared_bytes(SingleQueryAttentionParams p, Dtype dtype, bool backward);

cudaError_t run_single_query_attention_forward(const SingleQueryAttentionParams& p, Dtype dtype, cudaStream_t stream);
cudaError_t run_single_query_attention_backward(const SingleQueryAttentionParams& p, Dtype dtype, cudaStream_t stream);

}  // namespace tokenfusion
