// Products of a few rows with panels of a packed weight. Compiled once per SIMD level.
#include "powerkernels/packed_linear.h"
#include "powerkernels/simd.h"

namespace powerkernels {
namespace PK_SIMD {
namespace {

constexpr int kVectors = static_cast<int>(kPanelColumns) / F32::kWidth;  // of a panel

// Rows first_row and on times kPanels panels. While it works, the panels that come next are fetched
// to the L2 cache: this group of rows, `part` of `parts`, fetches its part of them, so that reading
// memory goes on at an even pace through all groups.
template <DType dtype, int kRows, int kPanels>
PK_INLINE void multiply_rows(const LinearTask& task, int64_t first_row, int64_t first_panel,
                             int64_t part, int64_t parts) {
  F32 sums[kRows][kPanels * kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kPanels * kVectors; ++v) sums[r][v] = splat(0.0f);
  }
  const int64_t panel_size = task.depth * kPanelColumns;
  const void* weight = element(task.packed, dtype, first_panel * panel_size);
  const float* input = task.input + first_row * task.depth;
  const int64_t step = element_size(dtype) * kPanelColumns * kPanels / parts;
  const char* next = static_cast<const char*>(element(weight, dtype, kPanels * panel_size)) +
                     part * task.depth * step;
  for (int64_t k = 0; k < task.depth; ++k) {
    for (int64_t line = 0; line < kPanels; ++line) {
      __builtin_prefetch(next + k * step + line * 64, 0, 2);
    }
    F32 weights[kPanels * kVectors];
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        weights[p * kVectors + v] =
            load_as<dtype>(weight, p * panel_size + k * kPanelColumns + v * F32::kWidth);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const F32 x = splat(input[r * task.depth + k]);
      for (int v = 0; v < kPanels * kVectors; ++v) sums[r][v] = fma(x, weights[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* out = task.sums + ((first_row + r) * task.panels + first_panel) * kPanelColumns;
    for (int v = 0; v < kPanels * kVectors; ++v) store(out + v * F32::kWidth, sums[r][v]);
  }
}

// Of 16 registers, 12 hold sums: 6 rows of one panel in 2 vectors, or, where there are few rows and
// reading the weights is all the time, 3 rows of two.
constexpr int kMostRows = 6;
constexpr int kFewRows = 3;

template <DType dtype, int kPanels>
void multiply_row_group(const LinearTask& task, int64_t row, int count, int64_t panel, int64_t part,
                        int64_t parts) {
  switch (count) {
    case 1:
      return multiply_rows<dtype, 1, kPanels>(task, row, panel, part, parts);
    case 2:
      return multiply_rows<dtype, 2, kPanels>(task, row, panel, part, parts);
    case 3:
      return multiply_rows<dtype, 3, kPanels>(task, row, panel, part, parts);
    case 4:
      return multiply_rows<dtype, 4, kPanels>(task, row, panel, part, parts);
    case 5:
      return multiply_rows<dtype, 5, kPanels>(task, row, panel, part, parts);
    default:
      return multiply_rows<dtype, kMostRows, kPanels>(task, row, panel, part, parts);
  }
}

// All rows, in groups of sizes as even as can be.
template <DType dtype, int kPanels>
void multiply_all_rows(const LinearTask& task, int64_t panel) {
  const int64_t groups = (task.rows + kMostRows - 1) / kMostRows;
  int64_t row = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t left = groups - group;
    const int count = static_cast<int>((task.rows - row + left - 1) / left);
    multiply_row_group<dtype, kPanels>(task, row, count, panel, group, groups);
    row += count;
  }
}

template <DType dtype>
void multiply_as(const LinearTask& task) {
  int64_t panel = 0;
  if (task.rows <= kFewRows || kVectors == 1) {
    for (; panel + 2 <= task.panels; panel += 2) multiply_all_rows<dtype, 2>(task, panel);
  }
  for (; panel < task.panels; ++panel) multiply_all_rows<dtype, 1>(task, panel);
}

template <DType dtype>
void widen_as(const void* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + F32::kWidth <= n; i += F32::kWidth) store(out + i, load_as<dtype>(x, i));
  for (; i < n; ++i) out[i] = load_one<dtype>(x, i);
}

template <DType dtype>
void store_sums_as(const float* sums, const void* bias, int64_t n, void* out) {
  int64_t i = 0;
  for (; i + F32::kWidth <= n; i += F32::kWidth) {
    const F32 sum = load(sums + i);
    store_as<dtype>(out, i, bias == nullptr ? sum : sum + load_as<dtype>(bias, i));
  }
  for (; i < n; ++i) {
    store_one<dtype>(out, i, bias == nullptr ? sums[i] : sums[i] + load_one<dtype>(bias, i));
  }
}

}  // namespace

void widen(DType dtype, const void* x, int64_t n, float* out) {
  dtype == DType::bfloat16 ? widen_as<DType::bfloat16>(x, n, out)
                           : widen_as<DType::float32>(x, n, out);
}

void multiply_panels(const LinearTask& task) {
  task.dtype == DType::bfloat16 ? multiply_as<DType::bfloat16>(task)
                                : multiply_as<DType::float32>(task);
}

// Sums, plus their bias, rounded.
void store_sums(DType dtype, const float* sums, const void* bias, int64_t n, void* out) {
  dtype == DType::bfloat16 ? store_sums_as<DType::bfloat16>(sums, bias, n, out)
                           : store_sums_as<DType::float32>(sums, bias, n, out);
}

}  // namespace PK_SIMD
}  // namespace powerkernels
