#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "isa.h"
#include "product.h"

namespace tokenfusion {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kStrips = 8;  // groups of rows whose sums stay in the cache until they are projected

const ProductKernels::ForDtype& kernels_for(at::ScalarType dtype) {
  const ProductKernels& kernels = TOKENFUSION_KERNELS(product);
  TORCH_CHECK_TYPE(dtype == at::kFloat || (dtype == at::kBFloat16 && kernels.multiplies_bfloat16()), "got dtype ",
                   dtype, ", expected float32, or bfloat16 where the processor multiplies it");
  return dtype == at::kFloat ? kernels.float32 : kernels.bfloat16;
}

// A linear layer [D_out, D_in] as the right side of a product.
struct Layer {
  int64_t columns, depth;
  Tensor packed, bias;

  Layer(const ProductKernels::ForDtype& kernels, const Tensor& weight_, const OptionalTensor& bias_) {
    const Tensor weight = weight_.stride(0) == 1 || weight_.stride(1) == 1 ? weight_ : weight_.contiguous();
    columns = weight.size(0);
    depth = weight.size(1);
    packed = at::empty({kernels.bytes(columns, depth)}, weight.options().dtype(at::kByte));
    kernels.pack({weight.const_data_ptr(), weight.stride(0), weight.stride(1), nullptr}, columns, depth,
                 packed.data_ptr());
    if (bias_) bias = bias_->to(at::kFloat).contiguous();
  }
};

// The tokens of an image from `first` on.
ProductLines lines_of(const Tensor& tokens, int64_t image, int64_t first) {
  const int64_t offset = image * tokens.stride(0) + first * tokens.stride(1);
  return {static_cast<const char*>(tokens.const_data_ptr()) + offset * tokens.element_size(), tokens.stride(1),
          tokens.stride(2), nullptr};
}

void forward(const Tensor& out, at::TensorList parts_, at::TensorList weights, const Tensor& shares_,
             const Tensor& bias_, const OptionalTensor& proj_weight, const OptionalTensor& proj_bias) {
  const auto& kernels = kernels_for(out.scalar_type());
  std::vector<Tensor> parts;
  std::vector<Layer> layers;
  int64_t depth = 0;
  for (size_t k = 0; k < parts_.size(); ++k) {
    const Tensor& part = parts_[k];
    parts.push_back(part.stride(1) == 1 || part.stride(2) == 1 ? part : part.contiguous());
    layers.emplace_back(kernels, weights[k], std::nullopt);
    depth += layers[k].depth;
  }
  const Tensor shares = shares_.to(at::kFloat).contiguous(), bias = bias_.to(at::kFloat).contiguous();
  const std::optional<Layer> projection =
      proj_weight ? std::optional<Layer>(std::in_place, kernels, *proj_weight, proj_bias) : std::nullopt;

  const int64_t tokens = out.size(1), channels = shares.size(2), bytes = out.element_size();
  const int64_t rows = kStrips * kernels.rows, blocks = at::divup(tokens, rows);
  at::parallel_for(0, out.size(0) * blocks, 1, [&](int64_t begin, int64_t end) {
    const auto allocate = [](int64_t size) { return c10::GetCPUAllocator()->allocate(size); };
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

}  // namespace

TORCH_LIBRARY_IMPL(tokenfusion, CPU, library) { library.impl("weighted_parts", forward); }

}  // namespace tokenfusion
