// gemm.h's products for the host side of operators: right sides that are packed once, and whole products of matrices.
#pragma once

#include <ATen/core/Tensor.h>

#include "../../common/tensors.h"
#include "gemm.h"

namespace tokenfusion {

// Whether the product takes the dtype on this processor.
bool gemm_takes(at::ScalarType dtype);

// For a dtype that it takes.
const GemmKernels::ForDtype& gemm_kernels(at::ScalarType dtype);

// The matrices themselves, or a contiguous copy where the product cannot read their lines.
Tensor with_lines(const Tensor& matrices);

// A matrix [runs * columns, depth] as the right side of products, packed.
class PackedB {
 public:
  PackedB(const GemmKernels::ForDtype& kernels, const Tensor& matrix, int64_t runs = 1);

  GemmTerm term(const GemmLines& a, const float* scale = nullptr) const {
    return {a, depth_, packed_.const_data_ptr(), scale};
  }
  // Runs the product that has this as its only term; call has the rest.
  void multiply(const GemmLines& a, GemmCall call) const;

  int64_t depth() const { return depth_; }

 private:
  const GemmKernels::ForDtype& kernels_;
  int64_t runs_, columns_, depth_;
  Tensor packed_;
};

// Whose product: in float32 that of gemm.h, whose speed does not depend on the make of the processor, or PyTorch's
// library's, as in other dtypes.
enum class Product { kOwn, kLibrary };

// out = a b, or with `accumulate` out += a b, for matrices. Threads share the work, but for a call from within a
// parallel region.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, Product product, bool accumulate = false);

}  // namespace tokenfusion
