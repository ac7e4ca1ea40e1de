// The forward kernels of single_query_attention.
#pragma once

#include "single_query_attention_block.cuh"

namespace tokenfusion {
namespace single_query_attention {

template <typename T, int kQueryTiles, bool kFull>
struct Forward : Kernel<T, kQueryTiles, kFull, false> {
  typedef Kernel<T, kQueryTiles, kFull, false> Base;
  typedef typename Base::M M;
  typedef typename Base::Rows Rows;
  using Base::group, Base::groups, Base::image, Base::lane, Base::p, Base::s, Base::sums;
  using Base::kMaxUnits;
  using Base::warp, Base::warps;

  // The online softmax of queries 8 i + lane % 4 * 2 (+ 1): totals and corrections over this lane's rows alone. Weights
  // are relative to `maximum`, which stays behind the largest score by at most kBehind.
  static constexpr float kBehind = 8;
  float maximum[kQueryTiles][2], total[kQueryTiles][2] = {}, correction[kQueryTiles][2] = {};

  TF_DEVICE Forward(const Params& params, const Plan& plan, char* memory) : Base(params, plan, memory) {
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i) maximum[i][0] = maximum[i][1] = -kInfinity;
  }

  TF_DEVICE void begin() {
    if (this->is(Params::kRest))
      this->sum_over_strips(s.operand_sum, 0, Base::kQueries);
    else
      this->fill_operands(this->first_query_row(), p.query_stride, 0, 1);
  }

  static TF_DEVICE float origin(float maximum) { return maximum == -kInfinity ? 0 : maximum; }

  TF_DEVICE void step(int tile, T* slab) {
    float score[kQueryTiles][4];
    const Rows r = this->multiply_normalized(tile, slab, score);
    if (this->is(Params::kProducts)) return;
    bool grows = false;
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (!r.there[k / 2]) score[i][k] = -kInfinity;
        grows = grows || score[i][k] > maximum[i][k % 2] + kBehind;
      }
    if (any_lane(grows)) raise(score);
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float weight = this->exponential(score[i][k] - origin(maximum[i][k % 2]));
        total[i][k % 2] += weight;
        score[i][k] = weight * r.rstd[k / 2];
      }
    }
    const float scale = Base::round_to_elements(score);
    typename M::B weights[kQueryTiles];
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) correction[i][k % 2] += score[i][k] * scale * r.mean[k / 2];
      weights[i] = M::from_transposed_product(score[i]);
    }
    this->accumulate(slab, weights, scale);
  }

  // To the largest score so far.
  TF_DEVICE void raise(const float (&score)[kQueryTiles][4]) {
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float raised = fmaxf(maximum[i][e], max_rows(fmaxf(score[i][e], score[i][2 + e])));
        const float keep = raised == maximum[i][e] ? 1 : this->exponential(maximum[i][e] - origin(raised));
        maximum[i][e] = raised, total[i][e] *= keep, correction[i][e] *= keep;
#pragma unroll
        for (int u = 0; u < kMaxUnits; ++u) sums[u][i][e] *= keep, sums[u][i][2 + e] *= keep;
      }
    }
  }

  TF_DEVICE void write_results() {
    this->write_result(correction);
    this->sum_all_rows(total);
    if (warp == 0) this->write_queries(s.maximum, maximum), this->write_queries(s.total, total);
  }

  TF_DEVICE void finish() {
    for (int q = group * warps + warp; q < this->queries(); q += warps * groups) {
      const int distance = lane < groups ? lane - group : 0;  // a lane has a group's share
      const float raised = s.of_group(s.maximum, distance)[q], largest = max_warp(raised);
      const float weight = lane < groups ? expf(raised - origin(largest)) : 0;
      const float all = sum_warp(weight * s.of_group(s.total, distance)[q]);
      const int64_t row = p.splits == 1 ? this->query_row(q) : this->partial_row(q);
      const float share = this->has_rows() ? 1 / all : 0;
#pragma unroll 1
      for (int first = 0; first < this->channels(); first += 128) {
        const int c = first + 4 * lane;
        const int64_t place = row * p.channels + this->first_of_strip() + c;
        float context[4] = {};
        for (int g = 0; g < groups; ++g) {
          const float of_group = shuffle_from(weight, g);
          const float* const from = s.of_group(s.result, g - group) + q * s.result_pitch + c;
          if (c < this->channels()) {
#pragma unroll
            for (int i = 0; i < 4; ++i) context[i] += of_group * from[i];
          }
        }
        if (c >= this->channels()) continue;
        if (p.splits == 1) {
          store_four(static_cast<T*>(p.context) + place, context, share);
        } else {
          store_four(p.partial_context + place, context, 1);
        }
      }
      if (lane == 0 && this->strip() == 0) {
        if (p.splits == 1) {
          p.log_sum_exp[row] = largest + logf(all);
        } else {
          p.partial_max[row] = largest, p.partial_sum[row] = all;
        }
      }
    }
  }
};

// Joins the splits of one query in a fixed order; a block is one query of one image.
template <typename T>
TF_DEVICE void combine_forward(const Params& p) {
  const int64_t image = block_index() / p.queries, q = block_index() % p.queries;
  const int64_t first = image * p.splits * p.queries + q;
  float maximum = -kInfinity, total = 0;
  for (int i = 0; i < p.splits; ++i) maximum = fmaxf(maximum, p.partial_max[first + i * p.queries]);
  const float origin = maximum == -kInfinity ? 0 : maximum;
  for (int i = 0; i < p.splits; ++i)
    total += p.partial_sum[first + i * p.queries] * expf(p.partial_max[first + i * p.queries] - origin);
  const float share = bag(p, int(image)).rows > 0 ? 1 / total : 0;
  for (int c = 4 * thread_index(); c < p.channels; c += 4 * block_threads()) {
    float sums[4] = {};
    for (int i = 0; i < p.splits; ++i) {
      const int64_t row = first + i * p.queries;
      const float weight = expf(p.partial_max[row] - origin);
      float part[4];
      load_four(part, p.partial_context + row * p.channels + c);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] += weight * part[j];
    }
    store_four(static_cast<T*>(p.context) + int64_t(block_index()) * p.channels + c, sums, share);
  }
  if (thread_index() == 0) p.log_sum_exp[block_index()] = maximum + logf(total);
}

}  // namespace single_query_attention
}  // namespace tokenfusion
