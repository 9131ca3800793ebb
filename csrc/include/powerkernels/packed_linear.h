// y = x Wᵀ + b for a few rows x and a bfloat16 weight packed once, on a CPU.
//
// The weight stays bfloat16 in memory and is widened in registers: for the few rows of a lane step
// the time is that of reading it. Every product is exact, sums are float32 in the order of k, the
// result is rounded once. An output depends on its own row and column only: not on how many rows
// there are, nor on the number of threads.
#pragma once

#include <cstdint>

namespace powerkernels {

// Columns (outputs) of a panel. A panel holds, for each k in turn, its columns' weights of that k.
constexpr int64_t kPanelColumns = 16;
// Panels that one thread takes at a time.
constexpr int64_t kTaskPanels = 2;

inline int64_t panels_of(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }

// weight bfloat16 [columns, depth], rows `stride` elements apart, to
// packed bfloat16 [panels_of(columns), depth, kPanelColumns]; missing columns are zeros.
void pack_linear(const uint16_t* weight, int64_t stride, int64_t columns, int64_t depth,
                 uint16_t* packed, int num_threads);

struct PackedLinear {
  const uint16_t* input;   // bfloat16 [rows, depth], rows input_stride elements apart
  const uint16_t* packed;  // what pack_linear made
  const uint16_t* bias;    // bfloat16 [columns], or null
  uint16_t* output;        // bfloat16 [rows, columns], contiguous
  int64_t rows, columns, depth, input_stride;
};

void packed_linear(const PackedLinear& linear, int num_threads);

// The rows of a PackedLinear as floats, and one task's panels of it.
struct LinearTask {
  const float* input;      // [rows, depth], contiguous
  const uint16_t* packed;  // of the first panel
  const uint16_t* bias;    // of the first column, or null
  uint16_t* output;        // of the first column, rows output_stride elements apart
  int64_t rows, depth, columns, output_stride;
};

}  // namespace powerkernels
