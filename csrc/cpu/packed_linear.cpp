// Linear layers with packed bfloat16 weights: one task per kTaskPanels panels.
#include "powerkernels/packed_linear.h"

#include <algorithm>
#include <vector>

#include "powerkernels/parallel.h"
#include "powerkernels/simd_level.h"

namespace powerkernels {

PK_SIMD_DECLARE(void widen_bfloat16(const uint16_t* x, int64_t n, float* out);
                void multiply_panels(const LinearTask& task))

void pack_linear(const uint16_t* weight, int64_t stride, int64_t columns, int64_t depth,
                 uint16_t* packed, int num_threads) {
  parallel_for(panels_of(columns), num_threads, [&](int64_t panel) {
    uint16_t* out = packed + panel * depth * kPanelColumns;
    const int64_t first = panel * kPanelColumns;
    const int64_t here = std::min(kPanelColumns, columns - first);
    for (int64_t c = 0; c < here; ++c) {
      const uint16_t* row = weight + (first + c) * stride;
      for (int64_t k = 0; k < depth; ++k) out[k * kPanelColumns + c] = row[k];
    }
    for (int64_t c = here; c < kPanelColumns; ++c) {
      for (int64_t k = 0; k < depth; ++k) out[k * kPanelColumns + c] = 0;
    }
  });
}

void packed_linear(const PackedLinear& linear, int num_threads) {
  thread_local std::vector<float> widened;
  widened.resize(static_cast<size_t>(linear.rows * linear.depth));
  const float* input = widened.data();
  for (int64_t row = 0; row < linear.rows; ++row) {
    PK_SIMD_PICK(widen_bfloat16)
    (linear.input + row * linear.input_stride, linear.depth, widened.data() + row * linear.depth);
  }
  const int64_t tasks = (panels_of(linear.columns) + kTaskPanels - 1) / kTaskPanels;
  parallel_for(tasks, num_threads, [&, input](int64_t task) {
    const int64_t first = task * kTaskPanels * kPanelColumns;
    PK_SIMD_PICK(multiply_panels)
    ({input, linear.packed + first * linear.depth,
      linear.bias == nullptr ? nullptr : linear.bias + first, linear.output + first, linear.rows,
      linear.depth, std::min(kTaskPanels * kPanelColumns, linear.columns - first), linear.columns});
  });
}

}  // namespace powerkernels
