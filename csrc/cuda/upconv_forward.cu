#include "upconv_copy.cuh"
#include "upconv_pass.cuh"
#include "upconv_tile.cuh"

namespace tokenfusion {
namespace upconv {

// x + what is added, as N numbers of the map.
template <typename T, int N>
TF_DEVICE void finish_numbers(float (&x)[N], const UpconvMap& map, int64_t at, const UpconvMap& added,
                              int64_t added_at) {
  if (added.data != nullptr) {
    const auto summands = Numbers<T, N>::load(static_cast<const T*>(added.data) + added_at);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += to_float(summands[i]);
  }
  Numbers<T, N>::rounded(x).store(static_cast<T*>(map.data) + at);
}

template <typename T, int N>
struct PixelsForward {
  const Pass& p;
  float bias[N] = {};

  TF_DEVICE void begin(uint32_t channel) {
    if (p.bias == nullptr) return;
    const auto numbers = Numbers<T, N>::load(static_cast<const T*>(p.bias) + channel);
#pragma unroll
    for (int i = 0; i < N; ++i) bias[i] = to_float(numbers[i]);
  }
  TF_DEVICE void take(int64_t from, const Place& place) {
    const auto numbers = Numbers<T, N>::load(static_cast<const T*>(p.product) + from);
    float x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_float(numbers[i]) + bias[i];
    finish_numbers<T>(x, p.map, place.in_pixels(p.map), p.added, place.in_pixels(p.added));
  }
  TF_DEVICE void finish(uint32_t, uint32_t) {}
};

template <typename T, int N, int kTogether>
struct PlanesForward {
  static constexpr int kOffsets = N / kTogether;

  const Pass& p;
  float bias = 0;

  TF_DEVICE void begin(uint32_t channel) {
    if (p.bias != nullptr) bias = to_float(static_cast<const T*>(p.bias)[channel]);
  }
  TF_DEVICE void take(int64_t from, const Place& place) {
    Numbers<T, kTogether> rows[kOffsets];
#pragma unroll
    for (int j = 0; j < kOffsets; ++j)
      rows[j] = Numbers<T, kTogether>::load(static_cast<const T*>(p.product) + from + j * p.product_offset);
    float x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_float(rows[i % kOffsets][i / kOffsets]) + bias;
    finish_numbers<T>(x, p.map, place.in_planes(p.map), p.added, place.in_planes(p.added));
  }
  TF_DEVICE void finish(uint32_t, uint32_t) {}
};

// N numbers of a tile, in the order of the map.
template <typename T, int N>
TF_DEVICE void write_numbers(const Tile<T>& tile, uint32_t number) {
  const Pass& p = tile.p;
  const auto bias_of = [&](uint32_t channel) {
    const bool is_there = p.bias != nullptr && channel < tile.channels;
    return is_there ? to_float(static_cast<const T*>(p.bias)[tile.first + channel]) : 0.0f;
  };
  Walk<T> walk(tile, number);
  float x[N], bias = bias_of(walk.channel);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = to_float(walk.number()) + bias;
    if (walk.next()) bias = bias_of(walk.channel);
  }
  finish_numbers<T>(x, p.map, tile.begin(p.map) + number, p.added, tile.begin(p.added) + number);
}

template <typename T, int N>
__global__ void __launch_bounds__(kUpconvThreads) forward_pixels_kernel(const __grid_constant__ Pass p) {
  if (block_index() >= p.blocks)
    copy<T>(p.copy, block_index() - p.blocks);
  else
    go_through_pixels<N>(p, PixelsForward<T, N>{p});
}

template <typename T, int N, int kTogether>
__global__ void __launch_bounds__(kUpconvThreads) forward_planes_kernel(const __grid_constant__ Pass p) {
  if (block_index() >= p.blocks)
    copy<T>(p.copy, block_index() - p.blocks);
  else
    go_through_planes<N>(p, PlanesForward<T, N, kTogether>{p});
}

template <typename T>
__global__ void __launch_bounds__(kUpconvThreads) forward_tiles_kernel(const __grid_constant__ Pass p) {
  constexpr int kVector = Tile<T>::kVector;
  extern __shared__ __align__(16) char memory[];
  if (block_index() >= p.blocks) return copy<T>(p.copy, block_index() - p.blocks);
  const Tile<T> tile(p, memory);
  for (uint32_t i = thread_index(); i < tile.rows() * tile.row_vectors(); i += kUpconvThreads) {
    const uint32_t row = i / tile.row_vectors(), at = (i - row * tile.row_vectors()) * kVector;
    Numbers<T, kVector>::load(tile.in_product(row) + at).put(tile.row(row) + at);
  }
  barrier(0, kUpconvThreads);
  const uint32_t numbers = tile.numbers(), whole = numbers / kVector * kVector;
  for (uint32_t i = thread_index() * kVector; i < whole; i += kUpconvThreads * kVector)
    write_numbers<T, kVector>(tile, i);
  if (whole + thread_index() < numbers) write_numbers<T, 1>(tile, whole + thread_index());
}

struct ForwardKernels {
  template <typename T, int N>
  static auto pixels() {
    return forward_pixels_kernel<T, N>;
  }
  template <typename T, int N, int kTogether>
  static auto planes() {
    return forward_planes_kernel<T, N, kTogether>;
  }
  template <typename T>
  static auto tiles() {
    return forward_tiles_kernel<T>;
  }
};

}  // namespace upconv

cudaError_t run_upconv_forward(const UpconvPass& p, UpconvWay way, Dtype dtype, cudaStream_t stream) {
  constexpr int64_t kUnits = kUpconvThreads * kUpconvCopied;
  return upconv::launch<upconv::ForwardKernels>(p, way, (p.copy.units + kUnits - 1) / kUnits, dtype, stream);
}

}  // namespace tokenfusion
