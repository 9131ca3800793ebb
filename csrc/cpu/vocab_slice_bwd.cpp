// The gradient of a stretch of a row of logits, in float32 vectors. Compiled once per SIMD level.
#include <cstdint>

#include "powerkernels/slice_math.h"
#include "powerkernels/vocab_slice.h"

namespace powerkernels {
namespace PK_SIMD {
namespace {

// At alpha = 1 log_z is constant: that kernel has no e^alpha, and serves where its factor is 0.
constexpr int kNoPower = 2;

template <int kTwiceAlpha, bool kSoftcap>
struct Gradient {
  Exponentials<kTwiceAlpha> exponentials;
  F32 center, constant, slope, of_power;
  float cap;

  PK_INLINE Gradient(const RowParams& params, const RowGradient& g) : exponentials(params) {
    const double scale = 1.0 / params.temperature;
    center = splat(static_cast<float>(g.max));
    constant = splat(static_cast<float>(scale * g.constant));
    slope = splat(static_cast<float>(scale * scale * g.slope));
    of_power = splat(static_cast<float>(scale * g.of_power));
    cap = static_cast<float>(params.softcap);
  }

  // The kStep entries of x, into out.
  template <DType dtype>
  PK_INLINE void step(const void* x, void* out) const {
    F32 d[kUnroll], finite[kUnroll], root[kUnroll], dz[kUnroll], derivative[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      F32 z = load_as<dtype>(x, u * F32::kWidth);
      if constexpr (kSoftcap) z = soft_capped(z, cap, &derivative[u]);
      d[u] = z - center;
    }
    exponentials.roots(d, finite, root);
    for (int u = 0; u < kUnroll; ++u) {
      dz[u] = exponentials.from_root(root[u]) * fma(slope, finite[u], constant);
    }
    if constexpr (kTwiceAlpha == kSecondExp) {
      F32 e[kUnroll];
      exponentials.second(d, e);
      for (int u = 0; u < kUnroll; ++u) dz[u] = fma(of_power, e[u], dz[u]);
    } else if constexpr (kTwiceAlpha != kNoPower) {
      for (int u = 0; u < kUnroll; ++u) {
        dz[u] = fma(of_power, power<Exponentials<kTwiceAlpha>::kPower>(root[u]), dz[u]);
      }
    }
    for (int u = 0; u < kUnroll; ++u) {
      if constexpr (kSoftcap) dz[u] = derivative[u] * dz[u];
      store_as<dtype>(out, u * F32::kWidth, dz[u]);
    }
  }
};

template <DType dtype, int kTwiceAlpha, bool kSoftcap>
void gradient(const void* x, int64_t n, const RowParams& params, const RowGradient& g, void* out) {
  constexpr int64_t kSize = dtype == DType::float32 ? 4 : 2;
  const FlushToZero flush_to_zero;
  const Gradient<kTwiceAlpha, kSoftcap> of(params, g);
  const char* from = static_cast<const char*>(x);
  char* to = static_cast<char*>(out);
  const char* whole_end = from + n / kStep * kStep * kSize;
  for (; from != whole_end; from += kStep * kSize, to += kStep * kSize) {
    of.template step<dtype>(from, to);
  }
  const int64_t rest = n % kStep * kSize;
  if (rest == 0) return;
  alignas(64) char buffer[kStep * kSize] = {};
  __builtin_memcpy(buffer, from, static_cast<size_t>(rest));
  of.template step<dtype>(buffer, buffer);
  __builtin_memcpy(to, buffer, static_cast<size_t>(rest));
}

template <DType dtype, bool kSoftcap, int kTwiceAlpha = 1>
GradientKernel pick(int twice_alpha) {
  if constexpr (kTwiceAlpha > kMaxTwiceAlpha) {
    return gradient<dtype, kSecondExp, kSoftcap>;
  } else {
    if (twice_alpha == kTwiceAlpha) return gradient<dtype, kTwiceAlpha, kSoftcap>;
    return pick<dtype, kSoftcap, kTwiceAlpha + 1>(twice_alpha);
  }
}

template <DType dtype>
GradientKernel pick_for(const RowParams& params, const RowGradient& g) {
  const int twice = g.of_power == 0.0 ? kNoPower : twice_alpha_or_second_exp(params.alpha);
  return params.softcap == 0.0 ? pick<dtype, false>(twice) : pick<dtype, true>(twice);
}

}  // namespace

GradientKernel gradient_kernel(const RowParams& params, const RowGradient& g) {
  if (params.dtype == DType::bfloat16) return pick_for<DType::bfloat16>(params, g);
  if (params.dtype == DType::float16) return pick_for<DType::float16>(params, g);
  return pick_for<DType::float32>(params, g);
}

}  // namespace PK_SIMD
}  // namespace powerkernels
