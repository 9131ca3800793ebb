// Tokens in tasks and blocks; half-precision arrays are widened block by block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "powerkernels/parallel.h"
#include "powerkernels/token_ops.h"

namespace powerkernels {

constexpr int64_t kTaskTokens = 16 * kTokenBlock;

inline int64_t num_token_tasks(int64_t num_tokens) {
  return (num_tokens + kTaskTokens - 1) / kTaskTokens;
}

// fn(task, first, last) for stretches of tokens; what a task covers does not depend on the threads.
template <typename Fn>
void for_token_tasks(int64_t num_tokens, int num_threads, const Fn& fn) {
  parallel_for(num_token_tasks(num_tokens), num_threads, [&](int64_t task) {
    fn(task, task * kTaskTokens, std::min((task + 1) * kTaskTokens, num_tokens));
  });
}

// fn(first, n) for the blocks of a task.
template <typename Fn>
void for_blocks(int64_t first, int64_t last, const Fn& fn) {
  for (; first < last; first += kTokenBlock) fn(first, std::min(kTokenBlock, last - first));
}

// A block's floats: in place for float32, else widened into the buffer. Null stays null.
class BlockFloats {
 public:
  const float* at(const TokenKernels& kernels, const FloatArray& array, int64_t first, int64_t n) {
    if (array.data == nullptr) return nullptr;
    if (array.dtype == DType::float32) return static_cast<const float*>(array.data) + first;
    const char* from = static_cast<const char*>(array.data) + first * element_size(array.dtype);
    kernels.widen(from, array.dtype, n, values_);
    return values_;
  }

 private:
  alignas(64) float values_[kTokenBlock];
};

// Blocks of the arrays of a batch, for one task. What is null stays null.
class BlockReader {
 public:
  const TokenKernels& kernels = PK_SIMD_PICK(token_kernels)();

  TokenBlockOf at(const TokenArrays& tokens, int64_t first, int64_t n) {
    return {n,
            log_prob_.at(kernels, tokens.log_prob, first, n),
            old_log_prob_.at(kernels, tokens.old_log_prob, first, n),
            advantages_.at(kernels, tokens.advantages, first, n),
            nullptr,
            tokens.mask + first,
            nullptr};
  }
  TokenBlockOf at(const LossInputs& inputs, int64_t first, int64_t n) {
    TokenBlockOf block = at(inputs.tokens, first, n);
    block.weights = weights_.at(kernels, inputs.weights, first, n);
    block.selected = inputs.selected == nullptr ? nullptr : inputs.selected + first;
    return block;
  }

 private:
  BlockFloats log_prob_, old_log_prob_, advantages_, weights_;
};

// The sequence of a token.
inline int64_t row_of(const TokenRows& rows, int64_t token) {
  if (rows.bounds == nullptr) return token / rows.width;
  const int64_t* end = rows.bounds + rows.num_rows + 1;
  return std::upper_bound(rows.bounds, end, token) - rows.bounds - 1;
}

inline int64_t row_begin(const TokenRows& rows, int64_t row) {
  return rows.bounds == nullptr ? row * rows.width : rows.bounds[row];
}

}  // namespace powerkernels
