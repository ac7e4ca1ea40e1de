// The kernels of single_query_attention's backward pass.
#pragma once

#include "single_query_attention_block.cuh"

namespace tokenfusion {
namespace single_query_attention {

template <typename T, int kQueryTiles, bool kFull>
struct Backward : Kernel<T, kQueryTiles, kFull, true> {
  typedef Kernel<T, kQueryTiles, kFull, true> Base;
  typedef typename Base::M M;
  typedef typename Base::Rows Rows;
  using Base::group, Base::groups, Base::image, Base::lane, Base::p, Base::rows, Base::s, Base::split, Base::units,
      Base::warp, Base::warps;
  using Base::kMaxUnits, Base::kOperands, Base::kProducts, Base::kQueries, Base::kVector, Base::Base;

  // Of queries 8 i + lane % 4 * 2 (+ 1), over this lane's rows alone.
  float correction[kQueryTiles][2] = {}, excess[kQueryTiles][2] = {};

  TF_DEVICE void begin() {
    if (thread_index() == 0) *s.first_token = rows.first;
    const T* const grad_context = static_cast<const T*>(p.grad_context) + this->query_row(0) * p.channels;
    const T* const context = static_cast<const T*>(p.context) + this->query_row(0) * p.channels;
    this->fill_operands(grad_context, p.channels, 0, 2);
    this->fill_operands(static_cast<const T*>(p.query) + image * p.query_batch_stride, p.query_stride, 8, 2);
    for (int q = group * warps + warp; q < kQueries; q += warps * groups) {
      float delta = 0;
      if (q < p.queries)
        for (int c = lane; c < p.channels; c += 32)
          delta += to_float(grad_context[q * p.channels + c]) * to_float(context[q * p.channels + c]);
      delta = sum_warp(delta);
      if (lane == q)  // one lane for all queries would have the compiler tear the warp apart before the sum
        s.delta[q] = delta, s.log_sum_exp[q] = q < p.queries ? p.log_sum_exp[this->query_row(q)] : kInfinity;
    }
  }

  static TF_DEVICE float exponential(float x) { return Base::kIsFloat ? expf(x) : exp2_approximate(x * 1.44269504f); }

  TF_DEVICE void step(int tile, T* slab) {
    float score[kProducts][4];  // for every 8 queries, gradients of their weights, then their scores
    const Rows r = this->multiply(tile, slab, score);
    float mean[2] = {}, slope[2] = {};
    float scaled[kQueryTiles][4];
    typename M::A pairs[kQueryTiles];
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i) {
      const int q = 8 * i + lane % 4 * 2;
      float weight[4], grad_score[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int e = k % 2, row = k / 2;
        weight[k] = r.there[row] ? exponential(score[2 * i + 1][k] - s.log_sum_exp[q + e]) : 0;
        // a lone token has weight 1 whatever its score
        grad_score[k] = r.there[row] && rows.rows > 1 ? weight[k] * (score[2 * i][k] - s.delta[q + e]) : 0;
        const float* const operand_sum = s.operand_sum + warps * kOperands + 16 * i + lane % 4 * 2 + e;
        mean[row] += weight[k] * operand_sum[0] + grad_score[k] * operand_sum[8];
        slope[row] += weight[k] * score[2 * i][k] + grad_score[k] * score[2 * i + 1][k];
        scaled[i][k] = grad_score[k] * r.rstd[row];
      }
      pairs[i] = M::from_products(weight, grad_score);
    }
    if (p.grad_query != nullptr) {
      const float scale = Base::round_to_elements(scaled);
      float deviation[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) deviation[i] = r.rstd[i] > 0 ? 1 / r.rstd[i] : 0;
      typename M::B weights[kQueryTiles];
#pragma unroll
      for (int i = 0; i < kQueryTiles; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float rounded = scaled[i][k] * scale;
          correction[i][k % 2] += rounded * r.rest[k / 2];
          excess[i][k % 2] += rounded * deviation[k / 2];
        }
        weights[i] = M::from_transposed_product(scaled[i]);
      }
      this->accumulate(slab, r, weights, scale);
    }
    if (p.grad_tokens != nullptr || p.grad_extra_token != nullptr) {
      if (!p.normalize) {
        mean[0] = mean[1] = slope[0] = slope[1] = 0;
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mean[i] = sum_quad(mean[i]) * p.per_channel;
          slope[i] = sum_quad(slope[i]) * p.per_channel * r.rstd[i];
        }
      }
      form_gradients(slab, r, pairs, mean, slope);
      write_gradients(tile, slab);
    }
  }

  // With dn = sum_q p_q grad_context_q + ds_q query_q, the gradient of a token is rstd (dn - mean(dn) - n mean(dn n)),
  // whose means come from sums over the queries that are known already. It takes the token's place in the tile, from
  // where it is stored in vectors.
  TF_DEVICE void form_gradients(T* slab, const Rows& r, const typename M::A (&pairs)[kQueryTiles],
                                const float (&mean)[2], const float (&slope)[2]) {
    typename M::SplitA split_pairs[kQueryTiles];
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i) split_pairs[i] = M::split(pairs[i]);
    const T* const operands = s.operands + this->first_channel();
    constexpr bool kFloat = Base::kIsFloat;  // where t - shift has digits that t * factor would lose
    float factor[2], summand[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      factor[i] = -r.rstd[i] * slope[i];
      summand[i] = -r.rstd[i] * mean[i] - factor[i] * (kFloat ? r.rest[i] : r.shift[i] + r.rest[i]);
    }
    warp_barrier();  // all lanes have read the tile
#pragma unroll
    for (int u = 0; u < 2 * kMaxUnits; ++u) {
      if (this->has(u / 2)) {
        typename M::FiniteProduct product;
#pragma unroll
        for (int i = 0; i < kQueryTiles; ++i)
          product.add(split_pairs[i], M::load_b_of_products(operands + 16 * i * s.pitch + 8 * u, s.pitch));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          Two<T>* const pair = reinterpret_cast<Two<T>*>(slab + (lane / 4 + 8 * i) * s.pitch + 8 * u + lane % 4 * 2);
          const Two<T> token = *pair;
          float grad[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            grad[e] = product[2 * i + e];
            const float t = to_float(token.x[e]);
            grad[e] = r.rstd[i] * grad[e] + (factor[i] * (kFloat ? t - r.shift[i] : t) + summand[i]);
          }
          store_two(pair->x, grad[0], grad[1]);
        }
      }
    }
    warp_barrier();
  }

  TF_DEVICE void write_gradients(int tile, const T* slab) {
    const int channels = kUnit * units, column = lane % 8 * kVector;
    const bool has_extra = p.extra_token != nullptr;
#pragma unroll
    for (int i = 0; i < kTile; i += 4) {
      const int64_t j = int64_t(tile) * kTile + i + lane / 8;
      const bool is_extra = has_extra && j == 0;
      T* const grads = static_cast<T*>(is_extra ? p.grad_extra_token : p.grad_tokens);
      if (j < rows.rows && grads != nullptr) {
        T* const to =
            grads + (is_extra ? image : *s.first_token + j - has_extra) * p.channels + this->first_channel() + column;
        const T* const from = slab + (i + lane / 8) * s.pitch + column;
#pragma unroll
        for (int k = 0; k < kMaxUnits * kUnit; k += 8 * kVector)
          if (kFull && k / kUnit + 8 * kVector / kUnit <= kMaxUnits || column + k < channels)
            *reinterpret_cast<Vector16*>(to + k) = *reinterpret_cast<const Vector16*>(from + k);
      }
    }
  }

  TF_DEVICE void write_results() {
    this->write_result(correction);
    this->sum_all_rows(excess);
    if (warp == 0) this->write_queries(s.excess, excess);
  }

  // The score gradients sum to zero but for rounding, whose share of the query's gradient goes here.
  TF_DEVICE void finish() {
    if (p.grad_query == nullptr) return;
    for (int q = group * warps + warp; q < p.queries; q += warps * groups) {
      float excess = 0;
      for (int g = -group; g < groups - group; ++g) excess += s.of_group(s.excess, g)[q];
      const T* const context = static_cast<const T*>(p.context) + this->query_row(q) * p.channels;
      const int64_t row = p.splits == 1 ? this->query_row(q) : this->partial_row(q);
      for (int c = 4 * lane; c < p.channels; c += 128) {
        float grad[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) grad[i] = -excess * to_float(context[c + i]);
        for (int g = -group; g < groups - group; ++g) {
          const float* const from = s.of_group(s.result, g) + q * s.result_pitch + c;
#pragma unroll
          for (int i = 0; i < 4; ++i) grad[i] += from[i];
        }
        if (p.splits == 1) {
          store_four(static_cast<T*>(p.grad_query) + row * p.channels + c, grad, 1);
        } else {
          store_four(p.partial_grad_query + row * p.channels + c, grad, 1);
        }
      }
    }
  }
};

template <typename T>
TF_DEVICE void combine_backward(const Params& p) {
  const int64_t image = block_index() / p.queries, q = block_index() % p.queries;
  for (int c = 4 * thread_index(); c < p.channels; c += 4 * block_threads()) {
    float sums[4] = {};
    for (int i = 0; i < p.splits; ++i) {
      const int64_t row = (image * p.splits + i) * p.queries + q;
      float part[4];
      load_four(part, p.partial_grad_query + row * p.channels + c);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] += part[j];
    }
    store_four(static_cast<T*>(p.grad_query) + int64_t(block_index()) * p.channels + c, sums, 1);
  }
}

}  // namespace single_query_attention
}  // namespace tokenfusion
