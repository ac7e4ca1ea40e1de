// What single_query_attention asks of its operands, on every device.
#pragma once

#include "checks.h"

namespace tokenfusion {
namespace single_query_attention {

inline void check_integers(const char* name, const OptionalTensor& tensor, int64_t size, const Tensor& tokens) {
  if (!tensor) return;
  const at::ScalarType dtype = tensor->scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kInt || dtype == at::kLong, name, ": got dtype ", dtype, ", expected Int or Long");
  check(name, *tensor, {size}, tokens.options().dtype(dtype));
}

inline void check_operands(const Tensor& query, const Tensor& tokens, const OptionalTensor& extra_token,
                           const OptionalTensor& lengths, const OptionalTensor& offsets) {
  check_rank("tokens", tokens, 3);
  check_rank("query", query, 3);
  const int64_t batch = offsets ? query.size(0) : tokens.size(0), channels = tokens.size(2);
  TORCH_CHECK_VALUE(offsets ? tokens.size(0) == 1 : tokens.size(1) > 0, "tokens: got shape ", tokens.sizes(),
                    offsets ? ", expected the bags of all images in one" : ", expected at least one token");
  check("query", query, {batch, query.size(1), channels}, tokens.options());
  check("extra_token", extra_token, {batch, channels}, tokens.options());
  check_integers("lengths", lengths, batch, tokens);
  check_integers("offsets", offsets, batch + 1, tokens);
}

// Beside check_operands, for the backward pass.
inline void check_results(const Tensor& grad_context, const Tensor& context, const Tensor& log_sum_exp,
                          const Tensor& query) {
  check("grad_context", grad_context, query.sizes(), query.options());
  check("context", context, query.sizes(), query.options());
  check("log_sum_exp", log_sum_exp, {query.size(0), query.size(1)}, query.options().dtype(accumulation_dtype(query)));
}

}  // namespace single_query_attention
}  // namespace tokenfusion
