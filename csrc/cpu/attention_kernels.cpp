#include "attention.h"
#include "common/amx_product.h"
#include "common/bf16_functions.h"
#include "common/memory.h"

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

#if TF_AMX

typedef AttentionParams Params;

constexpr int64_t kQueries = 2 * kAmxRows;

class Attention {
 public:
  Attention(const Params& params, void* first) : p(params), memory{static_cast<char*>(first)} {
    keys = memory.take<char>(tokens / kAmxWords * steps * kAmxBytes);
    values = memory.take<char>(token_steps * channel_tiles * kAmxBytes);
    queries = memory.take<char>(kQueries / kAmxRows * steps * kAmxBytes);
    scores = memory.take<float>(kQueries * scores_pitch);
    weights = memory.take<char>(kQueries / kAmxRows * token_steps * kAmxBytes);
    sums = memory.take<float>(kQueries * sums_pitch);
  }
  char* end() const { return memory.next; }

  void pack(int64_t head) const {
    for (int64_t t = 0; t < tokens; t += kAmxWords)
      for (int64_t i = 0; i < steps; ++i)
        store_transposed(keys + (t / kAmxWords * steps + i) * kAmxBytes, kAmxWords, [&](int j) {
          return t + j < p.tokens ? load_step(row(p.k, head, t + j) + i * kStep, p.channels - i * kStep) : U32{};
        });
    for (int64_t t = 0; t < tokens; t += 2) {
      const bf16* const even = row(p.v, head, t < p.tokens ? t : 0);
      const bf16* const odd = row(p.v, head, t + 1 < p.tokens ? t + 1 : 0);
      char* const to = values + t / kStep * channel_tiles * kAmxBytes + t % kStep / 2 * 64;
      for (int64_t c = 0; c < p.channels; c += kAmxWords) {
        const int64_t left = p.channels - c;
        const Vec<float> first = load_lanes(even + c, left), second = load_lanes(odd + c, left);
        store_words(to + c / kAmxWords * kAmxBytes,
                    as_pairs(t < p.tokens ? first : Vec<float>{}, t + 1 < p.tokens ? second : Vec<float>{}));
      }
    }
  }

  // Of the queries from `first` on.
  void attend(int64_t head, int64_t first, int64_t count) const {
    for (int64_t q = 0; q < count; ++q)
      for (int64_t i = 0; i < steps; ++i)
        store_words(row_of_tiles(queries, steps, q) + i * kAmxBytes,
                    load_step(row(p.q, head, first + q) + i * kStep, p.channels - i * kStep));
    TileProduct{steps,
                {queries, 64, kAmxBytes, steps * kAmxBytes},
                {keys, 64, kAmxBytes, steps * kAmxBytes},
                scores,
                scores_pitch}
        .run<Start::kZero>(count, tokens);
    float maximum[kQueries], scale[kQueries];
    for (int64_t q = 0; q < count; ++q) maximum[q] = largest(scores + q * scores_pitch);  // before any waits for it
    for (int64_t q = 0; q < count; ++q) {
      prefetch(p.q, head + 1, first + q);
      prefetch(p.k, head + 1, first + q);
      prefetch(p.v, head + 1, first + q);
      scale[q] = 1 / exponentials(scores + q * scores_pitch, maximum[q], row_of_tiles(weights, token_steps, q));
    }
    TileProduct{token_steps,
                {weights, 64, kAmxBytes, token_steps * kAmxBytes},
                {values, 64, channel_tiles * kAmxBytes, kAmxBytes},
                sums,
                sums_pitch}
        .run<Start::kZero>(count, p.channels);
    for (int64_t q = 0; q < count; ++q)
      each_vector<float>(p.channels, [&](int64_t c, int64_t lanes) {
        store_lanes(row(p.out, head, first + q) + c, load(sums + q * sums_pitch + c) * scale[q], lanes);
      });
  }

 private:
  const Params& p;
  Memory memory;
  const int64_t steps = round_up(p.channels, kStep) / kStep, token_steps = round_up(p.tokens, kStep) / kStep;
  const int64_t channel_tiles = (p.channels + kAmxWords - 1) / kAmxWords, tokens = token_steps * kStep;
  const int64_t scores_pitch = pitch_of<float>(tokens), sums_pitch = pitch_of<float>(channel_tiles * kAmxWords);
  const float factor = p.scale * 1.44269504088896341f;  // of scores as exponents of 2
  char* keys;                                           // [tokens / 16, channels / 32] tiles, columns are tokens
  char* values;                                         // [tokens / 32, channels / 16] tiles
  char* queries;                                        // [2, channels / 32] tiles
  float* scores;                                        // [32, tokens]
  char* weights;                                        // [2, tokens / 32] tiles, before they are divided by their sum
  float* sums;                                          // [32, channels]

  bf16* row(const AttentionView& view, int64_t head, int64_t token) const {
    return static_cast<bf16*>(const_cast<void*>(view.data)) + head / p.heads * view.batch_stride +
           head % p.heads * view.head_stride + token * view.token_stride;
  }

  // Rows lie too far apart for the processor to foresee those of the next head.
  TF_INLINE void prefetch(const AttentionView& view, int64_t head, int64_t token) const {
    const bf16* const next = row(view, head, token);
    for (int64_t c = 0; c < p.channels; c += kStep) __builtin_prefetch(next + c, 0, 2);
  }

  // Of a row of scores; what lies beyond the tokens becomes minus infinity.
  TF_INLINE float largest(float* row) const {
    for (int64_t t = p.tokens; t < tokens; ++t) row[t] = -__builtin_inff();
    Vec<float> first = load(row), second = load(row + kAmxWords);
    for (int64_t t = kStep; t < tokens; t += kStep) {
      first = max<float>(load(row + t), first);
      second = max<float>(load(row + t + kAmxWords), second);
    }
    return max_lane<float>(max<float>(first, second));
  }

  // out, a row of tiles, = exp(p.scale (row - maximum)), whose sum is returned.
  TF_INLINE float exponentials(const float* row, float maximum, char* out) const {
    Vec<float> first_sum{}, second_sum{};
    for (int64_t t = 0; t < tokens; t += kStep) {
      const Vec<float> first = exp2_for_bf16((load(row + t) - maximum) * factor),
                       second = exp2_for_bf16((load(row + t + kAmxWords) - maximum) * factor);
      store_pair(reinterpret_cast<bf16*>(out + t / kStep * kAmxBytes), first, second);
      first_sum += first;
      second_sum += second;
    }
    return sum_lanes<float>(first_sum + second_sum);
  }
};

int64_t scratch_bytes(const Params& p) { return Attention(p, nullptr).end() - static_cast<char*>(nullptr); }

void run(const Params& p, int64_t begin, int64_t end, void* scratch) {
  const Attention attention(p, scratch);
  amx_configure_whole();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / p.parts, first = item % p.parts * p.queries_a_part;
    if (item == begin || first == 0) attention.pack(head);
    const int64_t last = first + p.queries_a_part < p.queries ? first + p.queries_a_part : p.queries;
    for (int64_t q = first; q < last; q += kQueries)
      attention.attend(head, q, last - q < kQueries ? last - q : kQueries);
  }
  amx_release();
}

#endif

}  // namespace

#if TF_AMX
const AttentionKernels attention = {kQueries, scratch_bytes, run};
#else
const AttentionKernels attention = {};
#endif

}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
