#include "dynamic_mixing.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string_view>
#include <tuple>

#include "../common/dynamic_mixing_checks.h"
#include "common/huge_pages.h"
#include "common/kernels_for.h"

namespace tokenfusion {
namespace {

// Rows of a product that share each read of the generator's weight, at least; and in the form of tall tiles, which are
// for large caches.
constexpr int64_t kRowsPerTile = 16, kRowsPerTallTile = 64;

// The tiles of AMX, unless the form is "vectors"; their products take as many rows as tall tiles have.
bool by_tiles(const Tensor& x, std::string_view form) {
  return x.scalar_type() == at::kBFloat16 && amx_allowed() && form != "vectors";
}

const DynamicMixingKernels::ForDtype& kernels_of(const Tensor& x, bool tiles) {
  const DynamicMixingKernels& kernels = TOKENFUSION_KERNELS(dynamic_mixing);
  return tiles ? kernels.bfloat16_tiles : kernels_for(kernels, "x", x.scalar_type());
}

DynamicMixingView view_of(const Tensor& tensor, int64_t dim) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(3 - dim), tensor.stride(dim)};
}

// The generator's weight in the accumulation dtype, its rows or its columns padded with zeros to whole panels.
Tensor padded(const Tensor& weight, int64_t rows, int64_t columns, at::ScalarType dtype) {
  return at::constant_pad_nd(weight.to(dtype), {0, columns - weight.size(1), 0, rows - weight.size(0)}).contiguous();
}

struct Call {
  DynamicMixingParams p;
  const DynamicMixingKernels::ForDtype& kernels;
  at::TensorOptions accumulation;
  int64_t outputs, inputs;  // N * N and N * d, rounded up to panels
  Tensor weight_panels, bias;

  Call(const Tensor& x, const Tensor& compressed, const Tensor& weight, const Tensor& bias_, int64_t segments,
       int64_t dim, std::string_view form)
      : p{},
        kernels(kernels_of(x, p.tiles = by_tiles(x, form))),
        accumulation(x.options().dtype(accumulation_dtype(x))) {
    dynamic_mixing::check_operands(x, compressed, weight, bias_, segments, dim);
    TORCH_CHECK_VALUE(form.empty() || form == "tall" || form == "vectors", "form: got '", form,
                      "', expected '', 'tall' or 'vectors'");
    const int64_t panel = kernels.panel, depth = weight.size(1);
    const auto dtype = accumulation_dtype(x);
    outputs = at::divup(weight.size(0), panel) * panel;
    inputs = at::divup(depth, panel) * panel;
    p.pairs = p.tiles || (x.scalar_type() == at::kBFloat16 && TOKENFUSION_KERNELS(dynamic_mixing).multiplies_pairs());
    const int64_t step = p.pairs ? 2 : 1, steps = at::divup(p.tiles ? inputs : depth, step);
    const Tensor rows = padded(weight, outputs, steps * step, p.pairs ? at::kBFloat16 : dtype);
    weight_panels = rows.view({-1, panel, steps, step}).transpose(1, 2).contiguous();
    bias = at::constant_pad_nd(bias_.to(dtype), {0, outputs - weight.size(0)}).contiguous();
    p.x = view_of(x, dim);
    p.compressed = view_of(compressed, dim);
    p.weight_panels = weight_panels.const_data_ptr();
    p.bias = bias.const_data_ptr();
    p.batch = x.size(0);
    p.lines = x.size(3 - dim);
    p.tokens = x.size(dim);
    p.channels = x.size(3);
    p.segments = segments;
    p.reduced = compressed.size(3) / segments;
    p.tile = std::min(at::divup(p.tiles || form == "tall" ? kRowsPerTallTile : kRowsPerTile, segments),
                      at::divup(lines(), at::get_num_threads()));
    p.tile = std::max<int64_t>(p.tile, 1);
  }

  int64_t lines() const { return p.batch * p.lines; }
  int64_t tiles() const { return at::divup(lines(), p.tile); }

  at::DataPtr scratch() const {
    const int64_t bytes = kernels.scratch_bytes(p);
    at::DataPtr memory = c10::GetCPUAllocator()->allocate(bytes);
    std::memset(memory.get(), 0, bytes);
    return memory;
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& compressed, const Tensor& generate_weight,
                                   const Tensor& generate_bias, int64_t segments, int64_t dim, bool with_mean,
                                   std::string_view form) {
  Call call(x, compressed, generate_weight, generate_bias, segments, dim, form);
  DynamicMixingParams& p = call.p;
  Tensor mixed = in_huge_pages(at::empty(x.sizes(), x.options()));
  p.mixed = view_of(mixed, dim);
  Tensor line_sums;
  if (with_mean) {
    line_sums = at::empty({p.batch, p.lines, p.channels}, call.accumulation);
    p.line_sums = line_sums.data_ptr();
  }
  at::parallel_for(0, call.tiles(), 1, [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = call.scratch();
    call.kernels.forward(p, begin * p.tile, std::min(end * p.tile, call.lines()), scratch.get());
  });
  if (!with_mean) return {mixed, at::empty({0}, x.options())};
  return {mixed, line_sums.sum(1).div_(p.lines * p.tokens).to(x.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_mixed_, const OptionalTensor& grad_mean_,
                                                    const Tensor& x, const Tensor& compressed,
                                                    const Tensor& generate_weight, const Tensor& generate_bias,
                                                    int64_t segments, int64_t dim, std::array<bool, 4> needed,
                                                    std::string_view form) {
  Call call(x, compressed, generate_weight, generate_bias, segments, dim, form);
  DynamicMixingParams& p = call.p;
  dynamic_mixing::check_gradients(grad_mixed_, grad_mean_, x);
  const Tensor grad_mixed = with_contiguous_rows(grad_mixed_);
  p.grad_mixed = view_of(grad_mixed, dim);
  Tensor grad_mean, weight_rows, partial_weight, partial_bias;
  if (grad_mean_) {
    grad_mean = grad_mean_->to(call.accumulation.dtype()).div(p.lines * p.tokens).contiguous();
    p.grad_mean = grad_mean.const_data_ptr();
  }
  const Tensor grad_x = in_huge_pages(empty_gradient(needed[0], x));
  const Tensor grad_compressed = empty_gradient(needed[1], compressed);
  if (needed[0]) p.grad_x = view_of(grad_x, dim);
  if (needed[1]) {
    p.grad_compressed = view_of(grad_compressed, dim);
    weight_rows = padded(generate_weight, call.outputs, call.inputs, p.tiles ? at::kBFloat16 : accumulation_dtype(x));
    if (p.tiles) weight_rows = weight_rows.view({-1, 2, call.inputs}).transpose(1, 2).contiguous();
    p.weight_rows = weight_rows.const_data_ptr();
  }
  p.parts = std::min<int64_t>(at::get_num_threads(), call.tiles());
  if (needed[2] || needed[3]) {
    partial_weight = at::zeros({p.parts, call.outputs, call.inputs}, call.accumulation);
    if (p.tiles) partial_weight = partial_weight.view({p.parts, call.inputs, call.outputs}).transpose(1, 2);
    partial_bias = at::zeros({p.parts, call.outputs}, call.accumulation);
    p.grad_weight = partial_weight.data_ptr();
    p.grad_bias = partial_bias.data_ptr();
  }
  at::parallel_for(0, p.parts, 1, [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = call.scratch();
    for (int64_t part = begin; part < end; ++part) call.kernels.backward(p, part, scratch.get());
  });
  const auto total = [&](bool wanted, const Tensor& partial, const Tensor& like) {
    if (!wanted) return at::empty({0}, like.options());
    Tensor sum = partial.sum(0);
    for (int64_t d = 0; d < like.dim(); ++d) sum = sum.narrow(d, 0, like.size(d));
    return sum.to(like.scalar_type()).contiguous();
  };
  return {grad_x, grad_compressed, total(needed[2], partial_weight, generate_weight),
          total(needed[3], partial_bias, generate_bias)};
}

}  // namespace

TORCH_LIBRARY_IMPL(tokenfusion, CPU, library) {
  library.impl("dynamic_mixing_cpu", forward);
  library.impl("dynamic_mixing_backward_cpu", backward);
}

}  // namespace tokenfusion
