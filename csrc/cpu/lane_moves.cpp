// Moves of cached positions: the ranges are cut into pieces that threads take by turns.
#include "powerkernels/lane_moves.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "powerkernels/parallel.h"

namespace powerkernels {
namespace {

// Stays in the cache between its two writes.
constexpr int64_t kPieceBytes = 1 << 16;
// Below this, waking the other threads takes longer than the copy.
constexpr int64_t kFewBytes = 1 << 17;

struct Piece {
  const char* from;
  char* to;
  char* to_same;  // the copy of the source's name; the first same_from bytes of it are left alone
  int64_t bytes, same_from;
};

}  // namespace

void move_positions(const LaneCache* caches, int64_t num_caches, int64_t num_positions,
                    const LaneMove* moves, const int64_t* offset, int64_t num_lanes,
                    int num_threads) {
  std::vector<Piece> pieces;
  int64_t total = 0;
  for (int64_t lane = 0; lane < num_lanes; ++lane) {
    const LaneMove& move = moves[lane];
    if (move.count <= 0) continue;
    const int64_t first = offset[lane] + move.first;
    for (int64_t i = 0; i < num_caches; ++i) {
      const LaneCache& cache = caches[i];
      const int64_t bytes = move.count * cache.row_bytes;
      const int64_t from_row = (move.source_lane * num_positions + first) * cache.row_bytes;
      const int64_t to_row = (lane * num_positions + first) * cache.row_bytes;
      char* same = reinterpret_cast<char*>(cache.address[move.source_copy]);
      char* other = reinterpret_cast<char*>(cache.address[1 - move.source_copy]);
      const int64_t same_from =
          move.source_lane == lane ? bytes : (move.both_from - move.first) * cache.row_bytes;
      for (int64_t at = 0; at < bytes; at += kPieceBytes) {
        const int64_t length = std::min(kPieceBytes, bytes - at);
        pieces.push_back({same + from_row + at, other + to_row + at, same + to_row + at, length,
                          std::clamp<int64_t>(same_from - at, 0, length)});
      }
      total += bytes;
    }
  }
  if (total <= kFewBytes) num_threads = 1;
  parallel_for(static_cast<int64_t>(pieces.size()), num_threads, [&](int64_t task) {
    const Piece& piece = pieces[task];
    std::memcpy(piece.to, piece.from, piece.bytes);
    const int64_t from = piece.same_from;
    if (from < piece.bytes) {
      std::memcpy(piece.to_same + from, piece.from + from, piece.bytes - from);
    }
  });
}

}  // namespace powerkernels
