// How the kernels of tied_ffn go through their matrices.
#pragma once

#include "common/with_dtype.cuh"
#include "tied_ffn_activations.cuh"
#include "tied_ffn_launch.h"

namespace tokenfusion {
namespace tied_ffn {

typedef TiedFfnPass Pass;

template <typename T>
constexpr int kNumbers = 16 / sizeof(T);  // of a vector

template <typename T>
struct alignas(16) Numbers {
  T x[kNumbers<T>];
};

// The first `count` numbers of a vector, which has no more there, and zeros.
template <typename T>
TF_DEVICE Vector16 load(const void* matrix, int64_t at, int64_t count = kNumbers<T>) {
  const T* const from = static_cast<const T*>(matrix) + at;
  if (count >= kNumbers<T>) return *reinterpret_cast<const Vector16*>(from);
  Numbers<T> v{};
#pragma unroll
  for (int i = 0; i < kNumbers<T>; ++i)
    if (i < count) v.x[i] = from[i];
  return *reinterpret_cast<const Vector16*>(&v);
}
template <typename T>
TF_DEVICE void store(void* matrix, int64_t at, const Vector16& v, int64_t count = kNumbers<T>) {
  T* const to = static_cast<T*>(matrix) + at;
  if (count >= kNumbers<T>) return store_global(to, v);
#pragma unroll
  for (int i = 0; i < kNumbers<T>; ++i)
    if (i < count) to[i] = reinterpret_cast<const Numbers<T>*>(&v)->x[i];
}

template <typename T>
TF_DEVICE Vector16 narrow(const float (&x)[kNumbers<T>]) {
  Vector16 v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      v.x[i] = __float_as_uint(x[i]);
    else
      v.x[i] = pack<T>(x[2 * i], x[2 * i + 1]);
  }
  return v;
}

template <typename T, typename Act>
struct Forward {
  static constexpr int kAtOnce = 4;  // vectors of a matrix that a thread waits for together

  const Pass& p;

  // Vectors at `at`, `at` + line and so on; the first `count` numbers of each.
  template <int kVectors>
  TF_DEVICE void take(int64_t at, int64_t count) {
    Vector16 hidden[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) hidden[k] = load<T>(p.hidden, at + k * p.line, count);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float x[kNumbers<T>];
      unpack_vector<T>(x, hidden[k]);
#pragma unroll
      for (int i = 0; i < kNumbers<T>; ++i) x[i] = Act::value(x[i]);
      store<T>(p.activated, at + k * p.line, narrow<T>(x), count);
    }
  }
  TF_DEVICE void finish(int64_t) {}
};

template <typename T, typename Act>
struct Backward {
  static constexpr int kAtOnce = 2;

  const Pass& p;
  float sums[kNumbers<T>] = {};

  template <int kVectors>
  TF_DEVICE void take(int64_t at, int64_t count) {
    Vector16 hidden[kVectors], grads[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      hidden[k] = load<T>(p.hidden, at + k * p.line, count);
      grads[k] = load<T>(p.grad, at + k * p.line, count);
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float x[kNumbers<T>], grad[kNumbers<T>];
      unpack_vector<T>(x, hidden[k]), unpack_vector<T>(grad, grads[k]);
#pragma unroll
      for (int i = 0; i < kNumbers<T>; ++i) {
        const Activated a = Act::both(x[i], grad[i]);
        x[i] = a.value, grad[i] = a.grad, sums[i] += a.grad;
      }
      if (p.activated != nullptr) store<T>(p.activated, at + k * p.line, narrow<T>(x), count);
      store<T>(p.grad, at + k * p.line, narrow<T>(grad), count);
    }
  }
  TF_DEVICE void finish(int64_t at) {
    if (p.grad_bias == nullptr) return;
#pragma unroll
    for (int i = 0; i < kNumbers<T>; i += 4)
      store<float>(p.grad_bias, at + i, narrow<float>({sums[i], sums[i + 1], sums[i + 2], sums[i + 3]}));
  }
};

template <typename T, typename Direction>
TF_DEVICE void run_block(const Pass& p) {
  constexpr int kVectors = Direction::kAtOnce;
  const uint32_t thread = uint32_t(block_index()) * kTiedFfnThreads + thread_index();
  const uint32_t a_line = p.line / kNumbers<T>, sum = thread / a_line;
  const int64_t column = int64_t(thread % a_line) * kNumbers<T>, first = sum * int64_t(p.depth) * p.line;
  if (first >= p.elements) return;
  Direction direction{p};
  int64_t left = p.elements - first - column;  // from the vector on that comes next; its numbers where it is the last
  int depth = p.depth;
  for (; depth >= kVectors && left >= (kVectors - 1) * p.line + kNumbers<T>;
       depth -= kVectors, left -= kVectors * p.line)
    direction.template take<kVectors>(p.elements - left, kNumbers<T>);
  for (; depth > 0 && left > 0; --depth, left -= p.line) direction.template take<1>(p.elements - left, left);
  direction.finish(sum * p.line + column);
}

template <typename KernelOf>
cudaError_t launch(const Pass& p, Activation activation, Dtype dtype, cudaStream_t stream, KernelOf kernel_of) {
  const auto kernel = with_dtype(dtype, [&](auto element) {
    return with_activation(activation, [&](auto act) { return kernel_of(element, act); });
  });
  const int64_t threads = p.threads(dtype == Dtype::kFloat32 ? 4 : 2);
  kernel<<<int((threads + kTiedFfnThreads - 1) / kTiedFfnThreads), kTiedFfnThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace tied_ffn
}  // namespace tokenfusion
