#include "common/vec.h"
#include "tied_ffn.h"

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

// act(u) and its derivative.
template <typename A>
struct Activated {
  Vec<A> value, slope;
};

// The cumulative normal distribution at u, where density = exp(-u^2 / 2), to a relative 1e-6: with
// v = |u| and t = 1 / (1 + 0.26 v), the tail beyond v is the density times t times a polynomial in t, which is a
// minimax fit to erfcx(v / sqrt(2)) / (2 t) on [0, 14].
TF_INLINE Vec<float> cumulative_normal(Vec<float> u, Vec<float> density) {
  const Vec<float> t = 1.0f / (1.0f + 0.26f * (u < 0.0f ? -u : u));
  Vec<float> p = broadcast(0.030505536f);
  p = p * t - 0.15283212f;
  p = p * t + 0.25149837f;
  p = p * t - 0.15095739f;
  p = p * t + 0.16095388f;
  p = p * t + 0.05102503f;
  p = p * t + 0.10303096f;
  p = p * t + 0.10301665f;
  p = p * t + 0.103759065f;
  const Vec<float> tail = p * t * density;
  return u < 0.0f ? tail : 1.0f - tail;
}

TF_INLINE Vec<double> cumulative_normal(Vec<double> u, Vec<double>) {
  for (int i = 0; i < VecOf<double>::lanes; ++i) u[i] = 0.5 * __builtin_erfc(-0.70710678118654752440 * u[i]);
  return u;
}

// 1 / (1 + exp(-z)).
template <typename A>
TF_INLINE Activated<A> sigmoid(Vec<A> z) {
  const Vec<A> e = exp_nonpositive(z > A(0) ? -z : z), r = A(1) / (A(1) + e);
  return {z < A(0) ? e * r : r, e * r * r};
}

struct Gelu {
  template <typename A>
  static TF_INLINE Activated<A> at(Vec<A> u) {
    const Vec<A> density = exp_nonpositive(A(-0.5) * u * u);
    const Vec<A> cumulative = cumulative_normal(u, density);
    return {u * cumulative, cumulative + u * density * A(0.39894228040143267794)};
  }
};

struct GeluTanh {
  template <typename A>
  static TF_INLINE Activated<A> at(Vec<A> u) {
    constexpr A scale = A(1.59576912160573071176), cubic = A(0.044715);  // 2 sqrt(2 / pi)
    const Vec<A> square = u * u;
    const Activated<A> s = sigmoid<A>(scale * u * (A(1) + cubic * square));
    return {u * s.value, s.value + u * s.slope * scale * (A(1) + A(3) * cubic * square)};
  }
};

struct Relu {
  template <typename A>
  static TF_INLINE Activated<A> at(Vec<A> u) {
    return {u < A(0) ? Vec<A>{} : u, u <= A(0) ? Vec<A>{} : broadcast(A(1))};  // NaN stays
  }
};

struct Silu {
  template <typename A>
  static TF_INLINE Activated<A> at(Vec<A> u) {
    const Activated<A> s = sigmoid<A>(u);
    return {u * s.value, s.value + u * s.slope};
  }
};

struct Identity {
  template <typename A>
  static TF_INLINE Activated<A> at(Vec<A> u) {
    return {u, broadcast(A(1))};
  }
};

template <typename T, typename Act>
void forward(const TiedFfnRows& r) {
  typedef typename Accumulator<T>::type A;
  const T* const hidden = static_cast<const T*>(r.hidden);
  T* const activated = static_cast<T*>(r.activated);
  each_vector<A>(r.rows * r.features, [&](int64_t i, int64_t n) {
    store_lanes(activated + i, Act::template at<A>(load_lanes(hidden + i, n)).value, n);
  });
}

template <typename T, typename Act>
void backward(const TiedFfnRows& r) {
  typedef typename Accumulator<T>::type A;
  for (int64_t row = 0; row < r.rows; ++row) {
    A* const grad_bias = static_cast<A*>(r.grad_bias) + row / kRowsPerSum * r.features;
    const bool begins = row % kRowsPerSum == 0;
    const int64_t first = row * r.features;
    const T* const hidden = static_cast<const T*>(r.hidden) + first;
    const T* const grad_activated = static_cast<const T*>(r.grad_activated) + first;
    T* const activated = static_cast<T*>(r.activated) + first;
    T* const grad_hidden = static_cast<T*>(r.grad_hidden) + first;
    each_vector<A>(r.features, [&](int64_t i, int64_t n) {
      const Activated<A> act = Act::template at<A>(load_lanes(hidden + i, n));
      const Vec<A> grad = load_lanes(grad_activated + i, n) * act.slope;
      store_lanes(activated + i, act.value, n);
      store_lanes(grad_hidden + i, grad, n);
      store_lanes(grad_bias + i, begins ? grad : load_lanes(grad_bias + i, n) + grad, n);
    });
  }
}

template <typename T>
constexpr TiedFfnKernels::ForDtype for_dtype() {
  return {
      {forward<T, Gelu>, forward<T, GeluTanh>, forward<T, Relu>, forward<T, Silu>, forward<T, Identity>},
      {backward<T, Gelu>, backward<T, GeluTanh>, backward<T, Relu>, backward<T, Silu>, backward<T, Identity>},
  };
}

}  // namespace

const TiedFfnKernels tied_ffn = {for_dtype<float>(), for_dtype<bf16>(), for_dtype<double>()};

}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
