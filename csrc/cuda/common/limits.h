// What an operator's kernels can take on a GPU, for the operator's own file and for Python.
#pragma once

#include <stdint.h>

namespace tokenfusion {

// The largest d for N tokens, in a dtype of this many bytes; 0 where there is none.
int64_t dynamic_mixing_cuda_max_reduced(int64_t tokens, int64_t itemsize, int64_t device);

}  // namespace tokenfusion
