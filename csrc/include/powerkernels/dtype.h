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

}  // namespace powerkernels
