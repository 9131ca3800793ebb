// Moves of cached positions between lanes, and between the two copies of a lane's cache.
#pragma once

#include <cstdint>

namespace powerkernels {

// Position p of lane l is row l * num_positions + p of either copy.
struct LaneCache {
  int64_t address[2];
  int64_t row_bytes;
};

// What a lane gets: its other copy from one of its own, or both from another lane's.
struct LaneMove {
  int64_t source_lane, source_copy;
  int64_t first, count;  // positions, counted from the lane's offset; count <= 0: none
};

// Nothing that one move reads may another one write.
void move_positions(const LaneCache* caches, int64_t num_caches, int64_t num_positions,
                    const LaneMove* moves, const int64_t* offset, int64_t num_lanes,
                    int num_threads);

}  // namespace powerkernels
