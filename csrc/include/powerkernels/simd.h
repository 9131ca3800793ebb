// A vector of floats for the SIMD files: F32 has kWidth lanes of the level that the file is
// compiled for. Only SIMD files include this (see powerkernels_simd_source in CMakeLists.txt); it
// lives in a namespace per level and uses no standard templates.
#pragma once

#include <cstdint>

#include "powerkernels/dtype.h"

#if defined(PK_SIMD_avx2) || defined(PK_SIMD_avx512)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <xmmintrin.h>
#endif

#define PK_INLINE inline __attribute__((always_inline))

namespace powerkernels {
namespace PK_SIMD {

#if defined(PK_SIMD_avx512)

struct F32 {
  static constexpr int kWidth = 16;
  __m512 v;
};
PK_INLINE F32 splat(float x) { return {_mm512_set1_ps(x)}; }
PK_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
PK_INLINE F32 load_bfloat16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
PK_INLINE F32 load_float16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
PK_INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
PK_INLINE void store_bfloat16(uint16_t* p, F32 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  __m512i sum = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  sum = _mm512_mask_add_epi32(sum, odd, sum, _mm512_set1_epi32(1));
  sum = _mm512_mask_or_epi32(sum, nan, bits, _mm512_set1_epi32(0x400000));
  const __m512i rounded = _mm512_srli_epi32(sum, 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
PK_INLINE void store_float16(uint16_t* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PK_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
PK_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
PK_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
PK_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
PK_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The larger; b where a is NaN or b is NaN.
PK_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
PK_INLINE F32 fms(F32 a, F32 b, F32 c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
PK_INLINE F32 low_bits_as_exponent(F32 a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
}
PK_INLINE F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
PK_INLINE F32 where_less(F32 a, F32 b, F32 yes, F32 no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
// Writes the lanes that are >= bound in their order, and returns their number; whatever follows
// them in the kWidth places from p on.
PK_INLINE int store_at_least(float* p, F32 a, F32 bound) {
  const __mmask16 kept = _mm512_cmp_ps_mask(a.v, bound.v, _CMP_GE_OQ);
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(kept, a.v));
  return __builtin_popcount(kept);
}
PK_INLINE float max_of_lanes(F32 a) { return _mm512_reduce_max_ps(a.v); }
// Four sums of lanes, as doubles, whose sum is that of all.
PK_INLINE __m256d sums_of_quarters(F32 a) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
  const __m512d sum = _mm512_add_pd(low, high);
  return _mm256_add_pd(_mm512_castpd512_pd256(sum), _mm512_extractf64x4_pd(sum, 1));
}

#elif defined(PK_SIMD_avx2)

struct F32 {
  static constexpr int kWidth = 8;
  __m256 v;
};
PK_INLINE F32 splat(float x) { return {_mm256_set1_ps(x)}; }
PK_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
PK_INLINE F32 load_bfloat16(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
PK_INLINE F32 load_float16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
PK_INLINE void store(float* p, F32 a) { _mm256_storeu_ps(p, a.v); }
PK_INLINE void store_bfloat16(uint16_t* p, F32 a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i upper = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), nan, is_nan);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}
PK_INLINE void store_float16(uint16_t* p, F32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PK_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
PK_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
PK_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
PK_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
PK_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
PK_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
PK_INLINE F32 fms(F32 a, F32 b, F32 c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
PK_INLINE F32 low_bits_as_exponent(F32 a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
}
PK_INLINE F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
PK_INLINE F32 where_less(F32 a, F32 b, F32 yes, F32 no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
PK_INLINE int store_at_least(float* p, F32 a, F32 bound) {
  const int kept = _mm256_movemask_ps(_mm256_cmp_ps(a.v, bound.v, _CMP_GE_OQ));
  if (kept == 0) return 0;
  alignas(32) float lanes[F32::kWidth];
  store(lanes, a);
  int count = 0;
  for (int i = 0; i < F32::kWidth; ++i) {
    p[count] = lanes[i];
    count += (kept >> i) & 1;
  }
  return count;
}
PK_INLINE float max_of_lanes(F32 a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
PK_INLINE __m256d sums_of_quarters(F32 a) {
  return _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)),
                       _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)));
}

#else

// The vectors of GCC and Clang, which split them into what the machine has.
struct F32 {
  static constexpr int kWidth = 8;
  typedef float Floats __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(32)));
  Floats v;
};
PK_INLINE F32 splat(float x) { return {F32::Floats{x, x, x, x, x, x, x, x}}; }
PK_INLINE F32 load(const float* p) {
  F32 out;
  __builtin_memcpy(&out.v, p, sizeof(out.v));
  return out;
}
PK_INLINE F32 load_bfloat16(const uint16_t* p) {
  return {(F32::Floats)(F32::Words{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]} << 16)};
}
PK_INLINE F32 load_float16(const uint16_t* p) {
  F32 out;
  for (int i = 0; i < F32::kWidth; ++i) out.v[i] = float16_to_float(p[i]);
  return out;
}
PK_INLINE void store(float* p, F32 a) { __builtin_memcpy(p, &a.v, sizeof(a.v)); }
PK_INLINE void store_bfloat16(uint16_t* p, F32 a) {
  for (int i = 0; i < F32::kWidth; ++i) p[i] = float_to_bfloat16(a.v[i]);
}
PK_INLINE void store_float16(uint16_t* p, F32 a) {
  for (int i = 0; i < F32::kWidth; ++i) p[i] = float_to_float16(a.v[i]);
}
PK_INLINE F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
PK_INLINE F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
PK_INLINE F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
PK_INLINE F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
PK_INLINE F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }  // rounded twice
PK_INLINE F32 fms(F32 a, F32 b, F32 c) { return {a.v * b.v - c.v}; }
PK_INLINE F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
PK_INLINE F32 low_bits_as_exponent(F32 a) { return {(F32::Floats)((F32::Words)a.v << 23)}; }
PK_INLINE F32 abs(F32 a) { return {(F32::Floats)((F32::Words)a.v & 0x7fffffffu)}; }
PK_INLINE F32 where_less(F32 a, F32 b, F32 yes, F32 no) { return {a.v < b.v ? yes.v : no.v}; }
PK_INLINE int store_at_least(float* p, F32 a, F32 bound) {
  int count = 0;
  for (int i = 0; i < F32::kWidth; ++i) {
    const float lane = a.v[i];
    p[count] = lane;
    count += lane >= bound.v[i];
  }
  return count;
}
PK_INLINE float max_of_lanes(F32 a) {
  float best = a.v[0];
  for (int i = 1; i < F32::kWidth; ++i) best = a.v[i] > best ? a.v[i] : best;
  return best;
}
PK_INLINE double sum_of_lanes(F32 a) {
  double sum = 0.0;
  for (int i = 0; i < F32::kWidth; ++i) sum += a.v[i];
  return sum;
}
PK_INLINE void store_sums_of_lanes(float* p, const F32 (&a)[4]) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<float>(sum_of_lanes(a[i]));
}

#endif

#if defined(PK_SIMD_avx512) || defined(PK_SIMD_avx2)
// Lanes are added as doubles, in a fixed tree.
PK_INLINE double sum_of_lanes(F32 a) {
  const __m256d sum = sums_of_quarters(a);
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(sum), _mm256_extractf128_pd(sum, 1));
  return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
}
// sum_of_lanes of four vectors, rounded to float: the same tree for each, so the same bits.
PK_INLINE void store_sums_of_lanes(float* p, const F32 (&a)[4]) {
  const auto pairs = [](__m256d x, __m256d y) {  // two sums of x, then two of y
    return _mm256_add_pd(_mm256_permute2f128_pd(x, y, 0x20), _mm256_permute2f128_pd(x, y, 0x31));
  };
  const __m256d even = pairs(sums_of_quarters(a[0]), sums_of_quarters(a[2]));
  const __m256d odd = pairs(sums_of_quarters(a[1]), sums_of_quarters(a[3]));
  _mm_storeu_ps(p, _mm256_cvtpd_ps(_mm256_hadd_pd(even, odd)));
}
#endif

// While it lives, results below the normal numbers are 0: powers of a small exponential end there,
// where x86 is a hundred times slower. Such inputs keep their value.
class FlushToZero {
 public:
#if defined(__SSE2__)
  FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  FlushToZero() {}
#endif
};

// Elements i and on of an array of any dtype but float64.
template <DType dtype>
PK_INLINE F32 load_as(const void* x, int64_t i) {
  if constexpr (dtype == DType::float32) {
    return load(static_cast<const float*>(x) + i);
  } else if constexpr (dtype == DType::bfloat16) {
    return load_bfloat16(static_cast<const uint16_t*>(x) + i);
  } else {
    return load_float16(static_cast<const uint16_t*>(x) + i);
  }
}

template <DType dtype>
PK_INLINE float load_one(const void* x, int64_t i) {
  if constexpr (dtype == DType::float32) {
    return static_cast<const float*>(x)[i];
  } else if constexpr (dtype == DType::bfloat16) {
    return bfloat16_to_float(static_cast<const uint16_t*>(x)[i]);
  } else {
    return float16_to_float(static_cast<const uint16_t*>(x)[i]);
  }
}

template <DType dtype>
PK_INLINE void store_as(void* out, int64_t i, F32 value) {
  if constexpr (dtype == DType::float32) {
    store(static_cast<float*>(out) + i, value);
  } else if constexpr (dtype == DType::bfloat16) {
    store_bfloat16(static_cast<uint16_t*>(out) + i, value);
  } else {
    store_float16(static_cast<uint16_t*>(out) + i, value);
  }
}

template <DType dtype>
PK_INLINE void store_one(void* out, int64_t i, float value) {
  if constexpr (dtype == DType::float32) {
    static_cast<float*>(out)[i] = value;
  } else if constexpr (dtype == DType::bfloat16) {
    static_cast<uint16_t*>(out)[i] = float_to_bfloat16(value);
  } else {
    static_cast<uint16_t*>(out)[i] = float_to_float16(value);
  }
}

// 2^-kMaxNegativeExponent and what is below the normal numbers is flushed to zero.
constexpr float kMaxNegativeExponent = 127.0f;

// 2^(x * scale) for -kMaxNegativeExponent <= x * scale <= 127, within 2 ulp. 2^0 is exactly 1, and
// 2^-kMaxNegativeExponent exactly 0. A NaN stays one.
// The polynomial is the minimax one of its degree on [-1/2, 1/2], by relative error (1.1e-7).
// kCount vectors go through every step together, for the pipelines' sake.
template <int kCount>
PK_INLINE void exp2_scaled(const F32 (&x)[kCount], F32 scale, F32 (&out)[kCount]) {
  constexpr float kCoefficients[] = {9.6716191e-3f, 5.5507350e-2f, 2.4022240e-1f, 6.9314698e-1f,
                                     1.0f};
  // Adding 1.5 * 2^23 rounds to an integer n and leaves it in the low bits; the 127 on top is the
  // bias of float32's exponent.
  const F32 shift = splat(0x1.8p23f + 127.0f);
  F32 shifted[kCount], r[kCount];
  for (int u = 0; u < kCount; ++u) shifted[u] = fma(x[u], scale, shift);
  for (int u = 0; u < kCount; ++u) r[u] = fms(x[u], scale, shifted[u] - shift);
  for (int u = 0; u < kCount; ++u) out[u] = splat(1.3264591e-3f);
  for (const float c : kCoefficients) {
    for (int u = 0; u < kCount; ++u) out[u] = fma(out[u], r[u], splat(c));
  }
  for (int u = 0; u < kCount; ++u) out[u] = out[u] * low_bits_as_exponent(shifted[u]);
}

PK_INLINE F32 exp2_scaled(F32 x, F32 scale) {
  const F32 in[1] = {x};
  F32 out[1];
  exp2_scaled(in, scale, out);
  return out[0];
}

}  // namespace PK_SIMD
}  // namespace powerkernels
