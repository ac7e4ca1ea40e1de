// The kernels of single_query_attention's backward pass.
#pragma once

#include "single_query_attention_block.cuh"

namespace tokenfusion {
namespace single_query_attention {

template <typename T, int kQueryTiles>
struct Backward : Kernel<T, kQueryTiles, true> {
  typedef Kernel<T, kQueryTiles, true> Base;
  typedef typename Base::M M;
  typedef typename Base::Memory Memory;
  using Base::group, Base::groups, Base::image, Base::lane, Base::p, Base::s, Base::split, Base::thread, Base::units,
      Base::warp, Base::warps;
  using Base::kQueries, Base::kRowsAtOnce, Base::kRowVectors, Base::kVector, Base::Base;

  static TF_DEVICE int grad_row(int q) { return q / 8 * 16 + q % 8; }
  static TF_DEVICE int operand_row(int q) { return grad_row(q) + 8; }  // that of the query

  TF_DEVICE void begin() {
    const T* const grad_context = static_cast<const T*>(p.grad_context) + this->query_row(0) * p.channels;
    const T* const context = static_cast<const T*>(p.context) + this->query_row(0) * p.channels;
    this->fill_operands(grad_context, p.channels, 0, 2);
    this->fill_operands(static_cast<const T*>(p.query) + image * p.query_batch_stride, p.query_stride, 8, 2);
    for (int q = group * warps + warp; q < p.queries; q += warps * groups) {
      float delta = 0;
      for (int c = lane; c < p.channels; c += 32)
        delta += to_float(grad_context[q * p.channels + c]) * to_float(context[q * p.channels + c]);
      delta = sum_lanes<32>(delta);
      if (lane == 0) s.delta[q] = delta, s.log_sum_exp[q] = p.log_sum_exp[this->query_row(q)];
    }
    for (int q = thread; q < kQueries; q += 32 * warps) s.correction[q] = s.excess[q] = 0;
  }

  // Weights and gradients of the scores; each query is weighed by 16 lanes, one a row.
  TF_DEVICE void weigh(int tile, const T* shift) {
    const int row = lane % 16;
    const typename Base::Row r = this->make_row(tile, row);
    float mean = 0, slope = 0;
    for (int pair = warp; pair < kQueries / 2; pair += warps) {
      const int q = 2 * pair + lane / 16, of_grad = grad_row(q), of_query = operand_row(q);
      const bool there = r.there && q < p.queries;
      const float score = this->full_score(r, of_query, of_query, row);
      const float grad_weight = this->full_score(r, of_grad, of_grad, row);
      const float weight = there ? expf(score - s.log_sum_exp[q]) : 0;
      // a lone token has weight 1 whatever its score
      const float grad_score = there && p.rows > 1 ? weight * (grad_weight - s.delta[q]) : 0;
      mean += weight * s.operand_sum[of_grad] + grad_score * s.operand_sum[of_query];
      slope += weight * grad_weight + grad_score * score;
      s.pairs[row * Memory::kPairPitch + of_grad] = from_float<T>(weight);
      s.pairs[row * Memory::kPairPitch + of_query] = from_float<T>(grad_score);
      const float rounded = this->store_weight(r, q, row, grad_score);
      const float correction = sum_lanes<16>(rounded * r.rest);
      const float excess = sum_lanes<16>(r.there ? rounded / r.rstd : 0);
      if (row == 0) {
        s.correction[q] += correction, s.excess[q] += excess;
        s.scale[2 * q] = 1, s.scale[2 * q + 1] = r.largest_rstd;
      }
    }
    if (!p.normalize) return;
    mean += shuffle_xor(mean, 16), slope += shuffle_xor(slope, 16);
    if (lane < 16) {
      s.row_sums[2 * warp * kTile + row] = mean, s.row_sums[(2 * warp + 1) * kTile + row] = slope;
      if (warp == 0) s.rstd[row] = r.rstd, s.mean[row] = to_float(shift[row]) + r.rest;
    }
  }

  // With dn = sum_q p_q grad_context_q + ds_q query_q, the gradient of a token is rstd (dn - mean(dn) - n mean(dn n)),
  // whose means come from sums over the queries that are known already. It takes the token's place in the tile, from
  // where it is stored in vectors.
  TF_DEVICE void write_gradients(int tile, T* tokens) {
    if (p.grad_tokens == nullptr && p.grad_extra_token == nullptr) return;
    const int row = lane / 4, column = lane % 4 * 2;
    float rstd[2], centre[2], mean[2] = {}, slope[2] = {};
    if (p.normalize) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        for (int w = 0; w < warps && w < Base::kWeighingWarps; ++w) {
          mean[i] += s.row_sums[2 * w * kTile + row + 8 * i];
          slope[i] += s.row_sums[(2 * w + 1) * kTile + row + 8 * i];
        }
        rstd[i] = s.rstd[row + 8 * i], centre[i] = s.mean[row + 8 * i];
        mean[i] *= this->per_channel, slope[i] *= rstd[i] * this->per_channel;
      }
    }
    typename M::A pairs[kQueryTiles];
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i) pairs[i] = M::load_a(s.pairs + 16 * i, Memory::kPairPitch);
    warp_barrier();
#pragma unroll
    for (int u = 0; u < 2 * kUnits; ++u) {
      if (u < 2 * units) {
        typename M::Product product;
#pragma unroll
        for (int i = 0; i < kQueryTiles; ++i)
          product.add(pairs[i], M::load_b(s.operands + 16 * i * s.pitch + warp * kSlab + 8 * u, s.pitch));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          T* const token = tokens + (row + j / 2 * 8) * s.pitch + 8 * u + column + j % 2;
          float grad = product[j];
          if (p.normalize) {
            const int i = j / 2;
            grad = rstd[i] * (grad - mean[i] - (to_float(*token) - centre[i]) * slope[i]);
          }
          *token = from_float<T>(grad);
        }
      }
    }
    warp_barrier();
    const int part = lane % kRowVectors * kVector;
    if (part >= 16 * units) return;
    const bool has_extra = p.extra_token != nullptr;
    const int64_t rows = p.rows - has_extra;
#pragma unroll
    for (int i = 0; i < kTile; i += kRowsAtOnce) {
      const int j = tile * kTile + i + lane / kRowVectors;
      const bool is_extra = has_extra && j == 0;
      T* const grads = static_cast<T*>(is_extra ? p.grad_extra_token : p.grad_tokens);
      if (j < p.rows && grads != nullptr) {
        const int64_t to = is_extra ? image : image * rows + (j - has_extra);
        const T* const from = tokens + (i + lane / kRowVectors) * s.pitch + part;
        *reinterpret_cast<Vector16*>(grads + to * p.channels + warp * kSlab + part) =
            *reinterpret_cast<const Vector16*>(from);
      }
    }
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
        float sums[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = -excess * to_float(context[c + i]);
        for (int g = -group; g < groups - group; ++g) {
          const float correction = s.of_group(s.correction, g)[q];
          const float* const from = s.of_group(s.result, g) + q * s.result_pitch + c;
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[i] += from[i] - correction;
        }
        if (p.splits == 1) {
          store_four(static_cast<T*>(p.grad_query) + row * p.channels + c, sums, 1);
        } else {
          store_four(p.partial_grad_query + row * p.channels + c, sums, 1);
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
