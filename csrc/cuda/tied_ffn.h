// What the host side and the kernels of tied_ffn share. No torch headers here: the kernels need none.
#pragma once

#include <stdint.h>

#include "../common/activation.h"

namespace tokenfusion {

constexpr int kTiedFfnThreads = 256;  // of a block

// A pass over matrices [tokens, features] of one size, contiguous and aligned to 16 bytes. They are seen in lines of as
// few tokens as fill whole vectors of 16 bytes. A thread takes the same vector, and so the same features, of `depth`
// lines that follow on each other.
struct TiedFfnPass {
  const void* hidden;  // the pre-activation
  void* activated;     // written; may be hidden; or null, backward
  int64_t elements;    // of a matrix
  int64_t line;        // elements of a line
  int32_t depth;

  // Backward
  void* grad;        // of the activated hidden layer, then of the pre-activation
  float* grad_bias;  // [sums(), line], sums of the latter over the lines of a thread; or null

  int64_t lines() const { return (elements + line - 1) / line; }
  int64_t sums() const { return (lines() + depth - 1) / depth; }
  int64_t threads(int itemsize) const { return sums() * (line * itemsize / 16); }
};

}  // namespace tokenfusion
