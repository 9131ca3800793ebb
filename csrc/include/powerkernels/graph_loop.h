// A captured tick repeated by the device itself: one launch, until a flag in device memory is 0.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

namespace powerkernels {

// Why this machine cannot run a GraphLoop, in a line; empty if it can.
std::string why_no_graph_loop();

// How many nodes of each kind a cudaGraph_t holds, those of child graphs included.
std::map<std::string, int64_t> graph_node_kinds(uintptr_t graph);

// Owns the graph: set condition -> WHILE { child graph of the tick -> set condition }.
//
// Failures of CUDA throw std::runtime_error with the call, the error's name and its text. Not to be
// used by two threads at once, save for request_stop, clear_stop and ticks.
class GraphLoop {
 public:
  // tick_graph: a cudaGraph_t, copied here; what its nodes point to must outlive the loop.
  // flag: address of an int32 on the device; nonzero is "one more tick", also before the first.
  // Throws std::invalid_argument for a null address, a node that a loop's body may not hold, or a
  // graph without kernel nodes, whose loop would never end.
  GraphLoop(uintptr_t tick_graph, uintptr_t flag, int device);
  // Ends a running launch at its next tick and waits for it.
  ~GraphLoop();
  GraphLoop(const GraphLoop&) = delete;
  GraphLoop& operator=(const GraphLoop&) = delete;

  // Starts the loop on a stream, for at most max_ticks ticks (0: no limit). One launch at a time.
  void launch(uintptr_t stream, uint64_t max_ticks);
  // Whether the last launch has ended; true before the first.
  bool is_done() const;

  // Ends a running launch after the tick it is in; a later one makes no tick. Until clear_stop.
  void request_stop();
  void clear_stop();
  // Ticks of all launches so far, true while one runs: a plain read of host memory. It says nothing
  // about what else a tick wrote; for that, wait for is_done.
  uint64_t ticks() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace powerkernels
