// Blocks that copy runs of memory beside others that do something else.
#pragma once

#include "common/numbers.cuh"
#include "upconv.h"

namespace tokenfusion {
namespace upconv {

// Block number `block` of those that copy, whose units have N elements.
template <typename T, int N>
TF_DEVICE void copy_units(const UpconvCopy& c, uint32_t block) {
  Numbers<T, N> units[kUpconvCopied];
  int64_t to[kUpconvCopied];
  const uint32_t all = c.units, first = block * (kUpconvThreads * kUpconvCopied) + thread_index();
#pragma unroll
  for (int k = 0; k < kUpconvCopied; ++k) {
    const uint32_t unit = first + k * kUpconvThreads, run = unit / c.run, at = unit - run * c.run;
    const uint32_t outer = run / c.runs[2], image = outer / c.runs[1];
    const uint32_t places[] = {image, outer - image * c.runs[1], run - outer * c.runs[2]};
    int64_t from = at;
    to[k] = at;
#pragma unroll
    for (int i = 0; i < 3; ++i) from += places[i] * c.from_strides[i], to[k] += places[i] * c.to_strides[i];
    if (unit < all) units[k] = Numbers<T, N>::load(static_cast<const T*>(c.from) + from * N);
  }
#pragma unroll
  for (int k = 0; k < kUpconvCopied; ++k)
    if (first + k * kUpconvThreads < all) units[k].store(static_cast<T*>(c.to) + to[k] * N);
}

template <typename T>
TF_DEVICE void copy(const UpconvCopy& c, uint32_t block) {
  if (c.has_vectors)
    copy_units<T, 16 / sizeof(T)>(c, block);
  else
    copy_units<T, 1>(c, block);
}

}  // namespace upconv
}  // namespace tokenfusion
