// The activations of tied_ffn and their derivatives, without branches. Infinities and NaN give what PyTorch's give.
#pragma once

#include "../common/activation.h"
#include "common/device.cuh"

namespace tokenfusion {
namespace tied_ffn {

// act(u), and the gradient of u for a gradient of act(u).
struct Activated {
  float value, grad;
};

// The normal distribution's cumulative function, with an error of 1e-7. Its tail beyond v = |u| is 2 to the power of a
// polynomial in v: a minimax fit of the tail, not of its logarithm, on [0, 6]. Beyond, the power falls to 0.
TF_DEVICE float cumulative_normal(float u) {
  const float v = fabsf(u);
  float p = -2.3349487e-06f;
  p = fmaf(p, v, 3.37378115e-05f);
  p = fmaf(p, v, -0.000161293821f);
  p = fmaf(p, v, -0.000191703584f);
  p = fmaf(p, v, 0.00712686498f);
  p = fmaf(p, v, -0.0525336117f);
  p = fmaf(p, v, -0.459198296f);
  p = fmaf(p, v, -1.151106f);
  const float tail = exp2_approximate(fmaf(p, v, -1.0f));
  return u < 0 ? tail : 1.0f - tail;
}

// s = 1 / (1 + 2^-z), and s (1 - s), which is 0 where s is 1, however inexact the reciprocal.
struct Sigmoid {
  float value, slope;

  TF_DEVICE explicit Sigmoid(float z) {
    const float e = exp2_approximate(-fabsf(z)), r = reciprocal_approximate(1.0f + e), er = e * r;
    value = z < 0 ? er : r, slope = er * r;
  }
};

struct Gelu {
  static TF_DEVICE float value(float u) { return u * cumulative_normal(u); }
  static TF_DEVICE Activated both(float u, float grad) {
    const float cumulative = cumulative_normal(u);
    const float density = 0.39894228040143268f * exp2_approximate(u * u * (-0.5f * kLog2E));
    return {u * cumulative, grad * fmaf(u, density, cumulative)};
  }
};

struct GeluTanh {
  static constexpr float kScale = 1.5957691216057308f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)

  static TF_DEVICE Sigmoid gate(float u) { return Sigmoid(u * fmaf(u * u, kScale * kCubic * kLog2E, kScale * kLog2E)); }
  static TF_DEVICE float value(float u) { return u * gate(u).value; }
  static TF_DEVICE Activated both(float u, float grad) {
    const Sigmoid s = gate(u);
    return {u * s.value, grad * fmaf(u * s.slope, fmaf(u * u, 3 * kScale * kCubic, kScale), s.value)};
  }
};

struct Relu {
  static TF_DEVICE float value(float u) { return u < 0 ? 0 : u; }
  static TF_DEVICE Activated both(float u, float grad) { return {value(u), u <= 0 ? 0 : grad}; }
};

struct Silu {
  static TF_DEVICE float value(float u) { return u * Sigmoid(u * kLog2E).value; }
  static TF_DEVICE Activated both(float u, float grad) {
    const Sigmoid s(u * kLog2E);
    return {u * s.value, grad * fmaf(u, s.slope, s.value)};
  }
};

struct Identity {
  static TF_DEVICE float value(float u) { return u; }
  static TF_DEVICE Activated both(float u, float grad) { return {u, grad}; }
};

// f(Act()) for the activation.
template <typename F>
auto with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::kGelu:
      return f(Gelu());
    case Activation::kGeluTanh:
      return f(GeluTanh());
    case Activation::kRelu:
      return f(Relu());
    case Activation::kSilu:
      return f(Silu());
    default:
      return f(Identity());
  }
}

}  // namespace tied_ffn
}  // namespace tokenfusion
