// Products of a few rows with panels of a packed bfloat16 weight. Compiled once per SIMD level.
#include "powerkernels/packed_linear.h"
#include "powerkernels/simd.h"

namespace powerkernels {
namespace PK_SIMD {
namespace {

constexpr int kVectors = static_cast<int>(kPanelColumns) / F32::kWidth;  // of a panel
// Rows that go through a panel together: 2 panels of 2 vectors times 3 rows are 12 sums, and the
// panels' 4 vectors make 16 registers.
constexpr int kMaxRows = 3;

// A column's sum, plus its bias, rounded.
PK_INLINE void finish(const LinearTask& task, int64_t row, int64_t column, F32 sum) {
  uint16_t* out = task.output + row * task.output_stride + column;
  if (column + F32::kWidth <= task.columns) {
    if (task.bias != nullptr) sum = sum + load_bfloat16(task.bias + column);
    store_bfloat16(out, sum);
    return;
  }
  float lanes[F32::kWidth];
  store(lanes, sum);
  for (int64_t i = 0; column + i < task.columns; ++i) {
    const float bias = task.bias == nullptr ? 0.0f : bfloat16_to_float(task.bias[column + i]);
    out[i] = float_to_bfloat16(lanes[i] + bias);
  }
}

template <int kRows, int kPanels>
PK_INLINE void multiply_rows(const LinearTask& task, int64_t first_row, int64_t first_panel) {
  F32 sums[kRows][kPanels * kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kPanels * kVectors; ++v) sums[r][v] = splat(0.0f);
  }
  const int64_t panel_size = task.depth * kPanelColumns;
  const uint16_t* packed = task.packed + first_panel * panel_size;
  const float* input = task.input + first_row * task.depth;
  for (int64_t k = 0; k < task.depth; ++k) {
    F32 weights[kPanels * kVectors];
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        weights[p * kVectors + v] =
            load_bfloat16(packed + p * panel_size + k * kPanelColumns + v * F32::kWidth);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const F32 x = splat(input[r * task.depth + k]);
      for (int v = 0; v < kPanels * kVectors; ++v) sums[r][v] = fma(x, weights[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kPanels * kVectors; ++v) {
      const int64_t column = first_panel * kPanelColumns + v * F32::kWidth;
      if (column < task.columns) finish(task, first_row + r, column, sums[r][v]);
    }
  }
}

// Of 16 registers, 12 hold sums: 6 rows of one panel in 2 vectors, or, where there are few rows and
// reading the weights is all the time, 3 rows of two.
constexpr int kMostRows = 6;
constexpr int kFewRows = 3;

template <int kPanels>
void multiply_row_group(const LinearTask& task, int64_t row, int count, int64_t panel) {
  switch (count) {
    case 1:
      return multiply_rows<1, kPanels>(task, row, panel);
    case 2:
      return multiply_rows<2, kPanels>(task, row, panel);
    case 3:
      return multiply_rows<3, kPanels>(task, row, panel);
    case 4:
      return multiply_rows<4, kPanels>(task, row, panel);
    case 5:
      return multiply_rows<5, kPanels>(task, row, panel);
    default:
      return multiply_rows<kMostRows, kPanels>(task, row, panel);
  }
}

// All rows, in groups of sizes as even as can be.
template <int kPanels>
void multiply_all_rows(const LinearTask& task, int64_t panel) {
  int64_t groups = (task.rows + kMostRows - 1) / kMostRows;
  for (int64_t row = 0; row < task.rows; --groups) {
    const int count = static_cast<int>((task.rows - row + groups - 1) / groups);
    multiply_row_group<kPanels>(task, row, count, panel);
    row += count;
  }
}

}  // namespace

void widen_bfloat16(const uint16_t* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + F32::kWidth <= n; i += F32::kWidth) store(out + i, load_bfloat16(x + i));
  for (; i < n; ++i) out[i] = bfloat16_to_float(x[i]);
}

void multiply_panels(const LinearTask& task) {
  const int64_t panels = panels_of(task.columns);
  int64_t panel = 0;
  if (task.rows <= kFewRows || kVectors == 1) {
    for (; panel + 2 <= panels; panel += 2) multiply_all_rows<2>(task, panel);
  }
  for (; panel < panels; ++panel) multiply_all_rows<1>(task, panel);
}

}  // namespace PK_SIMD
}  // namespace powerkernels
