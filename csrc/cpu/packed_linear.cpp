// Linear layers with packed weights: one task per kTaskPanels panels.
#include "powerkernels/packed_linear.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <vector>

#include "powerkernels/parallel.h"

namespace powerkernels {

namespace {

template <typename T>
void pack_as(const T* weight, int64_t stride, int64_t columns, int64_t depth, T* packed,
             int num_threads) {
  parallel_for(panels_of(columns), num_threads, [&](int64_t panel) {
    T* out = packed + panel * depth * kPanelColumns;
    const int64_t first = panel * kPanelColumns;
    const int64_t here = std::min(kPanelColumns, columns - first);
    for (int64_t c = 0; c < here; ++c) {
      const T* row = weight + (first + c) * stride;
      for (int64_t k = 0; k < depth; ++k) out[k * kPanelColumns + c] = row[k];
    }
    for (int64_t c = here; c < kPanelColumns; ++c) {
      for (int64_t k = 0; k < depth; ++k) out[k * kPanelColumns + c] = 0;
    }
  });
}

}  // namespace

void pack_linear(DType dtype, const void* weight, int64_t stride, int64_t columns, int64_t depth,
                 void* packed, int num_threads) {
  if (element_size(dtype) == 2) {
    pack_as(static_cast<const uint16_t*>(weight), stride, columns, depth,
            static_cast<uint16_t*>(packed), num_threads);
  } else {
    pack_as(static_cast<const uint32_t*>(weight), stride, columns, depth,
            static_cast<uint32_t*>(packed), num_threads);
  }
}

void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const auto end =
      (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / page * page;
  // Only a wish: what it fails with says nothing about the memory.
  if (end > first)
    static_cast<void>(madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE));
#endif
}

void packed_linear(const PackedLinear& linear, int num_threads) {
  const DType dtype = linear.dtype;
  thread_local std::vector<float> widened;
  widened.resize(static_cast<size_t>(linear.rows * linear.depth));
  const float* input = widened.data();
  for (int64_t row = 0; row < linear.rows; ++row) {
    PK_SIMD_PICK(widen)
    (dtype, element(linear.input, dtype, row * linear.input_stride), linear.depth,
     widened.data() + row * linear.depth);
  }
  parallel_for(linear_tasks(linear.columns), num_threads, [&, input](int64_t task) {
    const int64_t first = task * kTaskColumns;
    const int64_t columns = std::min(kTaskColumns, linear.columns - first);
    const int64_t panels = panels_of(columns);
    thread_local std::vector<float> sums;
    sums.resize(static_cast<size_t>(linear.rows * kTaskColumns));
    PK_SIMD_PICK(multiply_panels)
    ({dtype, input, element(linear.packed, dtype, first * linear.depth), sums.data(), linear.rows,
      linear.depth, panels});
    const void* bias = linear.bias == nullptr ? nullptr : element(linear.bias, dtype, first);
    for (int64_t row = 0; row < linear.rows; ++row) {
      PK_SIMD_PICK(store_sums)
      (dtype, sums.data() + row * panels * kPanelColumns, bias, columns,
       element(linear.output, dtype, row * linear.columns + first));
    }
  });
}

}  // namespace powerkernels
