// The forward kernels of single_query_attention.
#pragma once

#include "single_query_attention_block.cuh"

namespace tokenfusion {
namespace single_query_attention {

template <typename T, int kQueryTiles>
struct Forward : Kernel<T, kQueryTiles, false> {
  typedef Kernel<T, kQueryTiles, false> Base;
  using Base::group, Base::groups, Base::image, Base::lane, Base::p, Base::s, Base::split, Base::thread, Base::warp,
      Base::warps;
  using Base::kQueries, Base::Base;

  TF_DEVICE void begin() {
    this->fill_operands(static_cast<const T*>(p.query) + image * p.query_batch_stride, p.query_stride, 0, 1);
    for (int q = thread; q < kQueries; q += 32 * warps) {
      s.maximum[q] = -kInfinity;
      s.total[q] = s.correction[q] = 0;
    }
  }

  // Online softmax; each query is weighed by 16 lanes, one a row.
  TF_DEVICE void weigh(int tile, const T*) {
    const int row = lane % 16;
    const typename Base::Row r = this->make_row(tile, row);
    for (int pair = warp; pair < kQueries / 2; pair += warps) {
      const int q = 2 * pair + lane / 16;
      const float score = r.there ? this->full_score(r, q, q, row) : -kInfinity;
      const float before = s.maximum[q], maximum = fmaxf(before, max_lanes<16>(score));
      const float origin = maximum == -kInfinity ? 0 : maximum;
      const float keep = maximum == before ? 1 : expf(before - origin);
      const float weight = expf(score - origin);
      const float rounded = this->store_weight(r, q, row, weight);
      const float total = sum_lanes<16>(weight), correction = sum_lanes<16>(rounded * r.rest);
      warp_barrier();  // all lanes have read what one writes
      if (row == 0) {
        s.maximum[q] = maximum;
        s.total[q] = s.total[q] * keep + total;
        s.correction[q] = s.correction[q] * keep + correction;
        s.scale[2 * q] = keep, s.scale[2 * q + 1] = r.largest_rstd;
      }
    }
  }

  TF_DEVICE void write_gradients(int, T*) {}

  TF_DEVICE void finish() {
    for (int q = group * warps + warp; q < p.queries; q += warps * groups) {
      float maximum = -kInfinity, total = 0;
      for (int g = -group; g < groups - group; ++g) maximum = fmaxf(maximum, s.of_group(s.maximum, g)[q]);
      const float origin = maximum == -kInfinity ? 0 : maximum;
      for (int g = -group; g < groups - group; ++g)
        total += s.of_group(s.total, g)[q] * expf(s.of_group(s.maximum, g)[q] - origin);
      const int64_t row = p.splits == 1 ? this->query_row(q) : this->partial_row(q);
      for (int c = 4 * lane; c < p.channels; c += 128) {
        float sums[4] = {};
        for (int g = -group; g < groups - group; ++g) {
          const float weight = expf(s.of_group(s.maximum, g)[q] - origin), correction = s.of_group(s.correction, g)[q];
          const float* const from = s.of_group(s.result, g) + q * s.result_pitch + c;
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[i] += weight * (from[i] - correction);
        }
        if (p.splits == 1) {
          store_four(static_cast<T*>(p.context) + row * p.channels + c, sums, 1 / total);
        } else {
          store_four(p.partial_context + row * p.channels + c, sums, 1);
        }
      }
      if (lane == 0) {
        if (p.splits == 1) {
          p.log_sum_exp[row] = maximum + logf(total);
        } else {
          p.partial_max[row] = maximum, p.partial_sum[row] = total;
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
    store_four(static_cast<T*>(p.context) + int64_t(block_index()) * p.channels + c, sums, 1 / total);
  }
  if (thread_index() == 0) p.log_sum_exp[block_index()] = maximum + logf(total);
}

}  // namespace single_query_attention
}  // namespace tokenfusion
