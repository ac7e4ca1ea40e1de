#include "common/amx_product.h"
#include "common/bf16_functions.h"
#include "common/memory.h"
#include "mlp.h"

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

#if TF_AMX

typedef MlpParams Params;

constexpr int64_t kPanel = 2 * kAmxWords, kRows = 64;

int64_t steps_of(const MlpLayer& layer) { return round_up(layer.inputs, kStep) / kStep; }

int64_t packed_bytes(const MlpLayer& layer) {
  return round_up(layer.outputs, kPanel) / kAmxWords * steps_of(layer) * kAmxBytes;
}

// [outputs / 16, inputs / 32] tiles, padded with zeros.
void pack(const MlpLayer& layer, int64_t first_panel, int64_t end_panel) {
  const bf16* const weight = static_cast<const bf16*>(layer.weight);
  const int64_t steps = steps_of(layer);
  for (int64_t n = first_panel * kPanel; n < end_panel * kPanel; n += kAmxWords)
    for (int64_t i = 0; i < steps; ++i)
      store_transposed(layer.packed + (n / kAmxWords * steps + i) * kAmxBytes, kAmxWords, [&](int j) {
        const int64_t left = layer.inputs - i * kStep;
        return n + j < layer.outputs ? load_step(weight + (n + j) * layer.weight_stride + i * kStep, left) : U32{};
      });
}

// A block of rows, which stays in the core's cache between the two layers.
class Block {
 public:
  Block(const Params& params, void* memory_) : p(params), memory{static_cast<char*>(memory_)} {
    x = memory.take<char>(kRows / kAmxRows * steps_of(p.first) * kAmxBytes);
    hidden = memory.take<char>(kRows / kAmxRows * steps_of(p.second) * kAmxBytes);
    sums = memory.take<float>(kRows * kSumsPitch);
  }
  char* end() const { return memory.next; }

  void run(int64_t first, int64_t count) const {
    read(first, count);
    each_panel(p.first, x, count, [&](int64_t r, int64_t n, Vec<float> low, Vec<float> high) {
      const int64_t left = p.first.outputs - n;  // beyond, infinity times zero is not zero
      store_pair(reinterpret_cast<bf16*>(row_of_tiles(hidden, steps_of(p.second), r) + n / kStep * kAmxBytes),
                 first_lanes<float>(gelu_for_bf16(low), left),
                 first_lanes<float>(gelu_for_bf16(high), left - kAmxWords));
    });
    bf16* const out = static_cast<bf16*>(p.out) + first * p.out_stride;
    each_panel(p.second, hidden, count, [&](int64_t r, int64_t n, Vec<float> low, Vec<float> high) {
      bf16* const to = out + r * p.out_stride + n;
      const int64_t left = p.second.outputs - n;
      if (left >= kPanel) return store_pair(to, low, high);
      store_lanes(to, low, left);
      if (left > kAmxWords) store_lanes(to + kAmxWords, high, left - kAmxWords);
    });
  }

 private:
  static constexpr int64_t kSumsPitch = kPanel + kAmxWords;

  const Params& p;
  Memory memory;
  char *x, *hidden;  // [4, inputs / 32] tiles, of the inputs of each layer
  float* sums;       // [64, panel]

  void read(int64_t first, int64_t count) const {
    const bf16* const from = static_cast<const bf16*>(p.x) + first * p.x_stride;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < p.first.inputs; c += kStep)
        store_words(row_of_tiles(x, steps_of(p.first), r) + c / kStep * kAmxBytes,
                    load_step(from + r * p.x_stride + c, p.first.inputs - c));
  }

  // f(row, number of the first output, the outputs of a panel in two vectors)
  template <typename F>
  TF_INLINE void each_panel(const MlpLayer& layer, const char* left, int64_t count, F f) const {
    const int64_t steps = steps_of(layer);
    for (int64_t n = 0; n < layer.outputs; n += kPanel) {
      TileProduct{steps,
                  {left, 64, kAmxBytes, steps * kAmxBytes},
                  {layer.packed + n / kAmxWords * steps * kAmxBytes, 64, kAmxBytes, steps * kAmxBytes},
                  sums,
                  kSumsPitch,
                  layer.bias + n}
          .run<Start::kBias>(count, kPanel);
      for (int64_t r = 0; r < count; ++r) f(r, n, load(sums + r * kSumsPitch), load(sums + r * kSumsPitch + kAmxWords));
    }
  }
};

int64_t scratch_bytes(const Params& p) { return Block(p, nullptr).end() - static_cast<char*>(nullptr); }

void run(const Params& p, int64_t first_row, int64_t count, void* scratch) {
  amx_configure_whole();
  Block(p, scratch).run(first_row, count);
  amx_release();
}

#endif

}  // namespace

#if TF_AMX
const MlpKernels mlp = {kPanel, kRows, kAmxRows, packed_bytes, pack, scratch_bytes, run};
#else
const MlpKernels mlp = {};
#endif

}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
