// Functions whose results are rounded to bfloat16, which makes errors of some 1e-4 of them invisible.
#pragma once

#include "vec.h"

#if TF_VECTOR_BYTES == 64

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

// 2^x, within 8e-5 of it.
TF_INLINE Vec<float> exp2_for_bf16(Vec<float> x) {
  const Vec<float> r = (Vec<float>)_mm512_maskz_reduce_ps(0xffff, (__m512)x, 0), n = x - r;  // to nearest, -0.5 to 0.5
  Vec<float> p = broadcast(5.5171669e-2f);
  p = p * r + 2.4261115e-1f;
  p = p * r + 6.9326097e-1f;
  p = p * r + 9.9992806e-1f;
  return (Vec<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
}

// u times the cumulative normal distribution at u, which is 1 / (1 + 2^(-u q(u^2))) within 4e-4 of it for |u| up to
// 5.5, with a minimax fit q; beyond, where it is below 2e-8 or above 1 - 2e-8, it goes on to 0 and 1.
TF_INLINE Vec<float> gelu_for_bf16(Vec<float> u) {
  const Vec<float> s = u * u;
  Vec<float> q = broadcast(9.4182667e-10f);
  q = q * s - 1.0314515e-7f;
  q = q * s + 4.2938521e-6f;
  q = q * s - 7.1778638e-5f;
  q = q * s - 6.1993979e-4f;
  q = q * s + 1.0619018e-1f;
  q = q * s + 2.3012099f;
  const Vec<float> whole = 1.0f + exp2_for_bf16(-u * q);
  return u * (Vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)whole);
}

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion

#endif
