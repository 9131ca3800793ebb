// Moves of cached positions between lanes, and between the two copies of a lane's cache.
#pragma once

#include <cstdint>

namespace powerkernels {

// Position p of lane l is row l * num_positions + p of either copy.
struct LaneCache {
  int64_t address[2];
  int64_t row_bytes;
};

// What a lane gets: its other copy from one of its own, or from another lane's; that copy of its
// own too then, but only from a position on. Positions are counted from the lane's offset.
struct LaneMove {
  int64_t source_lane, source_copy;
  int64_t first, count;  // count <= 0: nothing
  int64_t both_from;     // >= first
};

// Nothing that one move reads may another one write.
void move_positions(const LaneCache* caches, int64_t num_caches, int64_t num_positions,
                    const LaneMove* moves, const int64_t* offset, int64_t num_lanes,
                    int num_threads);

}  // namespace powerkernels
