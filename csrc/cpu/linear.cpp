#include "linear.h"

#include <ATen/Context.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <string_view>

namespace tokenfusion {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The operator that torch.compile calls for oneDNN's product; there is no header of it.
typedef Tensor OneDnnProduct(const Tensor&, const Tensor&, const OptionalTensor&, std::string_view,
                             c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

const c10::TypedOperatorHandle<OneDnnProduct>* onednn_product() {
  static const auto found = []() -> std::optional<c10::TypedOperatorHandle<OneDnnProduct>> {
    const auto schema = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (!schema) return std::nullopt;
    return schema->typed<OneDnnProduct>();
  }();
  return found ? &*found : nullptr;
}

}  // namespace

Tensor linear(Tensor out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  // oneDNN's operator reads a bias as contiguous, whatever its strides. In bfloat16 PyTorch's own product is oneDNN's, too. A weight in oneDNN's own order would be faster by some per
  // cent, but other numbers of rows than it was made for get oneDNN's reference code, which is slower by orders of
  // magnitude.
  const bool onednn = x.scalar_type() == at::kFloat && at::globalContext().userEnabledMkldnn() && onednn_product();
  const OptionalTensor contiguous = bias ? OptionalTensor(bias->contiguous()) : std::nullopt;
  if (onednn) return onednn_product()->call(x, weight, contiguous, "none", c10::List<std::optional<at::Scalar>>(), "");
  return bias ? at::addmm_out(out, *bias, x, weight.t()) : at::mm_out(out, x, weight.t());
}

}  // namespace tokenfusion
