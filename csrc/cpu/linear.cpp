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

constexpr int64_t kMinRowsToReorder = 512;  // with fewer, the reordering costs more than it saves

// The operators that torch.compile calls; there is no header of them.
struct OneDnn {
  typedef Tensor Product(const Tensor&, const Tensor&, const OptionalTensor&, std::string_view,
                         c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
  typedef Tensor Reorder(const Tensor&, std::optional<int64_t>);

  c10::TypedOperatorHandle<Product> product;
  c10::TypedOperatorHandle<Reorder> reorder;
  bool bfloat16;
};

const OneDnn* onednn() {
  static const std::optional<OneDnn> found = []() -> std::optional<OneDnn> {
    const auto operator_named = [](const char* name) { return c10::Dispatcher::singleton().findSchema({name, ""}); };
    const auto product = operator_named("mkldnn::_linear_pointwise");
    const auto reorder = operator_named("mkldnn::_reorder_linear_weight");
    const auto bfloat16 = operator_named("mkldnn::_is_mkldnn_bf16_supported");
    if (!product || !reorder || !bfloat16) return std::nullopt;
    return OneDnn{product->typed<OneDnn::Product>(), reorder->typed<OneDnn::Reorder>(),
                  bfloat16->typed<bool()>().call()};
  }();
  return found ? &*found : nullptr;
}

bool onednn_serves(at::ScalarType dtype, int64_t rows) {
  if (!at::globalContext().userEnabledMkldnn() || onednn() == nullptr) return false;
  // In bfloat16 PyTorch's own product is oneDNN's, too: the reordering is all that there is to gain.
  return dtype == at::kFloat || (dtype == at::kBFloat16 && onednn()->bfloat16 && rows >= kMinRowsToReorder);
}

}  // namespace

Linear::Linear(const Tensor& weight, int64_t rows)
    : weight_(weight), onednn_(onednn_serves(weight.scalar_type(), rows)) {
  if (onednn_ && weight.is_contiguous() && rows >= kMinRowsToReorder)
    weight_ = onednn()->reorder.call(weight, std::nullopt);
}

Tensor Linear::operator()(const Tensor& x, const OptionalTensor& bias) const {
  if (onednn_) return onednn()->product.call(x, weight_, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
  return bias ? at::addmm(*bias, x, weight_.t()) : at::mm(x, weight_.t());
}

}  // namespace tokenfusion
