// Moments of log-probability and advantage, covariances, and the stages of the exact selection.
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "powerkernels/token_tasks.h"

namespace powerkernels {
namespace {

constexpr uint32_t kStream = 0x436F7631u;  // the last word of a token's counter

// Random keys of the eligible tokens of a task, which come in order.
class RandomKeys {
 public:
  RandomKeys(const SelectionKeys& keys, const TokenKernels& kernels)
      : keys_(keys), kernels_(kernels), rows_(keys.tokens.rows) {}

  // Keys for the tokens first + place[0], ..., 0 for the others of the n.
  void make(int64_t first, int64_t n, const int32_t* place, int64_t num_eligible,
            uint32_t* values) {
    std::fill_n(values, n, 0u);
    if (num_eligible == 0) return;
    if (row_ < 0) enter(row_of(rows_, first + place[0]));
    for (int64_t i = 0; i < num_eligible; ++i) {
      const int64_t token = first + place[i];
      while (token >= row_end_) enter(row_ + 1);
      position_[i] = static_cast<uint32_t>(token - row_begin_);
      number_low_[i] = static_cast<uint32_t>(number_);
      number_high_[i] = static_cast<uint32_t>(number_ >> 32);
    }
    kernels_.philox(position_, number_low_, number_high_, kStream, keys_.seed, num_eligible,
                    words_);
    for (int64_t i = 0; i < num_eligible; ++i) values[place[i]] = std::max(words_[i], 1u);
  }

 private:
  void enter(int64_t row) {
    row_ = row;
    row_begin_ = row_begin(rows_, row);
    row_end_ = row_begin(rows_, row + 1);
    number_ =
        keys_.sequence_index != nullptr ? keys_.sequence_index[row] : keys_.first_sequence + row;
  }

  const SelectionKeys& keys_;
  const TokenKernels& kernels_;
  const TokenRows& rows_;
  int64_t row_ = -1, row_begin_ = 0, row_end_ = 0, number_ = 0;
  uint32_t position_[kTokenBlock], number_low_[kTokenBlock], number_high_[kTokenBlock],
      words_[kTokenBlock];
};

// Bins that tasks add to, in whatever order.
class Histogram {
 public:
  Histogram() : counts_(kNumBins + 1) {
    for (auto& count : counts_) count.store(0, std::memory_order_relaxed);
  }
  void add(int64_t bin, int64_t value) {
    if (value != 0) counts_[static_cast<size_t>(bin)].fetch_add(value, std::memory_order_relaxed);
  }
  void copy_to(int64_t* counts) const {
    for (int bin = 0; bin <= kNumBins; ++bin) counts[bin] = counts_[static_cast<size_t>(bin)];
  }

 private:
  std::vector<std::atomic<int64_t>> counts_;
};

// The first digits of a task's keys. Several, so that equal neighbours need not wait for one
// another.
class TaskHistogram {
 public:
  void add(uint32_t key, int64_t i) { ++counts_[i & 3][key >> kDigitShift[0]]; }
  void clear_lowest() {
    for (auto& counts : counts_) counts[0] = 0;
  }
  void add_to(Histogram* total) const {
    for (int bin = 0; bin < kNumBins; ++bin) {
      int64_t sum = 0;
      for (const auto& counts : counts_) sum += counts[bin];
      total->add(bin, sum);
    }
  }

 private:
  static_assert(kTaskTokens <= UINT16_MAX, "a bin must hold all tokens of a task");
  uint16_t counts_[4][kNumBins] = {};
};

// Keys of blocks of tokens.
class KeyMaker {
 public:
  explicit KeyMaker(const SelectionKeys& keys)
      : keys_(keys), means_(cov_means(keys.moments)), random_(keys, reader_.kernels) {}

  // Returns the number of selectable tokens whose covariance is not 0. The first digits of the keys
  // are added to counts.
  int64_t make(int64_t first, int64_t n, uint32_t* values, TaskHistogram* counts) {
    const TokenKernels& kernels = reader_.kernels;
    const uint8_t* selectable = keys_.tokens.selectable + first;
    kernels.covariances(reader_.at(keys_.tokens, first, n), means_, cov_);
    if (keys_.band) {
      const int64_t count = kernels.in_band(cov_, selectable, n, keys_.lb, keys_.ub, place_);
      random_.make(first, n, place_, count, values);
      for (int64_t i = 0; i < count; ++i) counts->add(values[place_[i]], i);
    } else {
      kernels.cov_keys(cov_, selectable, n, values);
      for (int64_t i = 0; i < n; ++i) counts->add(values[i], i);
      counts->clear_lowest();  // a covariance's key is in it only if it is 0: none
    }
    return kernels.count_nonzero(cov_, selectable, n);
  }

 private:
  const SelectionKeys& keys_;
  CovMeans means_;
  BlockReader reader_;
  RandomKeys random_;
  int32_t place_[kTokenBlock];
  alignas(64) float cov_[kTokenBlock];
};

}  // namespace

CovMeans cov_means(const double* moments) {
  const double count = moments[1] > 0.0 ? std::numeric_limits<double>::quiet_NaN() : moments[0];
  const auto mean = [&](const double* parts) {
    return (((parts[3] + parts[2]) + parts[1]) + parts[0]) / count;
  };
  return {mean(moments + 2), mean(moments + 2 + kNumUnits)};
}

void cov_moments(const TokenArrays& tokens, const UnclippedOutput& unclipped, double* moments,
                 int num_threads) {
  const int64_t num_tasks = num_token_tasks(tokens.rows.num_tokens);
  std::vector<double> sums(static_cast<size_t>(num_tasks * kNumMoments), 0.0);
  for_token_tasks(
      tokens.rows.num_tokens, num_threads, [&](int64_t task, int64_t first, int64_t last) {
        BlockReader reader;
        for_blocks(first, last, [&](int64_t begin, int64_t n) {
          TokenBlockOf block = reader.at(tokens, begin, n);
          reader.kernels.add_moments(block, &sums[task * kNumMoments]);
          if (unclipped.mask == nullptr) return;
          block.mask = tokens.selectable + begin;
          reader.kernels.unclipped(block, unclipped.low, unclipped.high, unclipped.mask + begin);
        });
      });
  for (int m = 0; m < kNumMoments; ++m) {
    moments[m] = 0.0;
    for (int64_t task = 0; task < num_tasks; ++task) moments[m] += sums[task * kNumMoments + m];
  }
}

void cov_tokens(const TokenArrays& tokens, const double* moments, float* cov, int num_threads) {
  const CovMeans means = cov_means(moments);
  for_token_tasks(tokens.rows.num_tokens, num_threads, [&](int64_t, int64_t first, int64_t last) {
    BlockReader reader;
    for_blocks(first, last, [&](int64_t begin, int64_t n) {
      reader.kernels.covariances(reader.at(tokens, begin, n), means, cov + begin);
    });
  });
}

void cov_keys(const SelectionKeys& keys, uint32_t* values, int64_t* counts, int num_threads) {
  Histogram total;
  for_token_tasks(keys.tokens.rows.num_tokens, num_threads,
                  [&](int64_t, int64_t first, int64_t last) {
                    TaskHistogram own;
                    int64_t num_nonzero = 0;
                    KeyMaker maker(keys);
                    for_blocks(first, last, [&](int64_t begin, int64_t n) {
                      num_nonzero += maker.make(begin, n, values + begin, &own);
                    });
                    own.add_to(&total);
                    total.add(kNumBins, num_nonzero);
                  });
  total.copy_to(counts);
}

KeyCandidates::KeyCandidates(const uint32_t* values, int64_t num_tokens, uint32_t first_digit,
                             int num_threads)
    : tasks_(static_cast<size_t>(num_token_tasks(num_tokens))) {
  // No key is 0.
  const uint32_t lowest = std::max(first_digit << kDigitShift[0], 1u);
  for_token_tasks(num_tokens, num_threads, [&](int64_t task, int64_t first, int64_t last) {
    constexpr int64_t kStretch = 64;
    auto& found = tasks_[static_cast<size_t>(task)];
    for (; first < last; first += kStretch) {
      const int64_t end = std::min(first + kStretch, last);
      uint32_t num_hits = 0;
      for (int64_t i = first; i < end; ++i) num_hits += values[i] >= lowest;
      for (int64_t i = first; num_hits != 0 && i < end; ++i) {
        if (values[i] >= lowest) found.push_back({i, values[i]});
      }
    }
  });
}

void KeyCandidates::histogram(uint32_t prefix, int digit, int64_t* counts) const {
  const int shift = kDigitShift[digit], above = shift + kDigitBits[digit];
  const uint32_t last_bin = (1u << kDigitBits[digit]) - 1;
  std::fill_n(counts, kNumBins + 1, int64_t{0});
  for_each([&](const Candidate& x) {
    if (x.key >> above == prefix) ++counts[(x.key >> shift) & last_bin];
  });
}

void KeyCandidates::mark(const SelectionState& state, int64_t ties_before, uint8_t* out) const {
  const auto threshold = static_cast<uint32_t>(state.threshold);
  int64_t left = state.remaining - ties_before;
  for_each([&](const Candidate& x) {
    if (x.key > threshold) {
      out[x.token] = 1;
    } else if (x.key == threshold && left > 0) {
      out[x.token] = 1;
      --left;
    }
  });
}

SelectionState cov_narrow(const int64_t* counts, const double* moments, double ratio, int64_t k,
                          const SelectionState* state, int digit) {
  SelectionState next;
  const int num_bins = 1 << kDigitBits[digit];
  if (state == nullptr) {
    const double count = moments[0];
    double wanted = k >= 0 ? static_cast<double>(k) : std::fmax(std::floor(count * ratio), 1.0);
    if (count == 0.0 || moments[1] > 0.0) wanted = 0.0;
    int64_t total = 0;
    if (counts[kNumBins] > 0) {
      for (int bin = 0; bin < num_bins; ++bin) total += counts[bin];
    }
    const int64_t chosen = std::min(static_cast<int64_t>(wanted), total);
    next = {0, chosen, chosen, counts[kNumBins]};
  } else {
    next = *state;
  }
  int64_t above = 0;  // keys in higher bins
  int bin = num_bins - 1;
  while (bin > 0 && above + counts[bin] < next.remaining) above += counts[bin--];
  next.threshold = (next.threshold << kDigitBits[digit]) + bin;
  next.remaining -= above;
  return next;
}

}  // namespace powerkernels
