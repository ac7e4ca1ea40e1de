#include "library_product.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

namespace tokenfusion {
namespace {

// Whether oneDNN has bfloat16 instructions of this processor; PyTorch's own product uses none.
bool multiplies_bfloat16() {
  static const bool supported = [] {
    const auto schema = c10::Dispatcher::singleton().findSchema({"mkldnn::_is_mkldnn_bf16_supported", ""});
    return schema && schema->typed<bool()>().call();
  }();
  return supported && at::globalContext().userEnabledMkldnn();
}

}  // namespace

Tensor widened(const Tensor& matrix) {
  return matrix.scalar_type() == at::kBFloat16 && !multiplies_bfloat16() ? matrix.to(at::kFloat) : matrix;
}

void library_product(const Tensor& out, const Tensor& a_, const Tensor& b_, const OptionalTensor& added) {
  const Tensor a = widened(a_), b = widened(b_);
  Tensor result = out;
  if (a.scalar_type() == out.scalar_type()) {
    added ? at::addmm_out(result, *added, a, b) : at::mm_out(result, a, b);
  } else {
    Tensor product = at::empty({a.size(0), b.size(1)}, a.options());
    at::mm_out(product, a, b);  // which autocast leaves alone
    added ? at::add_out(result, *added, product) : result.copy_(product);
  }
}

}  // namespace tokenfusion
