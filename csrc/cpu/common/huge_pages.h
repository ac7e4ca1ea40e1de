#pragma once

#include <ATen/core/Tensor.h>

namespace tokenfusion {

// An uninitialised tensor, asked for in huge pages, which are many times cheaper to get than small ones.
at::Tensor in_huge_pages(at::Tensor tensor);

}  // namespace tokenfusion
