#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "isa.h"
#include "product.h"

namespace tokenfusion {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kStrips = 8;  // groups of rows whose sums stay in the cache until they are projected

const ProductKernels::ForDtype& kernels_for(at::ScalarType dtype) {
  const ProductKernels& kernels = TOKENFUSION_KERNELS(product);
  TORCH_CHECK_TYPE(dtype == at::kFloat || (dtype == at::kBFloat16 && kernels.takes_bfloat16()), "got dtype ",
                   dtype, ", expected float32, or bfloat16 where the processor multiplies it");
  return dtype == at::kFloat ? kernels.float32 : kernels.bfloat16;
}

// Matrices of which a product can read the lines.
Tensor with_lines(const Tensor& t) { return t.stride(-2) == 1 || t.stride(-1) == 1 ? t : t.contiguous(); }

// A linear layer [D_out, D_in] as the right side of a product.
struct Layer {
  int64_t columns, depth;
  Tensor packed, bias;

  Layer(const ProductKernels::ForDtype& kernels, const Tensor& weight_, const OptionalTensor& bias_) {
    const Tensor weight = with_lines(weight_);
    columns = weight.size(0);
    depth = weight.size(1);
    packed = at::empty({kernels.bytes(columns, depth)}, weight.options().dtype(at::kByte));
    kernels.pack({weight.const_data_ptr(), weight.stride(0), weight.stride(1), nullptr}, columns, depth,
                 packed.data_ptr());
    if (bias_) bias = bias_->to(at::kFloat).contiguous();
  }
};

ProductLines transposed(const ProductLines& m) { return {m.data, m.depth_stride, m.line_stride, nullptr}; }

at::DataPtr allocate(int64_t bytes) { return c10::GetCPUAllocator()->allocate(bytes); }

void check_operands(const Tensor& out, at::TensorList parts, at::TensorList weights, const Tensor& shares) {
  check_rank("out", out, 3);
  check_rank("shares", shares, 3);
  TORCH_CHECK_VALUE(parts.size() == weights.size() && !parts.empty(), "parts, weights: got ", parts.size(), " and ",
                    weights.size(), ", expected as many, and one at least");
  const int64_t batch = out.size(0), tokens = out.size(1), channels = shares.size(2), count = parts.size();
  const auto dtype = out.scalar_type();
  check("shares", shares, {batch, count, channels}, dtype);
  for (int64_t k = 0; k < count; ++k) {
    check_rank("weights", weights[k], 2);
    check("weights", weights[k], {channels, weights[k].size(1)}, dtype);
    check("parts", parts[k], {batch, tokens, weights[k].size(1)}, dtype);
  }
}

// The tokens of an image from `first` on.
ProductLines lines_of(const Tensor& tokens, int64_t image, int64_t first) {
  const int64_t offset = image * tokens.stride(0) + first * tokens.stride(1);
  return {static_cast<const char*>(tokens.const_data_ptr()) + offset * tokens.element_size(), tokens.stride(1),
          tokens.stride(2), nullptr};
}

void forward(const Tensor& out, at::TensorList parts_, at::TensorList weights, const Tensor& shares_,
             const Tensor& bias_, const OptionalTensor& proj_weight, const OptionalTensor& proj_bias) {
  const auto& kernels = kernels_for(out.scalar_type());
  check_operands(out, parts_, weights, shares_);
  check("bias", bias_, {out.size(0), shares_.size(2)}, out.scalar_type());
  check("proj_weight", proj_weight, {out.size(2), shares_.size(2)}, out.scalar_type());
  check("proj_bias", proj_bias, {out.size(2)}, out.scalar_type());
  TORCH_CHECK_VALUE(proj_weight || out.size(2) == shares_.size(2), "out: got shape ", out.sizes(), ", expected ",
                    shares_.size(2), " channels");
  TORCH_CHECK_VALUE(out.stride(2) == 1 || out.size(2) == 1, "out: got strides ", out.strides(),
                    ", expected a contiguous innermost dimension");
  std::vector<Tensor> parts;
  std::vector<Layer> layers;
  int64_t depth = 0;
  for (size_t k = 0; k < parts_.size(); ++k) {
    parts.push_back(with_lines(parts_[k]));
    layers.emplace_back(kernels, weights[k], std::nullopt);
    depth += layers[k].depth;
  }
  const Tensor shares = shares_.to(at::kFloat).contiguous(), bias = bias_.to(at::kFloat).contiguous();
  const std::optional<Layer> projection =
      proj_weight ? std::optional<Layer>(std::in_place, kernels, *proj_weight, proj_bias) : std::nullopt;

  const int64_t tokens = out.size(1), channels = shares.size(2), bytes = out.element_size();
  const int64_t rows = kStrips * kernels.rows, blocks = at::divup(tokens, rows);
  at::parallel_for(0, out.size(0) * blocks, 1, [&](int64_t begin, int64_t end) {
    const at::DataPtr sums = allocate(projection ? rows * channels * bytes : 0);
    const at::DataPtr scratch =
        allocate(std::max(kernels.scratch_bytes(depth, parts.size()), kernels.scratch_bytes(channels, 1)));
    std::vector<ProductTerm> terms(parts.size());
    for (int64_t block = begin; block < end; ++block) {
      const int64_t image = block / blocks, first = block % blocks * rows;
      for (size_t k = 0; k < parts.size(); ++k)
        terms[k] = {lines_of(parts[k], image, first), layers[k].depth, layers[k].packed.const_data_ptr(),
                    shares.const_data_ptr<float>() + image * shares.stride(0) + k * channels};
      ProductCall call{};
      call.terms = terms.data();
      call.count = parts.size();
      call.rows = std::min(rows, tokens - first);
      call.columns = channels;
      call.bias = bias.const_data_ptr<float>() + image * channels;
      void* const target = const_cast<void*>(lines_of(out, image, first).data);
      call.out = projection ? sums.get() : target;
      call.out_stride = projection ? channels : out.stride(1);
      call.scratch = scratch.get();
      kernels.run(call);
      if (!projection) continue;
      terms[0] = {{sums.get(), channels, 1, nullptr}, channels, projection->packed.const_data_ptr(), nullptr};
      call.count = 1;
      call.columns = projection->columns;
      call.bias = projection->bias.defined() ? projection->bias.const_data_ptr<float>() : nullptr;
      call.out = target;
      call.out_stride = out.stride(1);
      kernels.run(call);
    }
  });
}

typedef std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> Gradients;

// Of shares, weights and parts, in float32. Items are images times parts; each worker has its own sums of the weights'
// gradients.
Gradients backward(const Tensor& grad_, const Tensor& shares, at::TensorList parts_, at::TensorList weights) {
  const auto& kernels = TOKENFUSION_KERNELS(product).float32;
  TORCH_CHECK_TYPE(grad_.scalar_type() == at::kFloat, "grad: got dtype ", grad_.scalar_type(), ", expected float32");
  check_operands(grad_, parts_, weights, shares);
  const Tensor grad = grad_.stride(2) == 1 ? grad_ : grad_.contiguous();
  const int64_t count = parts_.size(), items = grad.size(0) * count, tokens = grad.size(1), outputs = grad.size(2);
  const int64_t workers = std::max<int64_t>(std::min<int64_t>(at::get_num_threads(), items), 1);
  const Tensor grad_shares = at::empty(shares.sizes(), shares.options());
  std::vector<Tensor> parts, grad_parts, sums;
  std::vector<Layer> layers;
  for (int64_t k = 0; k < count; ++k) {
    parts.push_back(with_lines(parts_[k]));
    layers.emplace_back(kernels, weights[k].t(), std::nullopt);
    grad_parts.push_back(at::empty(parts[k].sizes(), grad.options()));
    sums.push_back(at::zeros({workers, outputs, weights[k].size(1)}, grad.options()));
  }
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const at::DataPtr scratch = allocate(kernels.scratch_bytes(std::max(tokens, outputs), 1));
    Tensor scaled = at::empty({tokens, outputs}, grad.options());
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t item = items * worker / workers; item < items * (worker + 1) / workers; ++item) {
        const int64_t image = item / count, k = item % count, inputs = parts[k].size(2);
        at::mul_out(scaled, grad[image], shares[image][k]);
        ProductTerm term{{scaled.const_data_ptr(), outputs, 1, nullptr}, outputs, layers[k].packed.const_data_ptr()};
        ProductCall call{};
        call.terms = &term;
        call.count = 1;
        call.rows = tokens;
        call.columns = call.out_stride = inputs;
        call.out = grad_parts[k][image].data_ptr();
        call.scratch = scratch.get();
        kernels.run(call);

        const at::DataPtr packed = allocate(kernels.bytes(inputs, tokens));
        kernels.pack(transposed(lines_of(parts[k], image, 0)), inputs, tokens, packed.get());
        Tensor product = at::empty({outputs, inputs}, grad.options());
        term = {transposed(lines_of(grad, image, 0)), tokens, packed.get()};
        call.rows = outputs;
        call.out = product.data_ptr();
        kernels.run(call);
        sums[k][worker].addcmul_(product, shares[image][k].unsqueeze(1));
        Tensor grad_share = grad_shares[image][k];
        at::sum_out(grad_share, product.mul_(weights[k]), at::IntArrayRef{1});
      }
  });
  std::vector<Tensor> grad_weights;
  for (const Tensor& sum : sums) grad_weights.push_back(sum.sum(0));
  return {grad_shares, grad_weights, grad_parts};
}

}  // namespace

TORCH_LIBRARY_IMPL(tokenfusion, CPU, library) {
  library.impl("weighted_parts", forward);
  library.impl("weighted_parts_backward", backward);
}

}  // namespace tokenfusion
