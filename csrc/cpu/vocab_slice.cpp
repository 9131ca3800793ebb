// The sums over one slice of a row of logits, in float32 vectors. Compiled once per SIMD level.
#include "powerkernels/vocab_slice.h"

#include <cstdint>

#include "powerkernels/simd.h"

namespace powerkernels {
namespace PK_SIMD {
namespace {

constexpr double kLog2E = 1.44269504088896340736;
constexpr float kInfinity = __builtin_inff();

// Independent sums in flight, so that additions do not wait for one another.
constexpr int kUnroll = 4;
constexpr int kStep = kUnroll * F32::kWidth;
static_assert(kSliceV % kStep == 0, "a full slice needs no padding");

// Up to this power, e^(alpha*d) is a product of powers of one exponential.
constexpr int kMaxTwiceAlpha = 16;
// The other ways to get it, numbered outside 0..kMaxTwiceAlpha.
constexpr int kSecondExp = -1;

// c * tanh(x / c); tanh as in Cephes: odd polynomial near zero, else by e^(2|u|).
PK_INLINE F32 soft_capped(F32 x, float cap) {
  const F32 u = x / splat(cap);
  const F32 square = u * u;
  F32 p = splat(-5.70498872745e-3f);
  p = fma(p, square, splat(2.06390887954e-2f));
  p = fma(p, square, splat(-5.37397155531e-2f));
  p = fma(p, square, splat(1.33314422036e-1f));
  p = fma(p, square, splat(-3.33332819422e-1f));
  const F32 near = fma(p * square, u, u);
  // From 10 on tanh is 1 in float32. The order of max's arguments keeps a NaN.
  const F32 size = splat(0.0f) - max(splat(-10.0f), splat(0.0f) - abs(u));
  const F32 e = exp2_scaled(size, splat(static_cast<float>(2.0 * kLog2E)));
  const F32 one = splat(1.0f);
  const F32 far = one - splat(2.0f) / (e + one);
  const F32 signed_far = where_less(u, splat(0.0f), splat(0.0f) - far, far);
  return splat(cap) * where_less(abs(u), splat(0.625f), near, signed_far);
}

template <DType dtype>
PK_INLINE F32 load_as(const void* x, int i) {
  if constexpr (dtype == DType::float32) {
    return load(static_cast<const float*>(x) + i);
  } else if constexpr (dtype == DType::bfloat16) {
    return load_bfloat16(static_cast<const uint16_t*>(x) + i);
  } else {
    return load_float16(static_cast<const uint16_t*>(x) + i);
  }
}

template <DType dtype>
PK_INLINE float load_one(const void* x, int i) {
  if constexpr (dtype == DType::float32) {
    return static_cast<const float*>(x)[i];
  } else if constexpr (dtype == DType::bfloat16) {
    return bfloat16_to_float(static_cast<const uint16_t*>(x)[i]);
  } else {
    return float16_to_float(static_cast<const uint16_t*>(x)[i]);
  }
}

// The slice as floats, a multiple of kStep of them, and their maximum. Whole float32 slices are
// read where they are; anything else goes through `buffer`, padded with -inf.
struct Staged {
  const float* x;
  int n;
  float max;
};

// Takes over a slice step by step: its maximum, and a copy as floats unless they are floats
// already. The sums of one slice run beside the takeover of the next: one waits for the
// multipliers, the other for memory.
template <DType dtype>
struct Takeover {
  const char* x;
  float* buffer;
  F32 best[kUnroll];

  PK_INLINE Takeover(const void* x, float* buffer)
      : x(static_cast<const char*>(x)), buffer(buffer) {
    for (int u = 0; u < kUnroll; ++u) best[u] = splat(-kInfinity);
  }

  PK_INLINE void step(int i) {
    constexpr int kSize = dtype == DType::float32 ? 4 : 2;
    for (int u = 0; u < kUnroll; ++u) {
      const int at = i + u * F32::kWidth;
      const F32 value = load_as<dtype>(x, at);
      if (dtype != DType::float32) store(buffer + at, value);
      // max keeps its second argument where the first is NaN: NaN shows up in the sums instead.
      best[u] = max(value, best[u]);
    }
    // The slice after this one; past the row's end a prefetch does nothing.
    constexpr int kCacheLine = 64;
    for (int line = 0; line < kStep * kSize; line += kCacheLine) {
      __builtin_prefetch(x + (kSliceV + i) * kSize + line);
    }
  }

  PK_INLINE Staged staged(int n) const {
    const F32 all = max(max(best[0], best[1]), max(best[2], best[3]));
    const bool in_place = dtype == DType::float32;
    return {in_place ? reinterpret_cast<const float*>(x) : buffer, n, max_of_lanes(all)};
  }
};

struct NoTakeover {
  PK_INLINE void step(int) {}
};

template <DType dtype>
PK_INLINE Staged take_over(const void* x, int n, float* buffer) {
  Takeover<dtype> slice(x, buffer);
  for (int i = 0; i < n; i += kStep) slice.step(i);
  return slice.staged(n);
}

template <DType dtype>
Staged stage(const void* x, int n, int hidden, float cap, float* buffer) {
  const int padded = (n + kStep - 1) / kStep * kStep;
  if (n == padded && hidden == kNoEntry && cap == 0.0f) return take_over<dtype>(x, n, buffer);
  const int whole = n / F32::kWidth * F32::kWidth;
  for (int i = 0; i < whole; i += F32::kWidth) store(buffer + i, load_as<dtype>(x, i));
  for (int i = whole; i < n; ++i) buffer[i] = load_one<dtype>(x, i);
  for (int i = n; i < padded; ++i) buffer[i] = -kInfinity;
  if (cap != 0.0f) {
    // -inf is a masked entry and stays one; a NaN is on neither side and stays what it is.
    const F32 lowest = splat(-kInfinity);
    for (int i = 0; i < padded; i += F32::kWidth) {
      const F32 value = load(buffer + i);
      store(buffer + i, where_less(lowest, value, soft_capped(value, cap), value));
    }
  }
  if (hidden != kNoEntry) buffer[hidden] = -kInfinity;
  return take_over<DType::float32>(buffer, padded, buffer);
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

// kTwiceAlpha: 2*alpha where that is one of 0..kMaxTwiceAlpha, else kSecondExp.
template <int kTwiceAlpha, bool kEntropy, typename Next>
PK_INLINE void sums(const Staged& s, const RowParams& params, Next& next, SliceStats* out) {
  constexpr bool kHalves = kTwiceAlpha > 0 && kTwiceAlpha % 2 == 1;
  // The one exponential is e^(d/2) for half-integer powers, e^d otherwise.
  const float scale = static_cast<float>(kLog2E / params.temperature * (kHalves ? 0.5 : 1.0));
  const float pow_scale = static_cast<float>(kLog2E / params.temperature * params.alpha);
  const F32 center = splat(s.max == -kInfinity ? 0.0f : s.max);
  const F32 lowest = splat(-kMaxNegativeExponent / scale);
  const F32 exponent_lowest = splat(-kMaxNegativeExponent);
  const F32 scales = splat(scale), pow_scales = splat(pow_scale), ones = splat(1.0f);
  F32 sum[kUnroll], pow_sum[kUnroll], dot[kUnroll];
  for (int u = 0; u < kUnroll; ++u) sum[u] = pow_sum[u] = dot[u] = splat(0.0f);
  for (int i = 0; i < s.n; i += kStep) {
    next.step(i);
    F32 x[kUnroll], d[kUnroll], e[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      x[u] = load(s.x + i + u * F32::kWidth);
      // Second argument of max: a NaN stays. With a finite d, 0 * d is 0.
      d[u] = max(lowest, x[u] - center);
    }
    exp2_scaled(d, scales, e);
    for (int u = 0; u < kUnroll; ++u) {
      const F32 p = kHalves ? e[u] * e[u] : e[u];
      sum[u] = sum[u] + p;
      if constexpr (kEntropy) dot[u] = fma(p, d[u], dot[u]);
      if constexpr (kTwiceAlpha == 0) {
        pow_sum[u] = pow_sum[u] + where_less(splat(-kInfinity), x[u], ones, splat(0.0f));
      } else if constexpr (kHalves) {
        pow_sum[u] = add_power<kTwiceAlpha>(e[u], pow_sum[u]);
      } else if constexpr (kTwiceAlpha != kSecondExp && kTwiceAlpha != 2) {
        pow_sum[u] = add_power<kTwiceAlpha / 2>(e[u], pow_sum[u]);
      }
    }
    if constexpr (kTwiceAlpha == kSecondExp) {
      for (int u = 0; u < kUnroll; ++u) {
        d[u] = max(exponent_lowest, (x[u] - center) * pow_scales);
      }
      exp2_scaled(d, ones, e);
      for (int u = 0; u < kUnroll; ++u) pow_sum[u] = pow_sum[u] + e[u];
    }
  }
  out->max = s.max;
  out->sum = sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  out->pow_sum = sum_of_lanes((pow_sum[0] + pow_sum[1]) + (pow_sum[2] + pow_sum[3]));
  out->dot = sum_of_lanes((dot[0] + dot[1]) + (dot[2] + dot[3]));
}

template <DType dtype, int kTwiceAlpha, bool kEntropy>
void stats(const void* row, int64_t vocab, int64_t first, int64_t last, const RowParams& params,
           SliceStats* out) {
  alignas(64) float buffers[2][kSliceV];
  const float cap = static_cast<float>(params.softcap);
  const char* data = static_cast<const char*>(row);
  const auto slice_at = [&](int64_t i) { return data + i * kSliceV * element_size(dtype); };
  const auto staged = [&](int64_t i) {
    const int64_t left = vocab - i * kSliceV;
    const int n = static_cast<int>(left < kSliceV ? left : kSliceV);
    return stage<dtype>(slice_at(i), n, kNoEntry, cap, buffers[i % 2]);
  };
  Staged current = staged(first);
  for (int64_t i = first; i < last; ++i) {
    const bool next_is_whole = (i + 2) * kSliceV <= vocab;
    if (i + 1 < last && next_is_whole && cap == 0.0f) {
      Takeover<dtype> next(slice_at(i + 1), buffers[(i + 1) % 2]);
      sums<kTwiceAlpha, kEntropy>(current, params, next, out + i);
      current = next.staged(kSliceV);
    } else {
      NoTakeover none;
      sums<kTwiceAlpha, kEntropy>(current, params, none, out + i);
      if (i + 1 < last) current = staged(i + 1);
    }
  }
}

using Stats = void (*)(const void*, int64_t, int64_t, int64_t, const RowParams&, SliceStats*);

template <DType dtype, bool kEntropy>
PK_INLINE Stats pick_stats(double alpha) {
  static constexpr Stats kTable[kMaxTwiceAlpha + 1] = {
      stats<dtype, 0, kEntropy>,  stats<dtype, 1, kEntropy>,  stats<dtype, 2, kEntropy>,
      stats<dtype, 3, kEntropy>,  stats<dtype, 4, kEntropy>,  stats<dtype, 5, kEntropy>,
      stats<dtype, 6, kEntropy>,  stats<dtype, 7, kEntropy>,  stats<dtype, 8, kEntropy>,
      stats<dtype, 9, kEntropy>,  stats<dtype, 10, kEntropy>, stats<dtype, 11, kEntropy>,
      stats<dtype, 12, kEntropy>, stats<dtype, 13, kEntropy>, stats<dtype, 14, kEntropy>,
      stats<dtype, 15, kEntropy>, stats<dtype, 16, kEntropy>};
  const double twice = 2.0 * alpha;
  if (twice > kMaxTwiceAlpha || twice != static_cast<int>(twice)) {
    return stats<dtype, kSecondExp, kEntropy>;
  }
  return kTable[static_cast<int>(twice)];
}

template <DType dtype>
void any_stats(const void* row, int64_t vocab, int64_t first, int64_t last, const RowParams& params,
               SliceStats* out) {
  const Stats picked = params.entropy ? pick_stats<dtype, true>(params.alpha)
                                      : pick_stats<dtype, false>(params.alpha);
  picked(row, vocab, first, last, params, out);
}

template <DType dtype>
double masses(const void* x, int n, int hidden, const RowParams& params, double* mass) {
  alignas(64) float buffer[kSliceV];
  alignas(64) float out[kSliceV];
  const Staged s = stage<dtype>(x, n, hidden, static_cast<float>(params.softcap), buffer);
  const F32 center = splat(s.max == -kInfinity ? 0.0f : s.max);
  const F32 scales = splat(static_cast<float>(kLog2E / params.temperature * params.alpha));
  const F32 exponent_lowest = splat(-kMaxNegativeExponent), ones = splat(1.0f);
  for (int i = 0; i < s.n; i += F32::kWidth) {
    const F32 x = load(s.x + i);
    const F32 mass_of_x = params.alpha == 0.0
                              ? where_less(splat(-kInfinity), x, ones, splat(0.0f))
                              : exp2_scaled(max(exponent_lowest, (x - center) * scales), ones);
    store(out + i, mass_of_x);
  }
  for (int i = 0; i < n; ++i) mass[i] = out[i];
  return s.max;
}

template <DType dtype>
constexpr SliceKernels kKernels = {any_stats<dtype>, masses<dtype>};

}  // namespace

const SliceKernels& slice_kernels(DType dtype) {
  if (dtype == DType::bfloat16) return kKernels<DType::bfloat16>;
  if (dtype == DType::float16) return kKernels<DType::float16>;
  return kKernels<DType::float32>;
}

}  // namespace PK_SIMD
}  // namespace powerkernels
