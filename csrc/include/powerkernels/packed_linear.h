// y = x Wᵀ + b for a few rows x and a weight packed once, bfloat16 or float32, on a CPU.
//
// A bfloat16 weight stays one in memory and is widened in registers: for the few rows of a lane
// step the time is that of reading it. Every product of bfloat16s is exact, sums are float32 in the
// order of k, the result is rounded once. An output depends on its own row and column only: not on
// how many rows there are, nor on the number of threads.
#pragma once

#include <cstdint>

#include "powerkernels/dtype.h"
#include "powerkernels/simd_level.h"

namespace powerkernels {

// Columns (outputs) of a panel. A panel holds, for each k in turn, its columns' weights of that k.
constexpr int64_t kPanelColumns = 16;
// Panels that one thread takes at a time.
constexpr int64_t kTaskPanels = 2;
constexpr int64_t kTaskColumns = kTaskPanels * kPanelColumns;

inline int64_t panels_of(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }
inline int64_t linear_tasks(int64_t columns) { return (columns + kTaskColumns - 1) / kTaskColumns; }

// weight [columns, depth] of a dtype of 2 or 4 bytes, rows `stride` elements apart, to
// packed [panels_of(columns), depth, kPanelColumns]; missing columns are zeros.
void pack_linear(DType dtype, const void* weight, int64_t stride, int64_t columns, int64_t depth,
                 void* packed, int num_threads);

// Asks for large pages for memory not yet touched, where the system gives them on request: packed
// weights are read from end to end in every step, page after page.
void prefer_huge_pages(void* memory, int64_t bytes);

struct PackedLinear {
  DType dtype;         // of all four: bfloat16 or float32
  const void* input;   // [rows, depth], rows input_stride elements apart
  const void* packed;  // what pack_linear made
  const void* bias;    // [columns], or null
  void* output;        // [rows, columns], contiguous
  int64_t rows, columns, depth, input_stride;
};

void packed_linear(const PackedLinear& linear, int num_threads);

// Rows times some panels of one weight, as float32 sums.
struct LinearTask {
  DType dtype;         // of packed
  const float* input;  // [rows, depth], contiguous
  const void* packed;  // of the first panel
  float* sums;         // [rows, panels * kPanelColumns], contiguous
  int64_t rows, depth, panels;
};

PK_SIMD_DECLARE(
    // n elements as floats.
    void widen(DType dtype, const void* x, int64_t n, float* out);
    void multiply_panels(const LinearTask& task);
    // Sums plus bias (or null), rounded to the dtype.
    void store_sums(DType dtype, const float* sums, const void* bias, int64_t n, void* out))

}  // namespace powerkernels
