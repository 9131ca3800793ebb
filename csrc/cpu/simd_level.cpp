#include "powerkernels/simd_level.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace powerkernels {
namespace {

constexpr int kUnset = -1;
std::atomic<int> chosen{kUnset};

SimdLevel parse(const char* name) {
  for (SimdLevel level : {SimdLevel::baseline, SimdLevel::avx2, SimdLevel::avx512}) {
    if (std::strcmp(name, simd_level_name(level)) != 0) continue;
    if (level > highest_simd_level()) {
      throw std::invalid_argument(
          std::string("SIMD level ") + name +
          " is above what this CPU and build have: " + simd_level_name(highest_simd_level()));
    }
    return level;
  }
  throw std::invalid_argument(std::string("SIMD level must be baseline, avx2 or avx512, got ") +
                              name);
}

}  // namespace

const char* simd_level_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::avx512:
      return "avx512";
    case SimdLevel::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

SimdLevel highest_simd_level() {
#if defined(POWERKERNELS_X86)
  static const SimdLevel highest = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c")) {
      return SimdLevel::baseline;
    }
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
      return SimdLevel::avx2;
    }
    return SimdLevel::avx512;
  }();
  return highest;
#else
  return SimdLevel::baseline;
#endif
}

SimdLevel simd_level() {
  int level = chosen.load(std::memory_order_relaxed);
  if (level == kUnset) {
    const char* wanted = std::getenv("POWERKERNELS_SIMD");
    const bool given = wanted != nullptr && *wanted != '\0';
    level = static_cast<int>(given ? parse(wanted) : highest_simd_level());
    chosen.store(level, std::memory_order_relaxed);
  }
  return static_cast<SimdLevel>(level);
}

void set_simd_level(const char* name) {
  chosen.store(static_cast<int>(parse(name)), std::memory_order_relaxed);
}

}  // namespace powerkernels
