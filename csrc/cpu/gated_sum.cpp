#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "common/blocks.h"
#include "common/huge_pages.h"
#include "common/library_product.h"
#include "common/packed_b.h"

namespace tokenfusion {
namespace {

// Rows whose sums stay in the cache until they are projected: groups of the own product's, and of the library's.
constexpr int64_t kStrips = 8, kLibraryRows = 256;
constexpr int64_t kRowsTogether = 16;  // of the library's, at least: each product reads all weights

GemmLines transposed(const GemmLines& m) { return {m.data, m.depth_stride, m.line_stride, nullptr}; }

at::DataPtr allocate(int64_t bytes) { return c10::GetCPUAllocator()->allocate(bytes); }

void check_operands(const Tensor& out, at::TensorList branches, at::TensorList weights, const Tensor& gates) {
  check_rank("out", out, 3);
  check_rank("gates", gates, 3);
  TORCH_CHECK_VALUE(branches.size() == weights.size() && !branches.empty(), "branches, weights: got ", branches.size(),
                    " and ", weights.size(), ", expected the same number of each, and at least one");
  const int64_t batch = out.size(0), tokens = out.size(1), channels = gates.size(2), count = branches.size();
  check("gates", gates, {batch, count, channels}, out.options());
  for (int64_t k = 0; k < count; ++k) {
    check_rank("weights", weights[k], 2);
    check("weights", weights[k], {channels, weights[k].size(1)}, out.options());
    check("branches", branches[k], {batch, tokens, weights[k].size(1)}, out.options());
  }
}

// The tokens of an image from `first` on.
GemmLines lines_of(const Tensor& tokens, int64_t image, int64_t first) {
  const int64_t offset = image * tokens.stride(0) + first * tokens.stride(1);
  return {static_cast<const char*>(tokens.const_data_ptr()) + offset * tokens.element_size(), tokens.stride(1),
          tokens.stride(2), nullptr};
}

// With the library's products: a block of each is scaled and added to the sums while it is in the cache.
void forward_by_library(at::TensorList branches, at::TensorList weights, const Tensor& gates, const Tensor& bias,
                        const OptionalTensor& proj_weight, const OptionalTensor& proj_bias, const Tensor& out) {
  const int64_t tokens = out.size(1), channels = gates.size(2),
                rows = block_length(tokens, kLibraryRows, out.size(0), kRowsTogether);
  const int64_t blocks = at::divup(tokens, rows);
  at::parallel_for(0, out.size(0) * blocks, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const Tensor memory = at::empty({2, rows, channels}, out.options());
    for (int64_t block = begin; block < end; ++block) {
      const int64_t image = block / blocks, first = block % blocks * rows, count = std::min(rows, tokens - first);
      Tensor product = memory[0].narrow(0, 0, count), target = out[image].narrow(0, first, count);
      Tensor sums = proj_weight ? memory[1].narrow(0, 0, count) : target;
      for (size_t k = 0; k < branches.size(); ++k) {
        library_product(product, branches[k][image].narrow(0, first, count), weights[k].t());
        at::addcmul_out(sums, k == 0 ? bias[image] : sums, product, gates[image][k]);
      }
      if (proj_weight) library_product(target, sums, proj_weight->t(), proj_bias);
    }
  });
}

void forward(at::TensorList branches_, at::TensorList weights, const Tensor& gates_, const Tensor& bias_,
             const OptionalTensor& proj_weight, const OptionalTensor& proj_bias, const Tensor& out,
             std::string_view form) {
  const auto dtype = out.scalar_type();
  TORCH_CHECK_VALUE(form.empty() || form == "library", "form: got '", form, "', expected '' or 'library'");
  TORCH_CHECK_TYPE(dtype == at::kFloat || (form.empty() && gemm_takes(dtype)), "out: got dtype ", dtype,
                   ", expected float32, or bfloat16 where the processor multiplies it by the own product");
  check_operands(out, branches_, weights, gates_);
  check("bias", bias_, {out.size(0), gates_.size(2)}, out.options());
  check("proj_weight", proj_weight, {out.size(2), gates_.size(2)}, out.options());
  check("proj_bias", proj_bias, {out.size(2)}, out.options());
  TORCH_CHECK_VALUE(proj_weight || out.size(2) == gates_.size(2), "out: got shape ", out.sizes(), ", expected ",
                    gates_.size(2), " channels");
  check_contiguous_rows("out", out);
  if (form == "library") return forward_by_library(branches_, weights, gates_, bias_, proj_weight, proj_bias, out);
  const auto& kernels = gemm_kernels(dtype);
  std::vector<Tensor> branches;
  std::vector<PackedB> layers;
  int64_t depth = 0;
  for (size_t k = 0; k < branches_.size(); ++k) {
    branches.push_back(with_lines(branches_[k]));
    layers.emplace_back(kernels, weights[k]);
    depth += layers[k].depth();
  }
  const Tensor gates = gates_.to(at::kFloat).contiguous(), bias = bias_.to(at::kFloat).contiguous();
  const std::optional<PackedB> projection =
      proj_weight ? std::optional<PackedB>(std::in_place, kernels, *proj_weight) : std::nullopt;
  const OptionalTensor projection_bias =
      proj_bias ? OptionalTensor(proj_bias->to(at::kFloat).contiguous()) : std::nullopt;

  const int64_t tokens = out.size(1), channels = gates.size(2), bytes = out.element_size();
  const int64_t rows = block_length(tokens, kStrips * kernels.rows, out.size(0), kernels.rows);
  const int64_t blocks = at::divup(tokens, rows);
  at::parallel_for(0, out.size(0) * blocks, 1, [&](int64_t begin, int64_t end) {
    const at::DataPtr sums = allocate(projection ? rows * channels * bytes : 0);
    const at::DataPtr scratch =
        allocate(std::max(kernels.scratch_bytes(depth, branches.size()), kernels.scratch_bytes(channels, 1)));
    std::vector<GemmTerm> terms(branches.size());
    for (int64_t block = begin; block < end; ++block) {
      const int64_t image = block / blocks, first = block % blocks * rows;
      for (size_t k = 0; k < branches.size(); ++k)
        terms[k] = layers[k].term(lines_of(branches[k], image, first),
                                  gates.const_data_ptr<float>() + image * gates.stride(0) + k * channels);
      GemmCall call{};
      call.terms = terms.data();
      call.count = branches.size();
      call.rows = std::min(rows, tokens - first);
      call.columns = channels;
      call.bias = bias.const_data_ptr<float>() + image * channels;
      void* const target = const_cast<void*>(lines_of(out, image, first).data);
      call.out = projection ? sums.get() : target;
      call.out_stride = projection ? channels : out.stride(1);
      call.scratch = scratch.get();
      kernels.run(call);
      if (!projection) continue;
      call.bias = projection_bias ? projection_bias->const_data_ptr<float>() : nullptr;
      call.out = target;
      call.out_stride = out.stride(1);
      projection->multiply({sums.get(), channels, 1, nullptr}, call);
    }
  });
}

typedef std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> Gradients;

// The gradients of gates, weights and branches, in float32. Items are images times branches; each worker has its own
// sums of the weights' gradients.
Gradients backward(const Tensor& grad_, const Tensor& gates, at::TensorList branches_, at::TensorList weights) {
  const auto& kernels = gemm_kernels(at::kFloat);
  TORCH_CHECK_TYPE(grad_.scalar_type() == at::kFloat, "grad: got dtype ", grad_.scalar_type(), ", expected float32");
  check_operands(grad_, branches_, weights, gates);
  check("grad", grad_, {gates.size(0), grad_.size(1), gates.size(2)}, gates.options());
  const Tensor grad = with_contiguous_rows(grad_);
  const int64_t count = branches_.size(), items = grad.size(0) * count, tokens = grad.size(1), outputs = grad.size(2);
  const int64_t workers = std::max<int64_t>(std::min<int64_t>(at::get_num_threads(), items), 1);
  const Tensor grad_gates = at::empty(gates.sizes(), gates.options());
  std::vector<Tensor> branches, grad_branches, sums;
  std::vector<PackedB> layers;
  for (int64_t k = 0; k < count; ++k) {
    branches.push_back(with_lines(branches_[k]));
    layers.emplace_back(kernels, weights[k].t());
    grad_branches.push_back(in_huge_pages(at::empty(branches[k].sizes(), grad.options())));
    sums.push_back(at::zeros({workers, outputs, weights[k].size(1)}, grad.options()));
  }
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const at::DataPtr scratch = allocate(kernels.scratch_bytes(std::max(tokens, outputs), 1));
    Tensor scaled = at::empty({tokens, outputs}, grad.options());
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t item = items * worker / workers; item < items * (worker + 1) / workers; ++item) {
        const int64_t image = item / count, k = item % count, inputs = branches[k].size(2);
        at::mul_out(scaled, grad[image], gates[image][k]);
        GemmCall call{};
        call.rows = tokens;
        call.out = grad_branches[k][image].data_ptr();
        call.out_stride = inputs;
        call.scratch = scratch.get();
        layers[k].multiply({scaled.const_data_ptr(), outputs, 1, nullptr}, call);

        const at::DataPtr packed = allocate(kernels.bytes(inputs, tokens));
        kernels.pack(transposed(lines_of(branches[k], image, 0)), inputs, tokens, packed.get());
        Tensor product = at::empty({outputs, inputs}, grad.options());
        const GemmTerm term{transposed(lines_of(grad, image, 0)), tokens, packed.get(), nullptr};
        call.terms = &term;
        call.count = 1;
        call.rows = outputs;
        call.columns = inputs;
        call.out = product.data_ptr();
        kernels.run(call);
        sums[k][worker].addcmul_(product, gates[image][k].unsqueeze(1));
        Tensor grad_gate = grad_gates[image][k];
        at::sum_out(grad_gate, product.mul_(weights[k]), at::IntArrayRef{1});
      }
  });
  std::vector<Tensor> grad_weights;
  for (const Tensor& sum : sums) grad_weights.push_back(sum.sum(0));
  return {grad_gates, grad_weights, grad_branches};
}

}  // namespace

TORCH_LIBRARY_IMPL(tokenfusion, CPU, library) {
  library.impl("gated_sum_out_cpu", forward);
  library.impl("gated_sum_backward_cpu", backward);
}

}  // namespace tokenfusion
