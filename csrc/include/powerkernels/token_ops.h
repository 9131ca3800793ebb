// The CPU ops on tokens: covariance, selection, losses. All arrays are contiguous.
#pragma once

#include <cstdint>
#include <vector>

#include "powerkernels/token_block.h"

namespace powerkernels {

struct FloatArray {
  const void* data;  // null: missing
  DType dtype;       // not float64
};

// N tokens of num_rows sequences: padded to `width` each, or with bounds [num_rows + 1].
struct TokenRows {
  int64_t num_tokens;
  int64_t num_rows;
  int64_t width;
  const int64_t* bounds;  // null: padded
};

struct TokenArrays {
  TokenRows rows;
  FloatArray log_prob;
  FloatArray old_log_prob;
  FloatArray advantages;
  const uint8_t* mask;
  const uint8_t* selectable;
};

// What the keys of a selection are made from; see covariance/reference.py.
struct SelectionKeys {
  TokenArrays tokens;
  const double* moments;
  bool band;
  float lb, ub;
  uint64_t seed;
  int64_t first_sequence;
  const int64_t* sequence_index;  // [num_rows], or null
};

struct SelectionState {
  int64_t threshold, remaining, chosen, num_nonzero;
};

// Selectable tokens whose loss PPO's clipping of the ratio to [low, high] leaves alone.
struct UnclippedOutput {
  float low, high;
  uint8_t* mask;  // null: not wanted
};

void cov_moments(const TokenArrays& tokens, const UnclippedOutput& unclipped, double* moments,
                 int num_threads);
void cov_tokens(const TokenArrays& tokens, const double* moments, float* cov, int num_threads);
// The keys [num_tokens], and the counts [kNumBins + 1] of their first digit.
void cov_keys(const SelectionKeys& keys, uint32_t* values, int64_t* counts, int num_threads);
// state: null before the first digit.
SelectionState cov_narrow(const int64_t* counts, const double* moments, double ratio, int64_t k,
                          const SelectionState* state, int digit);
// The tokens whose keys begin with the threshold's first digit or a higher one: all that the stages
// after it have to look at.
class KeyCandidates {
 public:
  KeyCandidates(const uint32_t* values, int64_t num_tokens, uint32_t first_digit, int num_threads);

  // counts [kNumBins + 1] of a later digit, among the keys whose bits above it are the prefix.
  void histogram(uint32_t prefix, int digit, int64_t* counts) const;
  // out: bytes, 0 before.
  void mark(const SelectionState& state, int64_t ties_before, uint8_t* out) const;

 private:
  struct Candidate {
    int64_t token;
    uint32_t key;
  };

  template <typename Fn>
  void for_each(const Fn& fn) const {
    for (const auto& task : tasks_) {
      for (const Candidate& candidate : task) fn(candidate);
    }
  }

  std::vector<std::vector<Candidate>> tasks_;  // by token
};

constexpr int kNumDigits = 3;
constexpr int kDigitShift[kNumDigits] = {21, 10, 0};
constexpr int kDigitBits[kNumDigits] = {11, 11, 10};
constexpr int kNumBins = 2048;

struct LossInputs {
  TokenArrays tokens;
  FloatArray weights;
  const uint8_t* selected;
  const double* moments;
};

struct LossOutputs {
  double* row_loss;   // [num_rows]
  double* row_count;  // [num_rows]
  double* sums;       // [kNumLossColumns]
  float* terms;       // [num_tokens]
};

void policy_loss_sums(const LossInputs& inputs, const LossObjective& objective,
                      const LossOutputs& outputs, int num_threads);

// Means of log_prob and advantages; NaN where a token is not finite, or there is none.
CovMeans cov_means(const double* moments);

}  // namespace powerkernels
