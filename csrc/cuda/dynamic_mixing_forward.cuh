// The forward kernel of dynamic_mixing.
#pragma once

#include "dynamic_mixing_block.cuh"

namespace tokenfusion {
namespace dynamic_mixing {

template <typename T>
struct Forward : Block<T> {
  typedef Block<T> Base;
  typedef typename Base::M M;
  using Base::lane, Base::p, Base::plan, Base::Base;

  TF_DEVICE void run() {
    this->begin(block_index());
    for (int tile = 0; tile < target_tiles(p); ++tile) {
      for (int first = 0; first < plan.width; first += plan.chunk) {
        const int left = plan.width - first < plan.chunk ? plan.width - first : plan.chunk;
        if (tile == 0 || plan.chunk < plan.width) this->stage_tokens(first, left, plan.chunk);
        if (first == 0) this->make_weights(tile);
        wait_copies();
        warp_barrier();
        for (int c = 0; c < left; c += kGroup) mix(tile, first + c, c, left);
        warp_barrier();
      }
    }
  }

 private:
  // Channels [first, first + kGroup) of a segment, but for those beyond `end`, of 16 targets; the tokens' begin at
  // `column` in shared memory.
  TF_DEVICE void mix(int tile, int first, int column, int end) {
    float sums[kGroup / 8][4] = {};
    const T* const tokens = this->tokens() + column;
    const float* const logits = this->logits();
#pragma unroll 1
    for (int k = 0; k < p.tokens; k += 16) {
      const typename M::A weights = M::make_a([&](int i, int source) {
        return k + source < p.tokens ? logits[(k + source) * kLogitPitch + lane / 4 + 8 * i] : 0;
      });
#pragma unroll
      for (int n = 0; n < kGroup / 8; ++n) {
        if (column + 8 * n < end) {
          typename M::Product product;
          product.add(weights, M::load_b(tokens + k * plan.pitch + 8 * n, plan.pitch));
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[n][i] += product[i];
        }
      }
    }
    if (!this->row().there) return;
    end += first - column;
    T* const mixed = this->find(p.mixed, plan.width);
    const Row r = this->row();
    float* const line_sums = p.line_sums + (int64_t(r.image) * p.lines + r.line) * p.channels + r.segment * plan.width;
#pragma unroll
    for (int n = 0; n < kGroup / 8; ++n) {
      const int channel = first + 8 * n + lane % 4 * 2;
      float of_line[2] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int target = lane / 4 + 8 * i;
        if (tile * kTargets + target < p.tokens) {
          const float scale = this->scale()[target];
          const float pair[2] = {sums[n][2 * i] * scale, sums[n][2 * i + 1] * scale};
          this->store_pair(mixed + (tile * kTargets + target) * p.mixed.token_stride, channel, end, pair[0], pair[1]);
          of_line[0] += pair[0], of_line[1] += pair[1];
        }
      }
      if (p.line_sums != nullptr) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float sum = Base::sum_columns(of_line[j]);
          if (lane < 4 && channel + j < end) line_sums[channel + j] = tile == 0 ? sum : line_sums[channel + j] + sum;
        }
      }
    }
  }
};

}  // namespace dynamic_mixing
}  // namespace tokenfusion
