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
  using Base::group, Base::groups, Base::image, Base::lane, Base::p, Base::s, Base::warp;
  using Base::warps, Base::kIsCut, Base::kIsFloat, Base::kMaxUnits, Base::kOperands, Base::kProducts, Base::kQueries,
      Base::kVector, Base::Base;

  // Of queries 8 i + lane % 4 * 2 (+ 1), over this lane's rows alone.
  float correction[kQueryTiles][2] = {}, excess[kQueryTiles][2] = {};

  TF_DEVICE void begin() {
    const T* const grad_context = static_cast<const T*>(p.grad_context) + this->query_row(0) * p.channels;
    const T* const context = static_cast<const T*>(p.context) + this->query_row(0) * p.channels;
    this->fill_operands(grad_context, p.channels, 0, 2);
    this->fill_operands(this->first_query_row(), p.query_stride, 8, 2);
    for (int q = group * warps + warp; q < kQueries; q += warps * groups) {
      float delta = 0;
      if (q < this->queries())
#pragma unroll 1
        for (int c = kVector * lane; c < this->channels(); c += 32 * kVector) {
          const int64_t place = int64_t(q) * p.channels + this->first_of_strip() + c;
          float grads[kVector], results[kVector];
          load_vector(grads, grad_context + place);
          load_vector(results, context + place);
#pragma unroll
          for (int k = 0; k < kVector; ++k) delta += grads[k] * results[k];
        }
      delta = sum_warp(delta);
      if (lane == q) {  // one lane for all queries would have the compiler tear the warp apart before the sum
        if (!this->is(Params::kRest)) s.delta[q] = delta;
        if (this->writes_sums()) this->sums_of_strip(this->strip())[kOperands + q] = delta;
        s.log_sum_exp[q] = q < this->queries() ? p.log_sum_exp[this->query_row(q)] : kInfinity;
      }
    }
    if (this->is(Params::kRest)) {
      this->sum_over_strips(s.operand_sum, 0, kOperands);
      this->sum_over_strips(s.delta, kOperands, kQueries);
    }
  }

  TF_DEVICE void step(int tile, T* slab) {
    float score[kProducts][4];  // for every 8 queries, gradients of their weights, then their scores
    const Rows r = this->multiply_normalized(tile, slab, score);
    if (this->is(Params::kProducts)) return;
    const bool is_lone = this->last_tile == 0 && this->last_rows == 1;
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
        weight[k] = r.there[row] ? this->exponential(score[2 * i + 1][k] - s.log_sum_exp[q + e]) : 0;
        // a lone token has weight 1 whatever its score
        grad_score[k] = r.there[row] && !is_lone ? weight[k] * (score[2 * i][k] - s.delta[q + e]) : 0;
        const float* const operand_sum = s.operand_sum + 16 * i + lane % 4 * 2 + e;
        mean[row] += weight[k] * operand_sum[0] + grad_score[k] * operand_sum[8];
        slope[row] += weight[k] * score[2 * i][k] + grad_score[k] * score[2 * i + 1][k];
        scaled[i][k] = grad_score[k] * r.rstd[row];
        if (kPairsAreScaled) weight[k] *= r.rstd[row], grad_score[k] = scaled[i][k];
      }
      pairs[i] = M::from_products(weight, grad_score);
    }
    if (p.grad_query != nullptr) {
      const float scale = Base::round_to_elements(scaled);
      typename M::B weights[kQueryTiles];
#pragma unroll
      for (int i = 0; i < kQueryTiles; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float rounded = scaled[i][k] * scale;
          correction[i][k % 2] += rounded * r.mean[k / 2];
          excess[i][k % 2] += rounded * r.deviation[k / 2];
        }
        weights[i] = M::from_transposed_product(scaled[i]);
      }
      this->accumulate(slab, weights, scale);
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
      form_gradients(tile, slab, r, pairs, mean, slope);
      if (!kIsCut || kIsFloat || p.is_last) write_gradients(tile, slab);
    }
  }

  // Half has too few exponents for rstd, and float's sums are to be rounded.
  static constexpr bool kPairsAreScaled = sizeof(T) == 2 && !kIsHalf<T>;

  // With dn = sum_q p_q grad_context_q + ds_q query_q, the gradient of a token is rstd (dn - mean(dn) - n mean(dn n)),
  // whose means come from sums over the queries that are known already. It takes the token's place in the tile, from
  // where it is stored in vectors.
  TF_DEVICE void form_gradients(int tile, T* slab, const Rows& r, const typename M::A (&pairs)[kQueryTiles],
                                const float (&mean)[2], const float (&slope)[2]) {
    typename M::SplitA split_pairs[kQueryTiles];
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i) split_pairs[i] = M::split(pairs[i]);
    const T* const operands = s.operands + this->first_channel();
    float factor[2], summand[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      factor[i] = -r.rstd[i] * slope[i];
      summand[i] = -r.rstd[i] * mean[i] - factor[i] * r.mean[i];
    }
    warp_barrier();                                // all lanes have read the tile
#pragma unroll(kIsCut&& kIsFloat ? 2 : kMaxUnits)  // as registers suffice for
    for (int u = 0; u < kMaxUnits; ++u) {
      if (this->has(u)) {
        typename M::B operand[kQueryTiles][2];
#pragma unroll
        for (int i = 0; i < kQueryTiles; ++i)
          M::load_two_b_of_products(operand[i][0], operand[i][1], operands + 16 * i * s.pitch + kUnit * u, s.pitch);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Two<T>* rows_of_two[2];
          float rest[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            Two<T>*& two = rows_of_two[k / 2];
            two = reinterpret_cast<Two<T>*>(slab + (lane / 4 + k / 2 * 8) * s.pitch + kUnit * u + 8 * half +
                                            lane % 4 * 2);
            rest[k] = factor[k / 2] * to_float(two->x[k % 2]) + summand[k / 2];
          }
          typename M::FiniteProduct product;
          if (kPairsAreScaled) product = {{rest[0], rest[1], rest[2], rest[3]}};
#pragma unroll
          for (int i = 0; i < kQueryTiles; ++i) product.add(split_pairs[i], operand[i][half]);
          float grad[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) grad[k] = kPairsAreScaled ? product[k] : r.rstd[k / 2] * product[k] + rest[k];
          if (kIsCut && !kIsFloat && (p.adds || !p.is_last))
            add_gradients(tile, kUnit * u + 8 * half + lane % 4 * 2, grad);
          store_two(rows_of_two[0]->x, grad[0], grad[1]);
          store_two(rows_of_two[1]->x, grad[2], grad[3]);
        }
      }
    }
    warp_barrier();
  }

  // Of rows lane / 4 and lane / 4 + 8, two channels each: to those of earlier slices, for later ones. Those of float
  // are the gradients themselves.
  TF_DEVICE void add_gradients(int tile, int channel, float (&grad)[4]) const {
    const bool has_extra = p.extra_token != nullptr;
    const int first = this->first_of_strip() + this->first_channel() + channel;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = lane / 4 + 8 * j;
      const bool is_extra = has_extra && tile == 0 && row == 0;
      float* so_far = is_extra ? p.grad_extra_token_so_far : p.grad_tokens_so_far;
      if (so_far == nullptr || row >= this->rows_of(tile)) continue;
      so_far +=
          (is_extra ? image : s.place->first_token + int64_t(tile) * kTile + row - has_extra) * p.channels + first;
      if (p.adds) {
        const Two<float> earlier = *reinterpret_cast<const Two<float>*>(so_far);
        grad[2 * j] += earlier.x[0], grad[2 * j + 1] += earlier.x[1];
      }
      if (!p.is_last) store_two(so_far, grad[2 * j], grad[2 * j + 1]);
    }
  }

  static TF_DEVICE void add_vector(T* to, const T* from) {
    float sum[4], more[4];
    load_four(sum, to), load_four(more, from);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += more[i];
    store_four(to, sum, 1);
  }

  TF_DEVICE void write_gradients(int tile, const T* slab) {
    const bool has_extra = p.extra_token != nullptr;
    const int left = this->rows_of(tile) - lane / 8;
    const int first = this->first_of_strip() + this->first_channel() + lane % 8 * kVector;
    const int64_t row = s.place->first_token + int64_t(tile) * kTile + lane / 8 - has_extra;
    T* const to = static_cast<T*>(p.grad_tokens) + row * p.channels + first;
    const T* const from = slab + lane / 8 * s.pitch + lane % 8 * kVector;
#pragma unroll
    for (int i = 0; i < kTile; i += 4) {
      const bool is_extra = i == 0 && lane < 8 && tile == 0 && has_extra;
      T* const of_row = is_extra ? static_cast<T*>(p.grad_extra_token) + int64_t(image) * p.channels + first
                                 : to + i * int64_t(p.channels);
      if (i < left && (is_extra ? p.grad_extra_token : p.grad_tokens) != nullptr) {
#pragma unroll
        for (int k = 0; k < kMaxUnits * kUnit; k += 8 * kVector)
          if (this->copies(k)) {
            if (kIsCut && kIsFloat && p.adds)
              add_vector(of_row + k, from + i * s.pitch + k);
            else
              *reinterpret_cast<Vector16*>(of_row + k) = *reinterpret_cast<const Vector16*>(from + i * s.pitch + k);
          }
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
    for (int q = group * warps + warp; q < this->queries(); q += warps * groups) {
      float excess = 0;
      for (int g = -group; g < groups - group; ++g) excess += s.of_group(s.excess, g)[q];
      const T* const context =
          static_cast<const T*>(p.context) + this->query_row(q) * p.channels + this->first_of_strip();
      const int64_t row = p.splits == 1 ? this->query_row(q) : this->partial_row(q);
#pragma unroll 1
      for (int c = 4 * lane; c < this->channels(); c += 128) {
        const int64_t place = row * p.channels + this->first_of_strip() + c;
        float grad[4];
        load_four(grad, context + c);
#pragma unroll
        for (int i = 0; i < 4; ++i) grad[i] *= -excess;
        for (int g = -group; g < groups - group; ++g) {
          const float* const from = s.of_group(s.result, g) + q * s.result_pitch + c;
#pragma unroll
          for (int i = 0; i < 4; ++i) grad[i] += from[i];
        }
        if (p.splits == 1) {
          store_four(static_cast<T*>(p.grad_query) + place, grad, 1);
        } else {
          store_four(p.partial_grad_query + place, grad, 1);
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
