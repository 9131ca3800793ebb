// Element types of logits, as numbered in powerkernels/_extension.py.
#pragma once

#include <cstdint>
#include <cstring>

namespace powerkernels {

// `static`: a SIMD file's copy must never be the one that the linker keeps for all.

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

static inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return 8;
    case DType::float32:
      return 4;
    default:
      return 2;
  }
}

// Element i of an array; null stays null.
static inline const void* element(const void* base, DType dtype, int64_t i) {
  return base == nullptr ? nullptr : static_cast<const char*>(base) + i * element_size(dtype);
}

static inline void* element(void* base, DType dtype, int64_t i) {
  return base == nullptr ? nullptr : static_cast<char*>(base) + i * element_size(dtype);
}

static inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline float bfloat16_to_float(uint16_t bits) {
  return float_from_bits(static_cast<uint32_t>(bits) << 16);
}

static inline float float16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity and NaN
    return float_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  // Shifted into place the exponent is 112 too small; a product repairs it, subnormals included.
  const float scaled = float_from_bits(magnitude << 13) * 0x1p112f;
  uint32_t value;
  std::memcpy(&value, &scaled, sizeof(value));
  return float_from_bits(sign | value);
}

// Element i of a row as a double.
static inline double load_as_double(const void* row, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float64:
      return static_cast<const double*>(row)[i];
    case DType::float32:
      return static_cast<const float*>(row)[i];
    case DType::bfloat16:
      return bfloat16_to_float(static_cast<const uint16_t*>(row)[i]);
    default:
      return float16_to_float(static_cast<const uint16_t*>(row)[i]);
  }
}

static inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// To nearest, ties to even; a NaN stays one.
static inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline uint16_t float_to_float16(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude >= 0x7f800000u) {  // infinity and NaN
    half = 0x7c00u | (magnitude > 0x7f800000u ? 0x200u | ((magnitude >> 13) & 0x3ffu) : 0u);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below the normal numbers: the sum's last bit is 2^-24
    half = bits_of_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

static inline void store_double(void* row, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case DType::float64:
      static_cast<double*>(row)[i] = value;
      return;
    case DType::float32:
      static_cast<float*>(row)[i] = static_cast<float>(value);
      return;
    case DType::bfloat16:
      static_cast<uint16_t*>(row)[i] = float_to_bfloat16(static_cast<float>(value));
      return;
    default:
      static_cast<uint16_t*>(row)[i] = float_to_float16(static_cast<float>(value));
  }
}

}  // namespace powerkernels
