// The products of single_query_attention in bfloat16 by the tiles of AMX. For single_query_attention_kernels.cpp alone.
//
// Tokens are multiplied as they lie in memory. LayerNorm goes into the results: with a row of ones among the matrix's
// rows giving the sum of each token,
//
//     row . n_t = (row . t - mean_t sum(row)) rstd_t   and   sum_t w_t n_t = sum_t (w_t rstd_t) (t - mean_t)
//
// Weights are the sum of two bfloat16 numbers, which hold 16 bits of them.
#pragma once

#include "common/amx.h"
#include "single_query_attention_tiles.h"

#if TF_AMX

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

constexpr int64_t kChunk = 2 * kAmxWords;  // channels that a row of bfloat16 holds

// A bfloat16 number and what it leaves of x, rounded likewise.
struct Split {
  Vec<float> high, low;

  explicit Split(Vec<float> x) : high(rounded(x)), low(rounded(x - high)) {}
};

// Two vectors of neighbouring channels: the even ones and the odd ones.
TF_INLINE U32 neighbours(const float* p) {
  static constexpr Lanes<float> even = Shuffles<float>::every_other(0), odd = Shuffles<float>::every_other(1);
  const Vec<float> first = load(p), second = load(p + kAmxWords);
  return as_pairs(shuffle<float>(first, second, even), shuffle<float>(first, second, odd));
}

// Undoes what unpacking 128 bits at a time does to the order of channels: groups of four lanes of two vectors in turn.
constexpr Lanes<float> groups_in_turn(int first) {
  Lanes<float> lanes{};
  for (int i = 0; i < kAmxWords; ++i) lanes.number[i] = first + i / 8 * 4 + i % 4 + i / 4 % 2 * kAmxWords;
  return lanes;
}

class AmxProducts {
 public:
  typedef bf16 T;
  typedef float A;
  static constexpr int kTile = 2 * kAmxRows;

  const Params& p;
  const Scratch<float, kTile> s;

  AmxProducts(const Params& params, void* memory)
      : p(params),
        s(memory, p.channels, p.queries, kChunk),
        chunks(s.channels / kChunk),
        stacked(p.grad_context ? 2 * s.queries : s.queries),
        columns(round_up(stacked + p.normalize, kAmxWords)),
        depth(p.grad_tokens || p.grad_extra_token ? round_up(stacked, kChunk) : 0),
        rows(depth || p.queries > kAmxRows ? kAmxRows : p.queries),
        blocks((p.queries + rows - 1) / rows) {
    char* next = reinterpret_cast<char*>(s.scores + columns * kTile);
    const auto take = [&](int64_t bytes) {
      char* const taken = reinterpret_cast<char*>(round_up(reinterpret_cast<intptr_t>(next), 64));
      next = taken + bytes;
      return taken;
    };
    matrix = take(columns / kAmxWords * chunks * kAmxBytes);
    sums = reinterpret_cast<float*>(take(blocks * chunks * 2 * rows * kAmxWords * sizeof(float)));
    offset = reinterpret_cast<float*>(take(s.queries * kAmxWords * sizeof(float)));
    weights = take(blocks * 2 * kAmxBytes);
    pairs = take(2 * kAhead * 2 * kAmxBytes);
    copied = reinterpret_cast<bf16*>(take(kTile * s.channels * sizeof(bf16)));
    token_weights = take(depth / kChunk * 4 * kAmxBytes);
    token_matrix = take(depth / kChunk * chunks * 2 * kAmxBytes);
    last = next;
  }
  void* end() const { return last; }

  void begin(float*) {
    AmxShapes shapes;
    for (int tile = 0; tile < 4; ++tile) shapes.set(tile, kAmxRows);
    for (int tile = 4; tile < 8; ++tile) shapes.set(tile, rows);
    amx_configure(shapes);
    pack_matrix();
    if (depth) pack_token_matrix();
    zero(sums, blocks * chunks * 2 * rows * kAmxWords);
    zero(offset, s.queries * kAmxWords);
    zero(reinterpret_cast<float*>(weights), blocks * 2 * kAmxFloats);
    for (int t = 0; t < kTile; ++t) mean[t] = 0;
  }

  // s.scores[q][t] = query[q] . n_t and, backward, s.weights[q][t] = grad_context[q] . n_t
  void dot(const TileRows<bf16, kTile>& tile, float (&rstd)[kTile], Prefetch&) {
    place(tile);
    if (p.normalize) {
      float squares[kTile];
      sum_squares(squares);
      multiply();
      if (centre(squares)) {
        sum_squares(squares);
        multiply();
      }
      normalise(squares, rstd);
    } else {
      multiply();
      for (int t = 0; t < kTile; ++t) rstd[t] = 1;
    }
  }

  // The sum of the part = itself * keep + sum_t tile_weights[q][t] (t - mean_t)
  void accumulate(const float* tile_weights, float*, Prefetch& next) {
    for (int64_t q = 0; q < p.queries; ++q) {
      if (s.keep[q] != 1) rescale(q);
      const float* const from = tile_weights + q * kTile;
      const Split first(load(from)), second(load(from + kAmxRows));
      char* const to = weights + q / rows * 2 * kAmxBytes + q % rows * 64;
      store_words(to, as_pairs(first.high, second.high));
      store_words(to + kAmxBytes, as_pairs(first.low, second.low));
      float* const sum = offset + q * kAmxWords;
      store(sum,
            load(sum) + (first.high + first.low) * load(mean) + (second.high + second.low) * load(mean + kAmxRows));
    }
    // A product waits for its pairs to be in the cache, so they are made a few steps ahead.
    for (int64_t step = 0; step < chunks + kAhead; ++step) {
      if (step < chunks) pair_tokens(step, next);
      if (step >= kAhead) add_products(step - kAhead);
    }
  }

  // See VectorProducts.
  template <typename Gradient>
  void write_token_gradients(const float (&rstd)[kTile], const float (&grad_mean)[kTile], const float (&slope)[kTile],
                             Gradient* const (&out)[kTile], int count) {
    pack_token_weights();
    alignas(64) float sum[kAmxRows][kChunk];
    for (int first = 0; first < count; first += kAmxRows)
      for (int64_t i = 0; i < chunks; ++i) {
        amx_zero<0>();
        amx_zero<1>();
        for (int64_t k = 0; k < depth / kChunk; ++k) {
          const char* const left = token_weights + (k * 4 + first / kAmxRows * 2) * kAmxBytes;
          const char* const right = token_matrix + (k * chunks + i) * 2 * kAmxBytes;
          amx_load<4>(left, 64);
          amx_load<5>(left + kAmxBytes, 64);
          amx_load<2>(right, 64);
          amx_load<3>(right + kAmxBytes, 64);
          amx_multiply<0, 4, 2>();
          amx_multiply<0, 5, 2>();
          amx_multiply<1, 4, 3>();
          amx_multiply<1, 5, 3>();
        }
        amx_store<0>(sum[0], sizeof(sum[0]));
        amx_store<1>(sum[0] + kAmxWords, sizeof(sum[0]));
        for (int row = 0; row < kAmxRows; ++row) {
          const int t = first + row;
          if (out[t] == nullptr) continue;
          for (int64_t c = 0; c < kChunk; c += kAmxWords) {
            const int64_t channel = i * kChunk + c, left = p.channels - channel;
            if (left <= 0) break;
            const Vec<float> centred = load(at(t, i) + c) - mean[t];
            Vec<float> grad = (load(sum[row] + c) - grad_mean[t] - centred * slope[t]) * rstd[t];
            if (p.add_gradients) grad += load_lanes(out[t] + channel, left);
            store_lanes(out[t] + channel, grad, left);
          }
        }
      }
  }

  // Writes the sums of the part, in the order of the channels.
  void finish(float* out) const {
    static constexpr Lanes<float> first = groups_in_turn(0), second = groups_in_turn(kAmxWords / 2);
    for (int64_t q = 0; q < p.queries; ++q) {
      const float shift = sum_lanes<float>(load(offset + q * kAmxWords));
      for (int64_t i = 0; i < chunks; ++i) {
        const float* const sum = sum_of(q / rows, i) + q % rows * kAmxWords;
        const Vec<float> low = load(sum), high = load(sum + rows * kAmxWords);
        float* const to = out + q * s.pitch + i * kChunk;
        store(to, shuffle<float>(low, high, first) - shift);
        store(to + kAmxWords, shuffle<float>(low, high, second) - shift);
      }
    }
    amx_release();
  }

 private:
  static constexpr int64_t kAhead = 2;  // chunks whose pairs are made before they are needed

  const int64_t chunks;        // of channels
  const int64_t stacked;       // rows of scores and weights
  const int64_t columns;       // of the matrix that tokens are multiplied with: these rows and one of ones, padded
  const int64_t depth;         // of the products that give token gradients: stacked, padded; or 0
  const int64_t rows, blocks;  // of queries: in a block, and their number
  char* matrix;                // [columns / 16, chunks] tiles
  float* sums;                 // [blocks, chunks, 2, rows, 16]
  float* offset;               // [queries, 16], what sums lack of centred tokens
  char* weights;               // [blocks, 2] tiles of high and low parts
  char* pairs;                 // [2 * kAhead, 2] tiles of pairs of tokens
  bf16* copied;                // [kTile, channels]
  char* token_weights;         // [depth / 32, 2, 2] tiles: of halves of the tokens, high and low parts
  char* token_matrix;          // [depth / 32, chunks, 2] tiles
  char* last;

  const bf16* tokens;
  int64_t stride;
  alignas(64) float mean[kTile];

  static void zero(float* out, int64_t count) {
    for (int64_t i = 0; i < count; i += kAmxWords) store(out + i, Vec<float>{});
  }

  void rescale(int64_t q) const {
    float* const first = sum_of(q / rows, 0) + q % rows * kAmxWords;
    for (int64_t i = 0; i < 2 * chunks; ++i) {
      float* const sum = first + i * rows * kAmxWords;
      store(sum, load(sum) * s.keep[q]);
    }
    float* const sum = offset + q * kAmxWords;
    store(sum, load(sum) * s.keep[q]);
  }

  TF_INLINE const bf16* at(int t, int64_t chunk) const { return tokens + t * stride + chunk * kChunk; }
  TF_INLINE float* sum_of(int64_t block, int64_t chunk) const {
    return sums + (block * chunks + chunk) * 2 * rows * kAmxWords;
  }

  // Row number r of the queries and then, backward, of the gradients of their contexts.
  const float* stacked_row(int64_t r) const {
    return r < s.queries ? s.query + r * s.pitch : s.grad_context + (r - s.queries) * s.pitch;
  }

  char* pairs_of(int64_t chunk) const { return pairs + chunk % (2 * kAhead) * 2 * kAmxBytes; }

  // The pairs (t, t + 16) of a chunk's tokens.
  TF_INLINE void pair_tokens(int64_t chunk, Prefetch& next) const {
    char* out = pairs_of(chunk);
    const int64_t step = stride;
    const bf16 *first_row = at(0, chunk), *second_row = at(kAmxRows, chunk);
#pragma GCC unroll 4
    for (int t = 0; t < kAmxRows; ++t, first_row += step, second_row += step, out += 64) {
      next.line();
      next.line();
      const U32 first = load_words(first_row), second = load_words(second_row);
      U32 low, high;  // of each 128 bits
      asm("vpunpcklwd %2, %1, %0" : "=v"(low) : "v"(first), "v"(second));
      asm("vpunpckhwd %2, %1, %0" : "=v"(high) : "v"(first), "v"(second));
      store_words(out, low);
      store_words(out + kAmxBytes, high);
    }
  }

  TF_INLINE void add_products(int64_t chunk) const {
    amx_load<2>(pairs_of(chunk), 64);
    amx_load<3>(pairs_of(chunk) + kAmxBytes, 64);
    for (int64_t block = 0; block < blocks; ++block) {
      float* const low = sum_of(block, chunk);
      float* const high = low + rows * kAmxWords;
      amx_load<6>(weights + block * 2 * kAmxBytes, 64);
      amx_load<7>(weights + block * 2 * kAmxBytes + kAmxBytes, 64);
      amx_load<4>(low, 64);
      amx_load<5>(high, 64);
      amx_multiply<4, 6, 2>();  // faster where the right side is that of the product before
      amx_multiply<4, 7, 2>();
      amx_store<4>(low, 64);
      amx_multiply<5, 6, 3>();
      amx_multiply<5, 7, 3>();
      amx_store<5>(high, 64);
    }
  }

  void pack_matrix() const {
    for (int64_t column = 0; column < columns; column += kAmxWords)
      for (int64_t i = 0; i < chunks; ++i)
        store_transposed(matrix + (column / kAmxWords * chunks + i) * kAmxBytes, kAmxWords, [&](int j) {
          const int64_t r = column + j;
          if (r < stacked) return neighbours(stacked_row(r) + i * kChunk);
          return U32{} + (r == stacked && p.normalize ? 0x3f803f80u : 0u);
        });
  }

  void pack_token_matrix() const {
    for (int64_t k = 0; k < depth; k += kChunk)
      for (int64_t c = 0; c < s.channels; c += kAmxWords) {
        char* const to = token_matrix + (k / kChunk * chunks * 2 + c / kAmxWords) * kAmxBytes;
        for (int row = 0; row < kAmxRows; ++row) {
          const int64_t r = k + 2 * row;
          store_words(to + row * 64,
                      r < stacked ? as_pairs(load(token_row(r) + c), load(token_row(r + 1) + c)) : U32{});
        }
      }
  }

  // What row number r of s.scores and s.weights is multiplied with in token gradients.
  const float* token_row(int64_t r) const { return stacked_row(r < s.queries ? r + s.queries : r - s.queries); }

  void pack_token_weights() const {
    for (int64_t k = 0; k < depth; k += kChunk)
      for (int half = 0; half < 2; ++half) {
        const auto split = [&](int64_t r) {
          return Split(r < stacked ? load(s.scores + r * kTile + half * kAmxRows) : Vec<float>{});
        };
        char* const to = token_weights + (k / kChunk * 4 + half * 2) * kAmxBytes;
        store_transposed(to, kAmxWords,
                         [&](int i) { return as_pairs(split(k + 2 * i).high, split(k + 2 * i + 1).high); });
        store_transposed(to + kAmxBytes, kAmxWords,
                         [&](int i) { return as_pairs(split(k + 2 * i).low, split(k + 2 * i + 1).low); });
      }
  }

  // Where the rows of a tile are: in place, or a copy padded with zeros.
  void place(const TileRows<bf16, kTile>& tile) {
    if (tile.evenly_spaced && p.channels == s.channels) {
      tokens = tile.row[0];
      stride = p.tokens_stride;
      return;
    }
    tokens = copied;
    stride = s.channels;
    for (int t = 0; t < kTile; ++t) {
      bf16* const row = copied + t * s.channels;
      const int64_t present = t < tile.count ? p.channels : 0;
      __builtin_memcpy(row, tile.row[t], present * sizeof(bf16));
      __builtin_memset(row + present, 0, (s.channels - present) * sizeof(bf16));
    }
  }

  // The rows of scores: the products of the tile's tokens and the matrix.
  TF_INLINE void multiply() const {
    alignas(64) float dots[2][kAmxFloats];
    for (int64_t column = 0; column < columns; column += kAmxWords) {
      const char* const packed = matrix + column / kAmxWords * chunks * kAmxBytes;
      amx_zero<0>();
      amx_zero<1>();
      for (int64_t i = 0; i < chunks; ++i) {
        amx_load<3>(packed + i * kAmxBytes, 64);
        amx_load<2>(at(0, i), stride * sizeof(bf16));
        amx_multiply<0, 2, 3>();
        amx_load<2>(at(kAmxRows, i), stride * sizeof(bf16));
        amx_multiply<1, 2, 3>();
      }
      amx_store<0>(dots[0], 64);
      amx_store<1>(dots[1], 64);
      for (int half = 0; half < 2; ++half)
        store_transposed(s.scores + column * kTile + half * kAmxRows, kTile,
                         [&](int i) { return load(dots[half] + i * kAmxWords); });
    }
  }

  TF_INLINE void sum_squares(float (&squares)[kTile]) const {
    for (int first = 0; first < kTile; first += kAmxRows) {
      Vec<float> sums[kAmxRows];
      for (int i = 0; i < kAmxRows; ++i) {
        const bf16* const row = at(first + i, 0);
        Vec<float> even{}, odd{};
        for (int64_t c = 0; c < s.channels; c += kChunk) {
          const U32 words = load_words(row + c);
          const Vec<float> one = (Vec<float>)(words << 16), other = (Vec<float>)(words & kUpper);
          even += one * one;
          odd += other * other;
        }
        sums[i] = even + odd;
      }
      store(squares + first, sum_each<float>(sums));
    }
  }

  // Tokens that are far larger than their deviations from the mean would lose these in products. LayerNorm lets such
  // tokens be shifted, here by a rounded mean: numbers close to it remain exact. Whether there were any.
  bool centre(const float (&squares)[kTile]) {
    constexpr float kFar = 256;  // 16 standard deviations
    alignas(64) float by[kTile];
    Vec<float> largest{};
    for (int t = 0; t < kTile; t += kAmxRows) {
      const Vec<float> mean_of_token = load(s.scores + stacked * kTile + t) / float(p.channels);
      const Vec<float> square = mean_of_token * mean_of_token,
                       variance = load(squares + t) / float(p.channels) - square;
      const Vec<float> far_mean = square > kFar * (variance + float(p.eps)) ? Split(mean_of_token).high : Vec<float>{};
      store(by + t, far_mean);
      largest = max<float>(largest, far_mean * far_mean);
    }
    if (max_lane<float>(largest) == 0) return false;
    for (int t = 0; t < kTile; ++t) {
      const bf16* const from = at(t, 0);
      bf16* const to = copied + t * s.channels;
      each_vector<float>(p.channels,
                         [&](int64_t c, int64_t n) { store_lanes(to + c, load_lanes(from + c, n) - by[t], n); });
    }
    tokens = copied;
    stride = s.channels;
    return true;
  }

  TF_INLINE void normalise(const float (&squares)[kTile], float (&rstd)[kTile]) {
    const float channels = float(p.channels);
    for (int t = 0; t < kTile; t += kAmxRows) {
      const Vec<float> sum_of_token = load(s.scores + stacked * kTile + t), mean_of_token = sum_of_token / channels;
      const Vec<float> variance = load(squares + t) / channels - mean_of_token * mean_of_token;
      Vec<float> deviation = max<float>(Vec<float>{}, variance) + float(p.eps);
      asm("vsqrtps %0, %0" : "+v"(deviation));
      store(mean + t, mean_of_token);
      store(rstd + t, 1 / deviation);
      for (int64_t r = 0; r < stacked; ++r) {
        const float mean_of_row = r < s.queries ? s.query_mean[r] : s.grad_mean[r - s.queries];
        float* const scores = s.scores + r * kTile + t;
        store(scores, (load(scores) - sum_of_token * mean_of_row) * load(rstd + t));
      }
    }
  }
};

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion

#endif
