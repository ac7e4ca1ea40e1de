#include "packed_b.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/CPUAllocator.h>

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

void multiply(const Tensor& out_, const Tensor& a_, const Tensor& b, bool accumulate) {
  const bool rows = out_.stride(1) == 1 || out_.size(1) == 1, columns = out_.stride(0) == 1 || out_.size(0) == 1;
  if (a_.scalar_type() != at::kFloat || isa() == Isa::kDefault || !(rows || columns)) {
    Tensor out = out_;
    accumulate ? at::addmm_out(out, out, a_, b) : at::mm_out(out, a_, b);
    return;
  }
  if (!rows) return multiply(out_.t(), b.t(), a_.t(), accumulate);
  const GemmKernels::ForDtype& kernels = gemm_kernels(at::kFloat);
  const PackedB right(kernels, b.t());
  const Tensor a = with_lines(a_);
  const int64_t count = out_.size(0), strips = at::divup(count, kernels.rows);
  const int64_t grain = at::divup(kWorkPerThread, std::max<int64_t>(kernels.rows * out_.size(1), 1));
  at::parallel_for(0, strips, grain, [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(kernels.scratch_bytes(right.depth(), 1));
    const int64_t first = begin * kernels.rows;
    GemmCall call{};
    call.rows = std::min(end * kernels.rows, count) - first;
    call.out = out_.mutable_data_ptr<float>() + first * out_.stride(0);
    call.out_stride = out_.stride(0);
    call.accumulate = accumulate;
    call.scratch = scratch.get();
    right.multiply({a.const_data_ptr<float>() + first * a.stride(0), a.stride(0), a.stride(1), nullptr}, call);
  });
}

}  // namespace tokenfusion
