// What tied_ffn asks of its operands, on every device.
#pragma once

#include <algorithm>
#include <string_view>
#include <vector>

#include "activation.h"
#include "checks.h"

namespace tokenfusion {
namespace tied_ffn {

inline Activation activation_of(std::string_view name) {
  constexpr std::string_view names[] = {"gelu", "gelu_tanh", "relu", "silu", "identity"};
  const auto* found = std::find(std::begin(names), std::end(names), name);
  TORCH_CHECK_VALUE(found != std::end(names), "activation: got '", name,
                    "', expected 'gelu', 'gelu_tanh', 'relu', 'silu' or 'identity'");
  return static_cast<Activation>(found - std::begin(names));
}

inline void check_operands(const Tensor& x, const Tensor& weight, const OptionalTensor& bias_in,
                           const OptionalTensor& bias_out) {
  check_rank("weight", weight, 2);
  const int64_t features = weight.size(0), channels = weight.size(1);
  TORCH_CHECK_VALUE(weight.numel() > 0, "weight: got shape ", weight.sizes(), ", expected no size of 0");
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == channels, "x: got shape ", x.sizes(), ", expected [..., ", channels,
                    "]");
  check("weight", weight, {features, channels}, x.options());
  check("bias_in", bias_in, {features}, x.options());
  check("bias_out", bias_out, {channels}, x.options());
}

// [..., features], of the hidden layer of x.
inline std::vector<int64_t> hidden_sizes(const Tensor& x, const Tensor& weight) {
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  return sizes;
}

// Beside check_operands, for the backward pass. hidden has no elements where it was not held.
inline void check_gradient(const Tensor& grad_y, const Tensor& hidden, const Tensor& x, const Tensor& weight) {
  check("grad_y", grad_y, x.sizes(), x.options());
  if (hidden.numel() > 0) check("hidden", hidden, hidden_sizes(x, weight), x.options());
}

// [tokens, channels]
inline Tensor flat(const Tensor& t) { return t.reshape({-1, t.size(-1)}); }

}  // namespace tied_ffn
}  // namespace tokenfusion
