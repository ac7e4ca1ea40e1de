// Launches of tied_ffn's kernels on the current device.
#pragma once

#include <cuda_runtime_api.h>

#include "common/dtype.h"
#include "tied_ffn.h"

namespace tokenfusion {

cudaError_t run_tied_ffn_forward(const TiedFfnPass& p, Activation activation, Dtype dtype, cudaStream_t stream);
cudaError_t run_tied_ffn_backward(const TiedFfnPass& p, Activation activation, Dtype dtype, cudaStream_t stream);

}  // namespace tokenfusion
