// What the host side and the forward kernel of dynamic_mixing share. No torch headers here.
#pragma once

#include <cuda_runtime_api.h>

#include "common/dtype.h"
#include "dynamic_mixing.h"

namespace tokenfusion {

// The shared memory that a block needs at least, in a dtype of this many bytes.
int64_t dynamic_mixing_forward_shared_bytes(int tokens, int reduced, int itemsize);

cudaError_t run_dynamic_mixing_forward(const DynamicMixingParams& p, Dtype dtype, cudaStream_t stream);

}  // namespace tokenfusion
