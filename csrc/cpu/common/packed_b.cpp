#include "packed_b.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "huge_pages.h"

namespace tokenfusion {
namespace {

constexpr int64_t kWorkPerThread = 1 << 15;  // elements below which threads do not pay

}  // namespace

bool gemm_takes(at::ScalarType dtype) {
  return dtype == at::kFloat || (dtype == at::kBFloat16 && TOKENFUSION_KERNELS(gemm).takes_bfloat16());
}

const GemmKernels::ForDtype& gemm_kernels(at::ScalarType dtype) {
  const GemmKernels& kernels = TOKENFUSION_KERNELS(gemm);
  return dtype == at::kFloat ? kernels.float32 : kernels.bfloat16;
}

Tensor with_lines(const Tensor& matrices) {
  return matrices.stride(-2) == 1 || matrices.stride(-1) == 1 ? matrices : matrices.contiguous();
}

PackedB::PackedB(const GemmKernels::ForDtype& kernels, const Tensor& matrix_, int64_t runs)
    : kernels_(kernels), runs_(runs), columns_(matrix_.size(0) / runs), depth_(matrix_.size(1)) {
  const Tensor matrix = with_lines(matrix_);
  const int64_t bytes = kernels.bytes(columns_, depth_), panels = at::divup(columns_, kernels.panel);
  packed_ = in_huge_pages(at::empty({runs * bytes}, matrix.options().dtype(at::kByte)));
  const int64_t grain = at::divup(kWorkPerThread, std::max<int64_t>(kernels.panel * depth_, 1));
  at::parallel_for(0, runs * panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % panels * kernels.panel, column = i / panels * columns_ + first;
      const void* data =
          static_cast<const char*>(matrix.const_data_ptr()) + column * matrix.stride(0) * matrix.element_size();
      kernels.pack({data, matrix.stride(0), matrix.stride(1), nullptr}, std::min(columns_ - first, kernels.panel),
                   depth_, packed_.mutable_data_ptr<uint8_t>() + i / panels * bytes + kernels.bytes(first, depth_));
    }
  });
}

void PackedB::multiply(const GemmLines& a, GemmCall call) const {
  const GemmTerm only = term(a);
  call.terms = &only;
  call.count = 1;
  call.columns = columns_;
  call.runs = runs_;
  kernels_.run(call);
}

}  // namespace tokenfusion
