#include "powerkernels/philox.h"

#include "powerkernels/ops.h"

namespace powerkernels {

void philox4x32_many(const int64_t* counters, uint64_t seed, int64_t count, int64_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    PhiloxWords counter;
    for (int j = 0; j < 4; ++j) counter.v[j] = static_cast<uint32_t>(counters[4 * i + j]);
    const PhiloxWords words = philox4x32(counter, seed);
    for (int j = 0; j < 4; ++j) out[4 * i + j] = static_cast<int64_t>(words.v[j]);
  }
}

}  // namespace powerkernels
