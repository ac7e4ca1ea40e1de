#include "mlp.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../common/checks.h"
#include "common/blocks.h"
#include "common/huge_pages.h"

namespace tokenfusion {
namespace {

at::DataPtr allocate(int64_t bytes) { return c10::GetCPUAllocator()->allocate(bytes); }

// A layer, and the memory that holds it packed.
struct Layer {
  MlpLayer call{};
  Tensor bias;
  at::DataPtr packed;

  Layer(const MlpKernels& kernels, const Tensor& weight, const OptionalTensor& bias_) {
    call.weight = weight.const_data_ptr();
    call.weight_stride = weight.stride(0);
    call.outputs = weight.size(0);
    call.inputs = weight.size(1);
    bias = at::zeros({at::divup(call.outputs, kernels.panel) * kernels.panel}, weight.options().dtype(at::kFloat));
    if (bias_) bias.narrow(0, 0, call.outputs).copy_(*bias_);
    call.bias = bias.const_data_ptr<float>();
    packed = allocate(kernels.packed_bytes(call));
    call.packed = static_cast<char*>(packed.get());
    at::parallel_for(0, at::divup(call.outputs, kernels.panel), 1,
                     [&](int64_t begin, int64_t end) { kernels.pack(call, begin, end); });
  }
};

Tensor forward(const Tensor& x_, const Tensor& weight_in_, const OptionalTensor& bias_in, const Tensor& weight_out_,
               const OptionalTensor& bias_out) {
  const MlpKernels& kernels = TOKENFUSION_KERNELS(mlp);
  TORCH_CHECK(kernels.run != nullptr && amx_allowed(), "mlp: this processor has no AMX, or it is switched off");
  TORCH_CHECK_TYPE(x_.scalar_type() == at::kBFloat16, "x: got dtype ", x_.scalar_type(), ", expected bfloat16");
  TORCH_CHECK_VALUE(x_.dim() > 0 && x_.numel() > 0, "x: got shape ", x_.sizes(), ", expected elements");
  check_rank("weight_in", weight_in_, 2);
  check_rank("weight_out", weight_out_, 2);
  const int64_t features = weight_in_.size(0), outputs = weight_out_.size(0);
  check("weight_in", weight_in_, {features, x_.size(-1)}, x_.options());
  check("weight_out", weight_out_, {outputs, features}, x_.options());
  check("bias_in", bias_in, {features}, x_.options());
  check("bias_out", bias_out, {outputs}, x_.options());
  std::vector<int64_t> sizes = x_.sizes().vec();
  sizes.back() = outputs;
  const Tensor out = in_huge_pages(at::empty(sizes, x_.options()));
  if (out.numel() == 0) return out;
  const Tensor x = with_contiguous_rows(x_.reshape({-1, x_.size(-1)})), weight_in = with_contiguous_rows(weight_in_),
               weight_out = with_contiguous_rows(weight_out_);
  const Layer first(kernels, weight_in, bias_in), second(kernels, weight_out, bias_out);
  const MlpParams p{x.const_data_ptr(), out.data_ptr(), x.stride(0), outputs, first.call, second.call};
  const int64_t rows = x.size(0), block = block_length(rows, kernels.rows, 1, kernels.row_multiple);
  at::parallel_for(0, at::divup(rows, block), 1, [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = allocate(kernels.scratch_bytes(p));
    for (int64_t row = begin * block; row < std::min(end * block, rows); row += block)
      kernels.run(p, row, std::min(block, rows - row), scratch.get());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(tokenfusion, CPU, library) { library.impl("mlp_cpu", forward); }

}  // namespace tokenfusion
