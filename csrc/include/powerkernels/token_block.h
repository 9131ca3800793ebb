// Covariance, selection and losses of up to kTokenBlock tokens: the work of the SIMD files.
#pragma once

#include <cstdint>

#include "powerkernels/dtype.h"
#include "powerkernels/simd_level.h"

namespace powerkernels {

constexpr int64_t kTokenBlock = 1024;

// As in powerkernels/covariance/reference.py: the sums' parts are multiples of these.
constexpr int kNumUnits = 4;
constexpr double kUnits[kNumUnits] = {0x1p2, 0x1p-20, 0x1p-42, 0x1p-64};
// count, nonfinite, parts of the sum of log_prob, of advantages.
constexpr int kNumMoments = 2 + 2 * kNumUnits;
// Beyond this a log-ratio is taken as this.
constexpr float kMaxLogRatio = 20.0f;
constexpr float kMaxK3 = 10.0f;

// As in powerkernels/policy_loss/objective.py.
enum class LossKind : int { policy = 0, k1 = 1, abs = 2, k2 = 3, k3 = 4, value = 5 };
enum class OnSelected : int { keep = 0, drop = 1, penalise = 2 };
enum LossColumn : int {
  kCountColumn = 0,
  kNegLogRatio,
  kAbsLogRatio,
  kK3Estimate,
  kClipped,
  kDualClipped,
  kSelectedColumn,
  kNonfinite,
  kCovariance,
  kNumLossColumns,
};

struct LossObjective {
  LossKind kind;
  bool clip;
  float low, high;
  float dual_clip;  // infinite: none
  OnSelected on_selected;
  float penalty;
  bool straight_through;
};

struct CovMeans {
  double log_prob, advantage;
};

// Of n <= kTokenBlock tokens. Masks are bytes 0 and 1. What need not be there may be null.
struct TokenBlockOf {
  int64_t n;
  const float* log_prob;
  const float* old_log_prob;
  const float* advantages;
  const float* weights;
  const uint8_t* mask;
  const uint8_t* selected;
};

struct TokenKernels {
  // n elements of any dtype but float64.
  void (*widen)(const void* x, DType dtype, int64_t n, float* out);
  // Adds to kNumMoments sums. Every addition is exact.
  void (*add_moments)(const TokenBlockOf& block, double* sums);
  // (log_prob - mean) * (advantage - mean), rounded to float; 0 where masked out, and never -0.
  void (*covariances)(const TokenBlockOf& block, const CovMeans& means, float* cov);
  // Keys in the order of the covariances; 0 for what is masked out or NaN.
  void (*cov_keys)(const float* cov, const uint8_t* selectable, int64_t n, uint32_t* keys);
  // block.mask without the tokens that PPO's clipping makes constant.
  void (*unclipped)(const TokenBlockOf& block, float low, float high, uint8_t* out);
  // Each token's loss and its derivative; adds to the columns but count and covariance.
  void (*losses)(const TokenBlockOf& block, const LossObjective& objective, float* loss,
                 float* terms, double* columns);
  // Places of the selectable tokens with lb < cov < ub, in order; returns how many.
  int64_t (*in_band)(const float* cov, const uint8_t* selectable, int64_t n, float lb, float ub,
                     int32_t* place);
  // Selectable tokens whose covariance is not 0.
  int64_t (*count_nonzero)(const float* cov, const uint8_t* selectable, int64_t n);
  // The first word of Philox4x32-10 for each counter (c0, c1, c2, c3).
  void (*philox)(const uint32_t* c0, const uint32_t* c1, const uint32_t* c2, uint32_t c3,
                 uint64_t seed, int64_t n, uint32_t* out);
  double (*sum)(const float* x, int64_t n);
  int64_t (*count)(const uint8_t* mask, int64_t n);
};

PK_SIMD_DECLARE(const TokenKernels& token_kernels())

}  // namespace powerkernels
