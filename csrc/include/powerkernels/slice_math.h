// What the forward and the backward over a slice of logits share. Only SIMD files include this.
#pragma once

#include "powerkernels/simd.h"
#include "powerkernels/vocab_slice.h"

namespace powerkernels {
namespace PK_SIMD {

constexpr double kLog2E = 1.44269504088896340736;
constexpr float kInfinity = __builtin_inff();

// Independent sums in flight, so that additions do not wait for one another.
constexpr int kUnroll = 4;
constexpr int kStep = kUnroll * F32::kWidth;
static_assert(kSliceV % kStep == 0, "a full slice needs no padding");

// Up to this power, e^(alpha*d) is a product of powers of one exponential.
constexpr int kMaxTwiceAlpha = 16;
// Any other power takes a second exponential.
constexpr int kSecondExp = -1;

PK_INLINE int twice_alpha_or_second_exp(double alpha) {
  const double twice = 2.0 * alpha;
  if (twice > kMaxTwiceAlpha || twice != static_cast<int>(twice)) return kSecondExp;
  return static_cast<int>(twice);
}

// c * tanh(x / c) and its derivative; tanh as in Cephes: odd polynomial near zero, else by
// e^(2|u|). -inf is a masked entry and stays one; a NaN stays one too.
PK_INLINE F32 soft_capped(F32 x, float cap, F32* derivative) {
  const F32 u = x / splat(cap);
  const F32 square = u * u;
  F32 p = splat(-5.70498872745e-3f);
  p = fma(p, square, splat(2.06390887954e-2f));
  p = fma(p, square, splat(-5.37397155531e-2f));
  p = fma(p, square, splat(1.33314422036e-1f));
  p = fma(p, square, splat(-3.33332819422e-1f));
  const F32 near = fma(p * square, u, u);
  // Up to 40, e^(2|u|) is a float32. The order of max's arguments keeps a NaN.
  const F32 size = splat(0.0f) - max(splat(-40.0f), splat(0.0f) - abs(u));
  const F32 e = exp2_scaled(size, splat(static_cast<float>(2.0 * kLog2E)));
  const F32 one = splat(1.0f);
  const F32 gap = splat(2.0f) / (e + one);
  const F32 far = one - gap;
  *derivative = gap * (one + far);
  const F32 signed_far = where_less(u, splat(0.0f), splat(0.0f) - far, far);
  const F32 capped = splat(cap) * where_less(abs(u), splat(0.625f), near, signed_far);
  return where_less(splat(-kInfinity), x, capped, x);
}

template <int n>
PK_INLINE F32 power(F32 x) {
  if constexpr (n == 1) {
    return x;
  } else {
    const F32 half = power<n / 2>(x);
    if constexpr (n % 2 == 0) {
      return half * half;
    } else {
      return half * half * x;
    }
  }
}

// x^n + sum
template <int n>
PK_INLINE F32 add_power(F32 x, F32 sum) {
  if constexpr (n == 1) {
    return x + sum;
  } else {
    return fma(power<n / 2>(x), power<n - n / 2>(x), sum);
  }
}

// e^(d/temperature) and e^(alpha*d/temperature) of kUnroll vectors d together. kTwiceAlpha: 2*alpha
// where that is one of 0..kMaxTwiceAlpha, else kSecondExp.
template <int kTwiceAlpha>
struct Exponentials {
  static constexpr bool kHalves = kTwiceAlpha > 0 && kTwiceAlpha % 2 == 1;
  // alpha as a power of the root below.
  static constexpr int kPower = kHalves ? kTwiceAlpha : kTwiceAlpha / 2;

  F32 lowest, scale, pow_scale;

  PK_INLINE explicit Exponentials(const RowParams& params) {
    const float root_scale =
        static_cast<float>(kLog2E / params.temperature * (kHalves ? 0.5 : 1.0));
    lowest = splat(-kMaxNegativeExponent / root_scale);
    scale = splat(root_scale);
    pow_scale = splat(static_cast<float>(kLog2E / params.temperature * params.alpha));
  }

  // The one exponential: e^(d/2/temperature) for half-integer powers, e^(d/temperature) otherwise.
  // `finite` is d, cut off where that is 0.
  PK_INLINE void roots(const F32 (&d)[kUnroll], F32 (&finite)[kUnroll],
                       F32 (&root)[kUnroll]) const {
    // Second argument of max: a NaN stays.
    for (int u = 0; u < kUnroll; ++u) finite[u] = max(lowest, d[u]);
    exp2_scaled(finite, scale, root);
  }

  static PK_INLINE F32 from_root(F32 root) { return kHalves ? root * root : root; }

  // e^(alpha*d/temperature), for kSecondExp.
  PK_INLINE void second(const F32 (&d)[kUnroll], F32 (&out)[kUnroll]) const {
    const F32 exponent_lowest = splat(-kMaxNegativeExponent);
    F32 exponent[kUnroll];
    for (int u = 0; u < kUnroll; ++u) exponent[u] = max(exponent_lowest, d[u] * pow_scale);
    exp2_scaled(exponent, splat(1.0f), out);
  }
};

}  // namespace PK_SIMD
}  // namespace powerkernels
