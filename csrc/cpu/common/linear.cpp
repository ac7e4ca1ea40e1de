#include "linear.h"

#include <ATen/Context.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <string_view>

#include "library_product.h"

namespace tokenfusion {
namespace {

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

// oneDNN refuses a matrix whose rows or columns share memory.
Tensor without_overlaps(const Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  const bool apart = matrix.stride(0) >= columns * matrix.stride(1) || matrix.stride(1) >= rows * matrix.stride(0);
  return apart ? matrix : matrix.contiguous();
}

}  // namespace

Tensor linear(Library library, Tensor out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  // oneDNN's operator reads a bias as contiguous, whatever its strides. A weight in oneDNN's own order would be a few
  // percent faster, but other numbers of rows than it was made for get oneDNN's reference code, which is slower by
  // orders of magnitude.
  if (library == Library::kOneDnn && x.scalar_type() == at::kFloat && at::globalContext().userEnabledMkldnn() &&
      onednn_product()) {
    const OptionalTensor read = bias ? OptionalTensor(bias->contiguous()) : std::nullopt;
    return onednn_product()->call(x, without_overlaps(weight), read, "none", c10::List<std::optional<at::Scalar>>(),
                                  "");
  }
  library_product(out, x, weight.t(), bias);
  return out;
}

}  // namespace tokenfusion
