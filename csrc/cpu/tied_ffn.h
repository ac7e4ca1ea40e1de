// What the host side and the kernels of tied_ffn share. No torch headers here: see vec.h.
#pragma once

#include <stdint.h>

#include "../common/activation.h"
#include "common/isa.h"

namespace tokenfusion {

constexpr int64_t kRowsPerSum = 32;  // a longer sum would lose precision

// Some rows of the hidden layer, features elements each, contiguous; several pointers may be the same.
struct TiedFfnRows {
  const void* hidden;
  void* activated;  // act(hidden)
  int64_t rows, features;

  // Backward.
  const void* grad_activated;
  void* grad_hidden;  // grad_activated * act'(hidden)
  void* grad_bias;    // accumulation dtype, [rows / kRowsPerSum rounded up, features], sums of grad_hidden over rows
};

struct TiedFfnKernels {
  typedef void (*Rows)(const TiedFfnRows&);

  struct ForDtype {
    Rows forward[static_cast<int>(Activation::kCount)];
    Rows backward[static_cast<int>(Activation::kCount)];
  };
  ForDtype float32, bfloat16, float64;
};

TOKENFUSION_DECLARE_KERNELS(TiedFfnKernels, tied_ffn)

}  // namespace tokenfusion
