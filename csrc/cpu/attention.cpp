#include "attention.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include "../common/checks.h"
#include "common/blocks.h"

namespace tokenfusion {
namespace {

AttentionView view_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  const AttentionKernels& kernels = TOKENFUSION_KERNELS(attention);
  TORCH_CHECK(kernels.run != nullptr && amx_allowed(), "attention: this processor has no AMX, or it is switched off");
  TORCH_CHECK_TYPE(q.scalar_type() == at::kBFloat16, "q: got dtype ", q.scalar_type(), ", expected bfloat16");
  check_rank("q", q, 4);
  check_rank("k", k, 4);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), channels = q.size(3);
  check("k", k, {batch, heads, k.size(2), channels}, q.options());
  check("v", v, k.sizes(), q.options());
  TORCH_CHECK_VALUE(q.numel() > 0 && k.numel() > 0, "q, k: got shapes ", q.sizes(), " and ", k.sizes(),
                    ", expected elements");
  check_contiguous_rows("q", q);
  check_contiguous_rows("k", k);
  check_contiguous_rows("v", v);
  const Tensor out = at::empty_like(q.transpose(1, 2)).transpose(1, 2);  // with the strides of PyTorch's function
  AttentionParams p{view_of(q), view_of(k), view_of(v), view_of(out)};
  p.heads = heads;
  p.queries = queries;
  p.tokens = k.size(2);
  p.channels = channels;
  p.queries_a_part = block_length(queries, queries, batch * heads, kernels.queries_together);
  p.parts = at::divup(queries, p.queries_a_part);
  p.scale = static_cast<float>(scale);
  at::parallel_for(0, batch * heads * p.parts, 1, [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(kernels.scratch_bytes(p));
    kernels.run(p, begin, end, scratch.get());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(tokenfusion, CPU, library) { library.impl("attention_cpu", forward); }

}  // namespace tokenfusion
