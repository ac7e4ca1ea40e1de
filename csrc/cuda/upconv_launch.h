// Launches of the up-convolutions' kernels on the current device.
#pragma once

#include <cuda_runtime_api.h>

#include "common/dtype.h"
#include "upconv.h"

namespace tokenfusion {

// How a kernel goes through a map: the channels of pixels, or the rows of planes, in vectors of 16 bytes or a number at
// a time; or whole planes in vectors, by tiles in shared memory.
enum class UpconvWay { kPixelVectors, kPixelNumbers, kPlaneVectors, kPlaneNumbers, kTiles };

cudaError_t run_upconv_forward(const UpconvPass& p, UpconvWay way, Dtype dtype, cudaStream_t stream);
cudaError_t run_upconv_backward(const UpconvPass& p, UpconvWay way, Dtype dtype, cudaStream_t stream);

}  // namespace tokenfusion
