// Which instruction set the SIMD files run with.
#pragma once

namespace powerkernels {

enum class SimdLevel : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The level in use: the highest that this CPU and this build have, or the one set below or with the
// environment variable POWERKERNELS_SIMD=baseline|avx2|avx512.
SimdLevel simd_level();
SimdLevel highest_simd_level();
const char* simd_level_name(SimdLevel level);

// Throws std::invalid_argument for an unknown name or a level that this CPU lacks.
void set_simd_level(const char* name);

}  // namespace powerkernels

// Declares, outside a SIMD file, what that file defines once per level:
//   PK_SIMD_DECLARE(const SliceKernels& slice_kernels())
// and picks the one in use:
//   PK_SIMD_PICK(slice_kernels)()
#if defined(POWERKERNELS_X86)
#define PK_SIMD_DECLARE(...) \
  namespace baseline {       \
  __VA_ARGS__;               \
  }                          \
  namespace avx2 {           \
  __VA_ARGS__;               \
  }                          \
  namespace avx512 {         \
  __VA_ARGS__;               \
  }
#define PK_SIMD_PICK(name)                                                          \
  (::powerkernels::simd_level() == ::powerkernels::SimdLevel::avx512 ? avx512::name \
   : ::powerkernels::simd_level() == ::powerkernels::SimdLevel::avx2 ? avx2::name   \
                                                                     : baseline::name)
#else
#define PK_SIMD_DECLARE(...) \
  namespace baseline {       \
  __VA_ARGS__;               \
  }
#define PK_SIMD_PICK(name) (baseline::name)
#endif
