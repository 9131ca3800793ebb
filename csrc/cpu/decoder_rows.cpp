// What a decoder step does to rows between its products. Compiled once per SIMD level.
//
// Rows are floats that hold values of the model's dtype; every result is rounded to it where an
// operator of torch would have stored it.
#include "powerkernels/simd.h"

namespace powerkernels {
namespace PK_SIMD {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;

template <DType dtype>
PK_INLINE F32 rounded(F32 x) {
  if constexpr (dtype == DType::float32) {
    return x;
  } else {
    alignas(32) uint16_t stored[F32::kWidth];
    store_bfloat16(stored, x);
    return load_bfloat16(stored);
  }
}

// Elements i and on of n; a vector that is not whole goes through memory, missing ones as zeros.
template <DType dtype>
PK_INLINE F32 load_some(const void* x, int64_t i, int64_t n) {
  if (i + F32::kWidth <= n) return load_as<dtype>(x, i);
  alignas(64) float lanes[F32::kWidth];
  for (int64_t j = 0; j < F32::kWidth; ++j) lanes[j] = i + j < n ? load_one<dtype>(x, i + j) : 0.0f;
  return load(lanes);
}

template <DType dtype>
PK_INLINE void store_some(void* out, int64_t i, int64_t n, F32 value) {
  if (i + F32::kWidth <= n) return store_as<dtype>(out, i, value);
  alignas(64) float lanes[F32::kWidth];
  store(lanes, value);
  for (int64_t j = 0; i + j < n; ++j) store_one<dtype>(out, i + j, lanes[j]);
}

constexpr DType kFloats = DType::float32;

// A linear layer's sums with their bias, as the layer stores them.
template <DType dtype>
PK_INLINE F32 linear_output(const float* sums, const void* bias, int64_t i, int64_t n) {
  F32 sum = load_some<kFloats>(sums, i, n);
  if (bias != nullptr) sum = sum + load_some<dtype>(bias, i, n);
  return rounded<dtype>(sum);
}

// x / (1 + e^-x)
PK_INLINE F32 silu(F32 x) {
  // e^-x is kept below 2^126: there the result is within |x| · 2^-126 of 0.
  const F32 exponent = max(splat(-126.0f), splat(0.0f) - max(splat(-126.0f), x * splat(kLog2E)));
  return x / (splat(1.0f) + exp2_scaled(exponent, splat(1.0f)));
}

template <DType dtype>
void normalize_as(const float* x, const void* weight, int64_t n, float epsilon, float* out) {
  F32 squares = splat(0.0f);
  for (int64_t i = 0; i < n; i += F32::kWidth) {
    const F32 part = load_some<kFloats>(x, i, n);
    squares = fma(part, part, squares);
  }
  const float mean = static_cast<float>(sum_of_lanes(squares) / static_cast<double>(n));
  const F32 factor = splat(1.0f / __builtin_sqrtf(mean + epsilon));
  for (int64_t i = 0; i < n; i += F32::kWidth) {
    const F32 scaled = rounded<dtype>(load_some<kFloats>(x, i, n) * factor);
    store_some<kFloats>(out, i, n, rounded<dtype>(load_some<dtype>(weight, i, n) * scaled));
  }
}

template <DType dtype>
void rotate_as(const float* x, const float* cos, const float* sin, int64_t n, void* out) {
  const int64_t half = n / 2;
  const auto turned = [&](int64_t i, int64_t end, F32 other) {
    const F32 kept =
        rounded<dtype>(load_some<kFloats>(x, i, end) * load_some<kFloats>(cos, i, end));
    const F32 crossed = rounded<dtype>(other * load_some<kFloats>(sin, i, end));
    store_some<dtype>(out, i, end, kept + crossed);
  };
  for (int64_t i = 0; i < half; i += F32::kWidth) {
    turned(i, half, splat(0.0f) - load_some<kFloats>(x + half, i, half));
  }
  for (int64_t i = 0; i < half; i += F32::kWidth) {
    turned(half + i, n, load_some<kFloats>(x, i, half));
  }
}

template <DType dtype>
void round_sums_as(const float* sums, const void* bias, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += F32::kWidth) {
    store_some<kFloats>(out, i, n, linear_output<dtype>(sums, bias, i, n));
  }
}

template <DType dtype>
void add_sums_as(const float* sums, const void* bias, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += F32::kWidth) {
    const F32 sum = load_some<kFloats>(out, i, n) + linear_output<dtype>(sums, bias, i, n);
    store_some<kFloats>(out, i, n, rounded<dtype>(sum));
  }
}

template <DType dtype>
void gate_sums_as(const float* gate, const void* gate_bias, const float* up, const void* up_bias,
                  int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += F32::kWidth) {
    const F32 open = rounded<dtype>(silu(linear_output<dtype>(gate, gate_bias, i, n)));
    const F32 product = open * linear_output<dtype>(up, up_bias, i, n);
    store_some<kFloats>(out, i, n, rounded<dtype>(product));
  }
}

template <DType dtype>
void narrow_as(const float* x, int64_t n, void* out) {
  for (int64_t i = 0; i < n; i += F32::kWidth) {
    store_some<dtype>(out, i, n, load_some<kFloats>(x, i, n));
  }
}

}  // namespace

#define PK_OF_DTYPE(function, ...)                                   \
  (dtype == DType::bfloat16 ? function<DType::bfloat16>(__VA_ARGS__) \
                            : function<DType::float32>(__VA_ARGS__))

// out = the outputs of a linear layer.
void round_sums(DType dtype, const float* sums, const void* bias, int64_t n, float* out) {
  PK_OF_DTYPE(round_sums_as, sums, bias, n, out);
}

// out += the outputs of a linear layer.
void add_sums(DType dtype, const float* sums, const void* bias, int64_t n, float* out) {
  PK_OF_DTYPE(add_sums_as, sums, bias, n, out);
}

// out = silu(the outputs of one layer) times those of another.
void gate_sums(DType dtype, const float* gate, const void* gate_bias, const float* up,
               const void* up_bias, int64_t n, float* out) {
  PK_OF_DTYPE(gate_sums_as, gate, gate_bias, up, up_bias, n, out);
}

// out = weight · x / sqrt(mean(x²) + epsilon)
void normalize(DType dtype, const float* x, const void* weight, int64_t n, float epsilon,
               float* out) {
  PK_OF_DTYPE(normalize_as, x, weight, n, epsilon, out);
}

// The rotary embedding of one head, its halves the pairs' coordinates; cos and sin [n].
void rotate(DType dtype, const float* x, const float* cos, const float* sin, int64_t n, void* out) {
  PK_OF_DTYPE(rotate_as, x, cos, sin, n, out);
}

void narrow(DType dtype, const float* x, int64_t n, void* out) {
  PK_OF_DTYPE(narrow_as, x, n, out);
}

}  // namespace PK_SIMD
}  // namespace powerkernels
