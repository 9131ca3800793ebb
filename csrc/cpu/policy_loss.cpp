// Losses of tokens, their derivatives, and the sums over sequences and over all.
#include <vector>

#include "powerkernels/token_tasks.h"

namespace powerkernels {
namespace {

// A sequence's share in a task that holds only part of it.
struct RowPart {
  int64_t row;
  double loss;
  double count;
};

// Adds up stretches of tokens by sequence. Tokens come in order; a sequence that is not all in this
// task goes to `parts`.
class RowSums {
 public:
  RowSums(const TokenRows& rows, int64_t first, int64_t last, const LossOutputs& outputs)
      : rows_(rows), first_(first), last_(last), outputs_(outputs), row_(row_of(rows, first)) {}

  void add(const TokenKernels& kernels, int64_t begin, int64_t n, const float* loss,
           const uint8_t* mask) {
    const int64_t end = begin + n;
    for (int64_t at = begin; at < end;) {
      const int64_t row_end = row_begin(rows_, row_ + 1);
      if (row_end <= at) {  // it ended with the block before, or is empty
        finish();
        continue;
      }
      const int64_t stop = std::min(end, row_end);
      loss_ += kernels.sum(loss + (at - begin), stop - at);
      count_ += static_cast<double>(kernels.count(mask + (at - begin), stop - at));
      at = stop;
    }
  }

  std::vector<RowPart> parts;

  void finish() {
    const int64_t begin = row_begin(rows_, row_), end = row_begin(rows_, row_ + 1);
    if (begin < first_ || end > last_) {
      parts.push_back({row_, loss_, count_});
    } else {
      outputs_.row_loss[row_] = loss_;
      outputs_.row_count[row_] = count_;
    }
    loss_ = count_ = 0.0;
    ++row_;
  }

 private:
  const TokenRows& rows_;
  const int64_t first_, last_;
  const LossOutputs& outputs_;
  int64_t row_;
  double loss_ = 0.0, count_ = 0.0;
};

}  // namespace

void policy_loss_sums(const LossInputs& inputs, const LossObjective& objective,
                      const LossOutputs& outputs, int num_threads) {
  const TokenRows& rows = inputs.tokens.rows;
  std::fill_n(outputs.row_loss, rows.num_rows, 0.0);
  std::fill_n(outputs.row_count, rows.num_rows, 0.0);
  std::fill_n(outputs.sums, static_cast<int>(kNumLossColumns), 0.0);
  if (rows.num_tokens == 0) return;
  const CovMeans means = inputs.moments == nullptr ? CovMeans{0.0, 0.0} : cov_means(inputs.moments);
  const auto num_tasks = static_cast<size_t>(num_token_tasks(rows.num_tokens));
  std::vector<double> sums(num_tasks * kNumLossColumns, 0.0);
  std::vector<std::vector<RowPart>> parts(num_tasks);
  for_token_tasks(rows.num_tokens, num_threads, [&](int64_t task, int64_t first, int64_t last) {
    BlockReader reader;
    RowSums by_row(rows, first, last, outputs);
    double* columns = &sums[static_cast<size_t>(task) * kNumLossColumns];
    alignas(64) float loss[kTokenBlock], cov[kTokenBlock];
    for_blocks(first, last, [&](int64_t begin, int64_t n) {
      const TokenBlockOf block = reader.at(inputs, begin, n);
      reader.kernels.losses(block, objective, loss, outputs.terms + begin, columns);
      columns[kCountColumn] += static_cast<double>(reader.kernels.count(block.mask, n));
      if (inputs.moments != nullptr) {
        reader.kernels.covariances(block, means, cov);
        columns[kCovariance] += reader.kernels.sum(cov, n);
      }
      by_row.add(reader.kernels, begin, n, loss, block.mask);
    });
    by_row.finish();
    parts[static_cast<size_t>(task)] = std::move(by_row.parts);
  });
  for (size_t task = 0; task < num_tasks; ++task) {
    for (int c = 0; c < kNumLossColumns; ++c) outputs.sums[c] += sums[task * kNumLossColumns + c];
    for (const RowPart& part : parts[task]) {
      outputs.row_loss[part.row] += part.loss;
      outputs.row_count[part.row] += part.count;
    }
  }
}

}  // namespace powerkernels
