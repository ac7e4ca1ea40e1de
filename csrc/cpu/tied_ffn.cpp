#include "tied_ffn.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <tuple>

#include "../common/tied_ffn_checks.h"
#include "common/huge_pages.h"
#include "common/kernels_for.h"
#include "common/library_product.h"
#include "common/linear.h"

namespace tokenfusion {
namespace {

constexpr int64_t kBlock = 256;            // tokens of one matrix product
constexpr int64_t kBlockBytes = 2 << 20;   // of their hidden layer, beyond which no core's cache holds it
constexpr int64_t kLargeBlock = 512;       // tokens then: each product reads, and its library packs, the whole weight
constexpr int64_t kMinBlock = 32;          // with fewer tokens a thread, the products are shared among the threads
constexpr int64_t kChunkBytes = 16 << 20;  // of the hidden layer and its gradient, for one product of dW
constexpr int64_t kMaxChunk = 2048;        // tokens of that product; a longer sum would lose precision

// Whose products, by the name of a form: see linear.h.
Library library_of(std::string_view form) {
  TORCH_CHECK_VALUE(form.empty() || form == "blas", "form: got '", form, "', expected '' or 'blas'");
  return form.empty() ? Library::kOneDnn : Library::kBlas;
}

// Tokens of a block, such that all threads get equally many blocks; all tokens where threads have to share the
// products. hidden_bytes: of a token's hidden layer.
int64_t block_of(int64_t tokens, int64_t hidden_bytes) {
  tokens = std::max<int64_t>(tokens, 1);
  const int64_t most = kBlock * hidden_bytes > kBlockBytes ? kLargeBlock : kBlock;
  const int64_t threads = at::get_num_threads(), per_thread = at::divup(tokens, threads);
  if (threads > 1 && per_thread < kMinBlock) return tokens;
  return at::divup(per_thread, at::divup(per_thread, most));
}

// f(first block, last + 1) on every thread; a single block runs outside of them, so that its products can use them.
template <typename F>
void each_share(int64_t blocks, F f) {
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    f(begin, end);
  });
}

void put(const Tensor& target, const Tensor& result) {
  if (!result.is_same(target)) target.copy_(result);
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_in,
                                   const OptionalTensor& bias_out, std::string_view activation, bool hold,
                                   std::string_view form) {
  const Library library = library_of(form);
  tied_ffn::check_operands(x_, weight_, bias_in, bias_out);
  const int index = static_cast<int>(tied_ffn::activation_of(activation));
  const auto kernel = kernels_for(TOKENFUSION_KERNELS(tied_ffn), "x", x_.scalar_type()).forward[index];
  const Tensor weight = widened(weight_);
  const int64_t features = weight.size(0);
  Tensor y = in_huge_pages(at::empty(x_.sizes(), x_.options()));
  Tensor hidden =
      hold ? in_huge_pages(at::empty(tied_ffn::hidden_sizes(x_, weight), x_.options())) : at::empty({0}, x_.options());
  if (y.numel() == 0) return {y, hidden};
  const Tensor x = tied_ffn::flat(x_), flat_y = tied_ffn::flat(y), flat_hidden = hold ? tied_ffn::flat(hidden) : hidden;
  const int64_t tokens = x.size(0), block = block_of(tokens, features * x.element_size());
  const Tensor transposed = weight.t();
  each_share(at::divup(tokens, block), [&](int64_t begin, int64_t end) {
    const Tensor scratch = at::empty({std::min(block, tokens), features}, x.options());
    for (int64_t first = begin * block; first < std::min(end * block, tokens); first += block) {
      const int64_t rows = std::min(block, tokens - first);
      const Tensor activated = scratch.narrow(0, 0, rows), held = hold ? flat_hidden.narrow(0, first, rows) : activated;
      const Tensor u = linear(library, held, x.narrow(0, first, rows), weight, bias_in);
      if (hold) put(held, u);
      kernel({u.const_data_ptr(), activated.data_ptr(), rows, features});
      const Tensor out = flat_y.narrow(0, first, rows);
      put(out, linear(library, out, activated, transposed, bias_out));
    }
  });
  return {y, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_y_, const Tensor& x_, const Tensor& weight_,
                                                    const OptionalTensor& bias_in, const Tensor& hidden,
                                                    std::string_view activation, std::array<bool, 4> needed,
                                                    std::string_view form) {
  const Library library = library_of(form);
  tied_ffn::check_operands(x_, weight_, bias_in, std::nullopt);
  tied_ffn::check_gradient(grad_y_, hidden, x_, weight_);
  const int index = static_cast<int>(tied_ffn::activation_of(activation));
  const auto kernel = kernels_for(TOKENFUSION_KERNELS(tied_ffn), "x", x_.scalar_type()).backward[index];
  const Tensor weight = widened(weight_);
  const int64_t features = weight.size(0), channels = weight.size(1);
  const auto accumulation = x_.options().dtype(accumulation_dtype(x_));
  const bool held = hidden.numel() > 0;

  Tensor grad_x = in_huge_pages(empty_gradient(needed[0], x_));
  Tensor grad_weight = at::zeros({channels, needed[1] ? features : 0}, accumulation);  // transposed
  const Tensor x = tied_ffn::flat(x_), grad_y = tied_ffn::flat(grad_y_),
               flat_grad_x = needed[0] ? tied_ffn::flat(grad_x) : grad_x;
  const Tensor flat_hidden = held ? tied_ffn::flat(hidden).contiguous() : hidden;
  const int64_t tokens = x.size(0), block = block_of(tokens, features * x.element_size());
  const Tensor transposed = weight.t();
  const int64_t fitting = kChunkBytes / (2 * features * x_.element_size());
  const int64_t blocks_a_chunk = std::min(fitting, kMaxChunk) / block;
  const int64_t chunk = std::min(tokens, std::max<int64_t>(blocks_a_chunk, at::get_num_threads()) * block);
  const int64_t sums = at::divup(block, kRowsPerSum);  // of a block
  Tensor grad_bias_in = at::zeros({at::divup(tokens, block) * sums, features}, accumulation);

  // For a chunk of tokens, inner holds the gradient of the hidden layer, then the activated hidden layer; outer holds
  // x, then the gradient of y.
  const Tensor inner = at::empty({2 * chunk, features}, x.options());
  const Tensor outer = at::empty({needed[1] ? 2 * chunk : 0, channels}, x.options());
  const Tensor product = at::empty_like(grad_weight, x.options());
  for (int64_t start = 0; start < tokens && (needed[0] || needed[1] || needed[2]); start += chunk) {
    const int64_t count = std::min(chunk, tokens - start);
    each_share(at::divup(count, block), [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * block; first < std::min(end * block, count); first += block) {
        const int64_t rows = std::min(block, count - first), token = start + first;
        const Tensor x_block = x.narrow(0, token, rows), grad_block = grad_y.narrow(0, token, rows);
        const Tensor grad_hidden = inner.narrow(0, first, rows), activated = inner.narrow(0, count + first, rows);
        const Tensor u =
            held ? flat_hidden.narrow(0, token, rows) : linear(library, activated, x_block, weight, bias_in);
        const Tensor grad_activated = linear(library, grad_hidden, grad_block, weight);
        TiedFfnRows r{u.const_data_ptr(), activated.data_ptr(), rows, features};
        r.grad_activated = grad_activated.const_data_ptr();
        r.grad_hidden = grad_hidden.data_ptr();
        r.grad_bias = grad_bias_in.select(0, token / block * sums).data_ptr();
        kernel(r);
        if (needed[0]) {
          const Tensor out = flat_grad_x.narrow(0, token, rows);
          put(out, linear(library, out, grad_hidden, transposed));
        }
        if (needed[1]) {
          outer.narrow(0, first, rows).copy_(x_block);
          outer.narrow(0, count + first, rows).copy_(grad_block);
        }
      }
    });
    if (needed[1])
      grad_weight.add_(linear(library, product, outer.narrow(0, 0, 2 * count).t(), inner.narrow(0, 0, 2 * count).t()));
  }
  const auto finished = [&](const Tensor& sum) { return sum.to(x.scalar_type()); };
  return {grad_x, needed[1] ? finished(grad_weight).t().contiguous() : at::empty({0}, x.options()),
          needed[2] ? finished(grad_bias_in.sum(0)) : at::empty({0}, x.options()),
          needed[3] ? finished(at::sum(grad_y, 0, false, accumulation_dtype(x))) : at::empty({0}, x.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(tokenfusion, CPU, library) {
  library.impl("tied_ffn_cpu", forward);
  library.impl("tied_ffn_backward_cpu", backward);
}

}  // namespace tokenfusion
