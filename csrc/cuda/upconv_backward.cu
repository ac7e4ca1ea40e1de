#include "upconv_pass.cuh"
#include "upconv_tile.cuh"

namespace tokenfusion {
namespace upconv {

// Pairwise.
template <typename T, int N>
TF_DEVICE float sum_of(const Numbers<T, N>& numbers) {
  float x[N];
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float(numbers[i]);
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// A warp's, as one of those that are added up for the gradient of a channel's bias.
TF_DEVICE void write_sum(const Pass& p, float sum, uint32_t part, uint32_t channel) {
  if (p.sums == nullptr) return;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (thread_index() % 32 == 0) p.sums[part * int64_t(p.channels) + channel] = sum;
}

template <typename T, int N>
struct PixelsBackward {
  const Pass& p;
  float sums[N] = {};

  TF_DEVICE void begin(uint32_t) {}
  TF_DEVICE void take(int64_t to, const Place& place) {
    const auto numbers = Numbers<T, N>::load(static_cast<const T*>(p.map.data) + place.in_pixels(p.map));
    numbers.store(static_cast<T*>(p.product) + to);
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] += to_float(numbers[i]);
  }
  TF_DEVICE void finish(uint32_t group, uint32_t channel) {
    constexpr int kFloats = N < 4 ? N : 4;
    if (p.sums == nullptr) return;
    float* const to = p.sums + group * int64_t(p.channels) + channel;
#pragma unroll
    for (int i = 0; i < N; i += kFloats) {
      Numbers<float, kFloats> part;
#pragma unroll
      for (int k = 0; k < kFloats; ++k) part[k] = sums[i + k];
      part.store(to + i);
    }
  }
};

template <typename T, int N, int kTogether>
struct PlanesBackward {
  static constexpr int kOffsets = N / kTogether;

  const Pass& p;
  float sum = 0;

  TF_DEVICE void begin(uint32_t) {}
  TF_DEVICE void take(int64_t to, const Place& place) {
    const auto numbers = Numbers<T, N>::load(static_cast<const T*>(p.map.data) + place.in_planes(p.map));
#pragma unroll
    for (int j = 0; j < kOffsets; ++j) {
      Numbers<T, kTogether> row;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) row[i] = numbers[i * kOffsets + j];
      row.store(static_cast<T*>(p.product) + to + j * p.product_offset);
    }
    sum += sum_of(numbers);
  }
  TF_DEVICE void finish(uint32_t part, uint32_t channel) { write_sum(p, sum, part, channel); }
};

// N numbers of a tile, from the order of the map.
template <typename T, int N>
TF_DEVICE void read_numbers(const Tile<T>& tile, uint32_t number) {
  const auto numbers = Numbers<T, N>::load(static_cast<const T*>(tile.p.map.data) + tile.begin(tile.p.map) + number);
  Walk<T> walk(tile, number);
#pragma unroll
  for (int i = 0; i < N; ++i) walk.number() = numbers[i], walk.next();
}

template <typename T, int N>
__global__ void __launch_bounds__(kUpconvThreads) backward_pixels_kernel(const __grid_constant__ Pass p) {
  go_through_pixels<N>(p, PixelsBackward<T, N>{p});
}

template <typename T, int N, int kTogether>
__global__ void __launch_bounds__(kUpconvThreads) backward_planes_kernel(const __grid_constant__ Pass p) {
  go_through_planes<N>(p, PlanesBackward<T, N, kTogether>{p});
}

template <typename T>
__global__ void __launch_bounds__(kUpconvThreads) backward_tiles_kernel(const __grid_constant__ Pass p) {
  constexpr int kVector = Tile<T>::kVector;
  extern __shared__ __align__(16) char memory[];
  const Tile<T> tile(p, memory);
  const uint32_t numbers = tile.numbers(), whole = numbers / kVector * kVector;
  for (uint32_t i = thread_index() * kVector; i < whole; i += kUpconvThreads * kVector)
    read_numbers<T, kVector>(tile, i);
  if (whole + thread_index() < numbers) read_numbers<T, 1>(tile, whole + thread_index());
  const uint32_t beyond = tile.pitch - tile.pixels;
  for (uint32_t i = thread_index(); i < tile.rows() * beyond; i += kUpconvThreads)
    tile.row(i / beyond)[tile.pixels + i % beyond] = from_float<T>(0);
  barrier(0, kUpconvThreads);
  for (uint32_t channel = thread_index() / 32; channel < tile.channels; channel += kUpconvThreads / 32) {
    float sum = 0;
    for (uint32_t i = thread_index() % 32; i < tile.offsets * tile.row_vectors(); i += 32) {
      const uint32_t offset = i / tile.row_vectors(), at = (i - offset * tile.row_vectors()) * kVector;
      const uint32_t row = channel * tile.offsets + offset;
      const auto vector = Numbers<T, kVector>::load(tile.row(row) + at);
      vector.store(tile.in_product(row) + at);
      sum += sum_of(vector);
    }
    write_sum(p, sum, tile.image, tile.first + channel);
  }
}

struct BackwardKernels {
  template <typename T, int N>
  static auto pixels() {
    return backward_pixels_kernel<T, N>;
  }
  template <typename T, int N, int kTogether>
  static auto planes() {
    return backward_planes_kernel<T, N, kTogether>;
  }
  template <typename T>
  static auto tiles() {
    return backward_tiles_kernel<T>;
  }
};

}  // namespace upconv

cudaError_t run_upconv_backward(const UpconvPass& p, UpconvWay way, Dtype dtype, cudaStream_t stream) {
  return upconv::launch<upconv::BackwardKernels>(p, way, 0, dtype, stream);
}

}  // namespace tokenfusion
