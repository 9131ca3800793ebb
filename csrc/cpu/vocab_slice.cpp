// The sums over one slice of a row of logits, in float32 vectors. Compiled once per SIMD level.
#include "powerkernels/vocab_slice.h"

#include <cstdint>

#include "powerkernels/slice_math.h"

namespace powerkernels {
namespace PK_SIMD {
namespace {

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
    // Hardware prefetchers stop at the end of a page, which a slice of floats is: some slices
    // ahead, into the second cache. Past the row's end a prefetch does nothing.
    constexpr int kCacheLine = 64, kSlicesAhead = 4, kRead = 0, kSecondCache = 2;
    for (int line = 0; line < kStep * kSize; line += kCacheLine) {
      __builtin_prefetch(x + (kSlicesAhead * kSliceV + i) * kSize + line, kRead, kSecondCache);
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
    F32 unused;
    for (int i = 0; i < padded; i += F32::kWidth) {
      store(buffer + i, soft_capped(load(buffer + i), cap, &unused));
    }
  }
  if (hidden != kNoEntry) buffer[hidden] = -kInfinity;
  return take_over<DType::float32>(buffer, padded, buffer);
}

template <int kTwiceAlpha, bool kEntropy, typename Next>
PK_INLINE void sums(const Staged& s, const RowParams& params, Next& next, SliceStats* out) {
  const Exponentials<kTwiceAlpha> exponentials(params);
  const F32 center = splat(s.max == -kInfinity ? 0.0f : s.max);
  F32 sum[kUnroll], pow_sum[kUnroll], dot[kUnroll];
  for (int u = 0; u < kUnroll; ++u) sum[u] = pow_sum[u] = dot[u] = splat(0.0f);
  for (int i = 0; i < s.n; i += kStep) {
    next.step(i);
    F32 x[kUnroll], d[kUnroll], finite[kUnroll], root[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      x[u] = load(s.x + i + u * F32::kWidth);
      d[u] = x[u] - center;
    }
    exponentials.roots(d, finite, root);
    for (int u = 0; u < kUnroll; ++u) {
      const F32 p = exponentials.from_root(root[u]);
      sum[u] = sum[u] + p;
      if constexpr (kEntropy) dot[u] = fma(p, finite[u], dot[u]);
      if constexpr (kTwiceAlpha == 0) {
        const F32 one = where_less(splat(-kInfinity), x[u], splat(1.0f), splat(0.0f));
        pow_sum[u] = pow_sum[u] + one;
      } else if constexpr (kTwiceAlpha != kSecondExp && kTwiceAlpha != 2) {
        pow_sum[u] = add_power<Exponentials<kTwiceAlpha>::kPower>(root[u], pow_sum[u]);
      }
    }
    if constexpr (kTwiceAlpha == kSecondExp) {
      F32 e[kUnroll];
      exponentials.second(d, e);
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
  const FlushToZero flush_to_zero;
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
  const int twice = twice_alpha_or_second_exp(alpha);
  return twice == kSecondExp ? stats<dtype, kSecondExp, kEntropy> : kTable[twice];
}

template <DType dtype>
void any_stats(const void* row, int64_t vocab, int64_t first, int64_t last, const RowParams& params,
               SliceStats* out) {
  const Stats picked = params.entropy ? pick_stats<dtype, true>(params.alpha)
                                      : pick_stats<dtype, false>(params.alpha);
  picked(row, vocab, first, last, params, out);
}

// e^(alpha*(x - center)/temperature).
struct Mass {
  bool counts;  // alpha = 0
  F32 center, scale;

  PK_INLINE Mass(float center_logit, const RowParams& params)
      : counts(params.alpha == 0.0),
        center(splat(center_logit == -kInfinity ? 0.0f : center_logit)),
        scale(splat(static_cast<float>(kLog2E / params.temperature * params.alpha))) {}

  PK_INLINE F32 of(F32 x) const {
    const F32 ones = splat(1.0f);
    if (counts) return where_less(splat(-kInfinity), x, ones, splat(0.0f));
    return exp2_scaled(max(splat(-kMaxNegativeExponent), (x - center) * scale), ones);
  }
};

template <DType dtype>
double masses(const void* x, int n, int hidden, double lowest, const RowParams& params,
              double* mass) {
  alignas(64) float buffer[kSliceV];
  alignas(64) float out[kSliceV];
  const Staged s = stage<dtype>(x, n, hidden, static_cast<float>(params.softcap), buffer);
  const Mass mass_of(s.max, params);
  const F32 bound = splat(static_cast<float>(lowest)), zero = splat(0.0f);
  for (int i = 0; i < s.n; i += F32::kWidth) {
    const F32 x = load(s.x + i);
    store(out + i, where_less(x, bound, zero, mass_of.of(x)));
  }
  for (int i = 0; i < n; ++i) mass[i] = out[i];
  return s.max < lowest ? -kInfinity : s.max;
}

template <DType dtype>
int entries_from(const void* x, int n, double lowest, double center, const RowParams& params,
                 double* entries, double* mass) {
  constexpr float kSmallest = -__FLT_MAX__;
  alignas(64) float buffer[kSliceV];
  alignas(64) float kept[kSliceV + F32::kWidth];
  alignas(64) float masses[kSliceV + F32::kWidth];
  const Staged s = stage<dtype>(x, n, kNoEntry, static_cast<float>(params.softcap), buffer);
  const F32 bound = splat(lowest < kSmallest ? kSmallest : static_cast<float>(lowest));
  int count = 0;
  for (int i = 0; i < s.n; i += F32::kWidth) {
    count += store_at_least(kept + count, load(s.x + i), bound);
  }
  for (int i = 0; i < count; ++i) entries[i] = kept[i];
  if (mass == nullptr) return count;
  for (int i = count; i < count + F32::kWidth; ++i) kept[i] = kSmallest;
  const Mass mass_of(static_cast<float>(center), params);
  for (int i = 0; i < count; i += F32::kWidth) store(masses + i, mass_of.of(load(kept + i)));
  for (int i = 0; i < count; ++i) mass[i] = masses[i];
  return count;
}

template <DType dtype>
constexpr SliceKernels kKernels = {any_stats<dtype>, masses<dtype>, entries_from<dtype>};

}  // namespace

const SliceKernels& slice_kernels(DType dtype) {
  if (dtype == DType::bfloat16) return kKernels<DType::bfloat16>;
  if (dtype == DType::float16) return kKernels<DType::float16>;
  return kKernels<DType::float32>;
}

}  // namespace PK_SIMD
}  // namespace powerkernels
