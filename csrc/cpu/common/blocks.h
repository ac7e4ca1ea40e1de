// How a loop is cut into blocks for threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace tokenfusion {

// The length of equal blocks of a multiple of `step` items, and of at most `most` (rounded up to such a multiple), in
// each of `copies` of a loop over `items`: of those with nearly the fewest blocks, the one that gives the busiest
// thread the least to do.
inline int64_t block_length(int64_t items, int64_t most, int64_t copies = 1, int64_t step = 1) {
  const int64_t threads = at::get_num_threads(), fewest = at::divup(std::max<int64_t>(items, 1), std::max(most, step));
  int64_t best = 0, least = 0;
  for (int64_t blocks = fewest; blocks < fewest + threads; ++blocks) {
    const int64_t length = at::divup(at::divup(std::max<int64_t>(items, 1), blocks), step) * step;
    const int64_t busiest = at::divup(copies * at::divup(items, length), threads) * length;
    if (best == 0 || busiest < least) best = length, least = busiest;
  }
  return best;
}

}  // namespace tokenfusion
