#include "single_query_attention.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string_view>
#include <tuple>
#include <vector>

#include "../common/single_query_attention_checks.h"
#include "common/huge_pages.h"
#include "common/kernels_for.h"

namespace tokenfusion {
namespace {

constexpr int64_t kItemsPerThread = 4;     // below it, images are cut into parts, but for one in the form of few parts
constexpr int64_t kMinRowsPerPart = 64;    // threads do not pay for less
constexpr int64_t kMaxRowsPerPart = 1024;  // a longer sum would lose precision
constexpr int64_t kQueryElements = 3 << 14;  // of a block of queries that stays in cache, in each of four matrices
constexpr int64_t kMinQueries = 16, kMaxQueries = 128;  // of a block
constexpr int64_t kWorkPerThread = 1 << 16;             // multiplications below which threads do not pay

// By its names, with commas between: "vectors", without the tiles of AMX; "few", of few parts.
struct Form {
  bool by_vectors, few_parts;

  explicit Form(std::string_view names)
      : by_vectors(names == "vectors" || names == "vectors,few"), few_parts(names == "few" || names == "vectors,few") {
    TORCH_CHECK_VALUE(by_vectors || few_parts || names.empty(), "form: got '", names,
                      "', expected '', 'vectors', 'few' or 'vectors,few'");
  }
};

// The tokens of an image: the number of the first, among those of all images one after the other, and how many.
struct Bag {
  int64_t first, count;
};

std::vector<int64_t> values_of(const Tensor& integers) {
  const Tensor values = integers.to(at::kLong).contiguous();
  return {values.const_data_ptr<int64_t>(), values.const_data_ptr<int64_t>() + values.numel()};
}

// In the order of their tokens, without overlaps.
std::vector<Bag> bags_of(const Tensor& tokens, const OptionalTensor& lengths, const OptionalTensor& offsets) {
  std::vector<int64_t> ends;
  if (offsets) {
    ends = values_of(*offsets);
  } else {
    for (int64_t image = 0; image <= tokens.size(0); ++image) ends.push_back(image * tokens.size(1));
  }
  const int64_t all = tokens.size(0) * tokens.size(1);
  TORCH_CHECK_VALUE(0 <= ends.front() && ends.back() <= all, "offsets: got ", ends.front(), " to ", ends.back(),
                    ", expected them within the ", all, " tokens");
  const std::vector<int64_t> counts = lengths ? values_of(*lengths) : std::vector<int64_t>();
  std::vector<Bag> bags;
  for (size_t i = 0; i + 1 < ends.size(); ++i) {
    const int64_t most = ends[i + 1] - ends[i], count = lengths ? counts[i] : most;
    TORCH_CHECK_VALUE(most >= 0, "offsets: got ", ends[i + 1], " after ", ends[i], ", expected them to grow");
    TORCH_CHECK_VALUE(0 <= count && count <= most, "lengths: got ", count, ", expected 0 to ",
                      offsets ? "" : "N = ", most);
    bags.push_back({ends[i], count});
  }
  return bags;
}

// Images, and long ones in several parts, so that threads get equal shares of all rows.
struct Cut {
  std::vector<SingleQueryAttentionPart> parts;
  std::vector<int64_t> first_part = {0};  // of each image; the last is their number
  std::vector<int64_t> cost = {0};        // of all parts before each; the last is that of all

  Cut(const std::vector<Bag>& bags, const Tensor& tokens, bool has_extra, const Form& form) {
    int64_t all = int64_t(bags.size()) * has_extra;
    for (const Bag& bag : bags) all += bag.count;
    const int64_t items = (form.few_parts ? 1 : kItemsPerThread) * at::get_num_threads();
    const int64_t channels = tokens.size(2), length = std::max<int64_t>(1, tokens.size(1));
    for (const Bag& bag : bags) {
      const int64_t n = bag.count + has_extra;
      const int64_t at_token = bag.first / length * tokens.stride(0) + bag.first % length * tokens.stride(1);
      const int64_t wanted = all == 0 ? 1 : at::divup(items * n, all);
      const int64_t count =
          std::max({int64_t(1), std::min(wanted, n / kMinRowsPerPart), at::divup(n, kMaxRowsPerPart)});
      const int64_t image = int64_t(first_part.size()) - 1;
      for (int64_t i = 0; i < count; ++i) {
        parts.push_back({image, n * i / count, n * (i + 1) / count, count == 1, at_token, bag.first * channels});
        cost.push_back(cost.back() + parts.back().end - parts.back().begin + 1);
      }
      first_part.push_back(int64_t(parts.size()));
    }
  }

  int64_t images() const { return int64_t(first_part.size()) - 1; }
  bool has_partial() const { return int64_t(parts.size()) > images(); }
};

SingleQueryAttentionParams make_params(const Tensor& query, const Tensor& tokens, const OptionalTensor& extra_token,
                                       const Cut& cut, bool normalize, double eps, const Form& form) {
  SingleQueryAttentionParams p{};
  p.query = query.const_data_ptr();
  p.query_batch_stride = query.stride(0);
  p.query_stride = query.stride(1);
  p.tokens = tokens.const_data_ptr();
  p.tokens_stride = tokens.stride(1);
  if (extra_token) {
    p.extra_token = extra_token->const_data_ptr();
    p.extra_token_stride = extra_token->stride(0);
  }
  p.channels = tokens.size(2);
  p.all_queries = p.queries = query.size(1);
  p.parts = cut.parts.data();
  p.first_part = cut.first_part.data();
  p.normalize = normalize;
  p.eps = eps;
  p.by_vectors = form.by_vectors;
  return p;
}

int64_t queries_of_block(const SingleQueryAttentionParams& p) {
  const int64_t most = std::clamp(kQueryElements / std::max<int64_t>(1, p.channels), kMinQueries, kMaxQueries);
  return at::divup(p.all_queries, std::max<int64_t>(1, at::divup(p.all_queries, most)));
}

// Reads the rows of a part, which stay in cache, again for each block of queries.
void run_parts(const SingleQueryAttentionParams& p, const Cut& cut,
               const SingleQueryAttentionKernels::ForDtype& kernels, SingleQueryAttentionKernels::Parts kernel) {
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, p.channels * p.queries));
  const int64_t block = queries_of_block(p), scratch_bytes = kernels.scratch_bytes(p.channels, block);
  const auto part_at = [&](int64_t cost) {
    return std::lower_bound(cut.cost.begin(), cut.cost.end(), cost) - cut.cost.begin();
  };
  at::parallel_for(0, cut.cost.back(), grain, [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(scratch_bytes);
    SingleQueryAttentionParams q = p;
    for (int64_t part = part_at(begin); part < part_at(end); ++part) {
      q.first_query = 0;
      do {
        q.queries = std::min(block, p.all_queries - q.first_query);
        q.add_gradients = q.first_query > 0;
        kernel(q, part, part + 1, scratch.get());
        q.first_query += block;
      } while (q.first_query < p.all_queries);
    }
  });
}

void run_rows(const SingleQueryAttentionParams& p, const Cut& cut, SingleQueryAttentionKernels::Rows kernel) {
  at::parallel_for(0, cut.images() * p.queries, 1, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void check_operands(const Tensor& query, const Tensor& tokens, const OptionalTensor& extra_token,
                    const OptionalTensor& lengths, const OptionalTensor& offsets) {
  single_query_attention::check_operands(query, tokens, extra_token, lengths, offsets);
  check_contiguous_rows("tokens", tokens);
}

std::tuple<Tensor, Tensor> forward(const Tensor& query_, const Tensor& tokens, const OptionalTensor& extra_token_,
                                   const OptionalTensor& lengths, const OptionalTensor& offsets, bool normalize,
                                   double eps, std::string_view names) {
  const Form form(names);
  const auto& kernels = kernels_for(TOKENFUSION_KERNELS(single_query_attention), "tokens", tokens.scalar_type());
  check_operands(query_, tokens, extra_token_, lengths, offsets);
  const Tensor query = with_contiguous_rows(query_);
  const OptionalTensor extra_token = extra_token_ ? OptionalTensor(with_contiguous_rows(*extra_token_)) : std::nullopt;
  const std::vector<Bag> bags = bags_of(tokens, lengths, offsets);
  const Cut cut(bags, tokens, extra_token.has_value(), form);
  SingleQueryAttentionParams p = make_params(query, tokens, extra_token, cut, normalize, eps, form);
  const auto accumulation = query.options().dtype(accumulation_dtype(tokens));
  Tensor context = at::empty(query.sizes(), query.options());
  Tensor statistics = at::empty({query.size(0), p.queries}, accumulation);
  Tensor partial_context, partial_max, partial_sum;
  p.context = context.data_ptr();
  p.statistics = statistics.data_ptr();
  if (cut.has_partial()) {
    const int64_t parts = int64_t(cut.parts.size());
    partial_context = at::empty({parts, p.queries, p.channels}, accumulation);
    partial_max = at::empty({parts, p.queries}, accumulation);
    partial_sum = at::empty_like(partial_max);
    p.partial_context = partial_context.data_ptr();
    p.partial_max = partial_max.data_ptr();
    p.partial_sum = partial_sum.data_ptr();
  }
  run_parts(p, cut, kernels, kernels.forward);
  if (cut.has_partial()) run_rows(p, cut, kernels.combine);
  return {context, statistics};
}

// Tokens that take no part have a gradient of zero.
void zero_gradients(const Tensor& grad_tokens, const std::vector<Bag>& bags) {
  const int64_t tokens = grad_tokens.size(0) * grad_tokens.size(1);
  const int64_t bytes = grad_tokens.size(2) * grad_tokens.element_size();
  char* const memory = static_cast<char*>(grad_tokens.data_ptr());
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, bytes));
  at::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    const auto zero_between = [&](int64_t from, int64_t to) {
      from = std::max(from, begin), to = std::min(to, end);
      if (from < to) std::memset(memory + from * bytes, 0, (to - from) * bytes);
    };
    int64_t done = 0;
    for (const Bag& bag : bags) {
      zero_between(done, bag.first);
      done = bag.first + bag.count;
    }
    zero_between(done, tokens);
  });
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_context_, const Tensor& query_, const Tensor& tokens,
                                            const OptionalTensor& extra_token_, const OptionalTensor& lengths,
                                            const OptionalTensor& offsets, const Tensor& context_,
                                            const Tensor& log_sum_exp_, bool normalize, double eps,
                                            std::array<bool, 3> needed, std::string_view names) {
  const Form form(names);
  const auto& kernels = kernels_for(TOKENFUSION_KERNELS(single_query_attention), "tokens", tokens.scalar_type());
  check_operands(query_, tokens, extra_token_, lengths, offsets);
  const Tensor query = with_contiguous_rows(query_);
  const OptionalTensor extra_token = extra_token_ ? OptionalTensor(with_contiguous_rows(*extra_token_)) : std::nullopt;
  const Tensor grad_context = grad_context_.contiguous(), context = context_.contiguous();
  const Tensor log_sum_exp = log_sum_exp_.contiguous();
  const std::vector<Bag> bags = bags_of(tokens, lengths, offsets);
  const Cut cut(bags, tokens, extra_token.has_value(), form);
  SingleQueryAttentionParams p = make_params(query, tokens, extra_token, cut, normalize, eps, form);
  single_query_attention::check_results(grad_context, context, log_sum_exp, query);
  p.context = context.data_ptr();
  p.statistics = log_sum_exp.data_ptr();
  p.grad_context = grad_context.const_data_ptr();

  Tensor grad_query = empty_gradient(needed[0], query);
  // gradients that several blocks of queries add to are rounded once
  const at::ScalarType dtype = tokens.scalar_type();
  const at::ScalarType sums = queries_of_block(p) < p.all_queries ? accumulation_dtype(tokens) : dtype;
  p.wide_gradients = sums != dtype;
  Tensor grad_tokens = in_huge_pages(empty_gradient(needed[1], tokens, sums));
  Tensor grad_extra_token = empty_gradient(needed[2], extra_token.value_or(query), sums);
  Tensor partial_grad_query;
  if (needed[0]) {
    p.grad_query = grad_query.data_ptr();
    if (cut.has_partial()) {
      partial_grad_query = at::empty({int64_t(cut.parts.size()), p.queries, p.channels},
                                     query.options().dtype(accumulation_dtype(tokens)));
      p.partial_grad_query = partial_grad_query.data_ptr();
    }
  }
  if (needed[1]) {
    p.grad_tokens = grad_tokens.data_ptr();
    if (lengths || offsets) zero_gradients(grad_tokens, bags);
  }
  if (needed[2]) p.grad_extra_token = grad_extra_token.data_ptr();
  run_parts(p, cut, kernels, kernels.backward);
  if (needed[0] && cut.has_partial()) run_rows(p, cut, kernels.sum_gradients);
  return {grad_query, grad_tokens.to(dtype), grad_extra_token.to(dtype)};
}

}  // namespace

TORCH_LIBRARY_IMPL(tokenfusion, CPU, library) {
  library.impl("single_query_attention_cpu", forward);
  library.impl("single_query_attention_backward_cpu", backward);
}

}  // namespace tokenfusion
