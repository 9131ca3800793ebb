// The loop on the device: a WHILE node around a captured tick.
//
// The tick comes from torch's CUDA runtime and this file has its own, linked statically. That is
// safe: cudaGraph_t and CUgraph are the same CUgraph_st of the driver, and every runtime of a
// process works in the device's one primary context.
#include <cuda_runtime.h>

#include <cstddef>
#include <new>
#include <stdexcept>
#include <vector>

#include "powerkernels/graph_loop.h"

namespace powerkernels {
namespace {

constexpr int kWhileNodes = 12040;  // the first driver and toolkit with WHILE nodes
constexpr uint64_t kNoLimit = ~uint64_t{0};

// What host and device tell each other while the loop runs, in pinned memory that both see. Each
// side writes a line of its own.
struct Shared {
  alignas(64) volatile uint64_t stop = 0;   // by the host; nonzero: no further tick
  volatile uint64_t limit = kNoLimit;       // by the host; no further tick once that many are done
  alignas(64) volatile uint64_t ticks = 0;  // by the device
};
static_assert(offsetof(Shared, limit) == 8, "the device reads stop and limit as one vector");

// Counts the tick just done and decides whether there is another. One thread, so nothing but
// latency: the loads do not depend on one another, and the bus is waited for once. No fence, as
// each word stands for itself: that the tick's other writes are there is known when the launch
// ends.
__global__ void __launch_bounds__(1)
    set_condition(cudaGraphConditionalHandle condition, const int32_t* flag,
                  const ulonglong2* orders, unsigned long long* count, unsigned int just_done) {
  const ulonglong2 order = __ldcv(orders);  // stop, limit
  const unsigned long long ticks = __ldcv(count) + just_done;
  const bool wanted = *flag != 0;
  *static_cast<volatile unsigned long long*>(count) = ticks;
  cudaGraphSetConditional(condition, wanted && order.x == 0 && ticks < order.y);
}

std::string described(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next call must not find our error
  throw std::runtime_error(std::string(call) + " failed: " + described(error));
}

#define PK_CUDA(function, ...) check(function(__VA_ARGS__), #function)

std::string version_name(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Makes a device current and permits what a capture elsewhere in the process forbids; neither
// outlives the scope.
class Scope {
 public:
  explicit Scope(int device) {
    PK_CUDA(cudaGetDevice, &previous_);
    if (previous_ != device) {
      PK_CUDA(cudaSetDevice, device);
      changed_ = true;
    }
    cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  ~Scope() {
    cudaThreadExchangeStreamCaptureMode(&mode_);
    if (changed_ && cudaSetDevice(previous_) != cudaSuccess) cudaGetLastError();
  }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

std::string kind_name(cudaGraphNodeType type) {
  switch (static_cast<int>(type)) {
    case cudaGraphNodeTypeKernel:
      return "kernel";
    case cudaGraphNodeTypeMemcpy:
      return "memcpy";
    case cudaGraphNodeTypeMemset:
      return "memset";
    case cudaGraphNodeTypeHost:
      return "host function";
    case cudaGraphNodeTypeGraph:
      return "child graph";
    case cudaGraphNodeTypeEmpty:
      return "empty";
    case cudaGraphNodeTypeWaitEvent:
      return "event wait";
    case cudaGraphNodeTypeEventRecord:
      return "event record";
    case cudaGraphNodeTypeExtSemaphoreSignal:
      return "external semaphore signal";
    case cudaGraphNodeTypeExtSemaphoreWait:
      return "external semaphore wait";
    case cudaGraphNodeTypeMemAlloc:
      return "memory allocation";
    case cudaGraphNodeTypeMemFree:
      return "memory free";
    case 12:  // CU_GRAPH_NODE_TYPE_BATCH_MEM_OP, which the runtime does not name
      return "batched memory operation";
    case cudaGraphNodeTypeConditional:
      return "conditional";
    default:
      return "number " + std::to_string(static_cast<int>(type));
  }
}

template <typename Visit>
void for_each_node(cudaGraph_t graph, const Visit& visit) {
  size_t count = 0;
  PK_CUDA(cudaGraphGetNodes, graph, nullptr, &count);
  std::vector<cudaGraphNode_t> nodes(count);
  if (count > 0) PK_CUDA(cudaGraphGetNodes, graph, nodes.data(), &count);
  for (size_t i = 0; i < count; ++i) {
    cudaGraphNodeType type;
    PK_CUDA(cudaGraphNodeGetType, nodes[i], &type);
    visit(nodes[i], type);
    if (type == cudaGraphNodeTypeGraph) {
      cudaGraph_t child = nullptr;
      PK_CUDA(cudaGraphChildGraphNodeGetGraph, nodes[i], &child);
      for_each_node(child, visit);
    }
  }
}

// Why a memcpy may not be in a loop's body; null if it may, or if CUDA does not tell.
const char* why_no_memcpy(cudaGraphNode_t node) {
  cudaMemcpy3DParms copy = {};
  if (cudaGraphMemcpyNodeGetParams(node, &copy) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  if (copy.srcArray != nullptr || copy.dstArray != nullptr) return "copies a CUDA array";
  for (const void* address : {copy.srcPtr.ptr, copy.dstPtr.ptr}) {
    if (address == nullptr) continue;
    cudaPointerAttributes attributes = {};
    if (cudaPointerGetAttributes(&attributes, address) != cudaSuccess) {
      cudaGetLastError();
      return nullptr;
    }
    if (attributes.type == cudaMemoryTypeUnregistered) {
      return "copies from or to host memory that is not pinned";
    }
  }
  return nullptr;
}

const char* why_no_kind(cudaGraphNodeType type) {
  switch (type) {
    case cudaGraphNodeTypeKernel:
    case cudaGraphNodeTypeMemcpy:
    case cudaGraphNodeTypeMemset:
    case cudaGraphNodeTypeGraph:
    case cudaGraphNodeTypeEmpty:
      return nullptr;
    case cudaGraphNodeTypeConditional:
      return "CUDA allows it in a loop's body, but not in a child graph";
    case cudaGraphNodeTypeMemAlloc:
    case cudaGraphNodeTypeMemFree:
      return "memory must come from torch's own caching allocator, not cudaMallocAsync";
    default:
      return "CUDA does not allow it in a loop's body";
  }
}

// The body of a WHILE node holds kernels, copies and memsets of device or pinned memory, empty
// nodes, child graphs and conditional nodes, and a child graph no conditional ones (CUDA
// Programming Guide, "Conditional Node Body Graph Requirements"; cudaGraphAddChildGraphNode).
// Without a kernel nothing could ever set the flag to 0, and the loop would not end.
void check_tick(cudaGraph_t tick) {
  bool has_kernel = false;
  for_each_node(tick, [&](cudaGraphNode_t node, cudaGraphNodeType type) {
    has_kernel |= type == cudaGraphNodeTypeKernel;
    const char* reason = why_no_kind(type);
    if (reason == nullptr && type == cudaGraphNodeTypeMemcpy) reason = why_no_memcpy(node);
    if (reason != nullptr) {
      throw std::invalid_argument("the tick holds a node of type \"" + kind_name(type) +
                                  "\", which cannot be repeated on the device: " + reason);
    }
  });
  if (!has_kernel) {
    throw std::invalid_argument(
        "the tick must hold a kernel node, it holds none and would be repeated for ever: it was "
        "recorded on another device or stream than its work is done on");
  }
}

// Returns the body, which is empty yet.
cudaGraph_t add_while(cudaGraph_t graph, cudaGraphNode_t after,
                      cudaGraphConditionalHandle condition) {
  cudaGraphNodeParams params = {};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = condition;
  params.conditional.type = cudaGraphCondTypeWhile;
  params.conditional.size = 1;
  cudaGraphNode_t node = nullptr;
#if CUDART_VERSION >= 13000
  PK_CUDA(cudaGraphAddNode, &node, graph, &after, nullptr, 1, &params);
#else
  PK_CUDA(cudaGraphAddNode, &node, graph, &after, 1, &params);
#endif
  return params.conditional.phGraph_out[0];
}

const char* instantiation_name(cudaGraphInstantiateResult result) {
  switch (static_cast<int>(result)) {
    case cudaGraphInstantiateInvalidStructure:
      return "invalid structure";
    case cudaGraphInstantiateNodeOperationNotSupported:
      return "an operation that is not supported";
    case cudaGraphInstantiateMultipleDevicesNotSupported:
      return "nodes of several devices";
    case 5:  // ConditionalHandleUnused, which CUDA 12.4 does not name
      return "a condition without a node";
    default:
      return "no reason given";
  }
}

cudaGraphExec_t instantiate(cudaGraph_t graph) {
  cudaGraphInstantiateParams params = {};
  cudaGraphExec_t executable = nullptr;
  const cudaError_t error = cudaGraphInstantiateWithParams(&executable, graph, &params);
  if (error == cudaSuccess && params.result_out == cudaGraphInstantiateSuccess) return executable;
  cudaGetLastError();
  std::string message = "cudaGraphInstantiateWithParams failed: " + described(error) + " (" +
                        instantiation_name(params.result_out);
  cudaGraphNodeType type;
  if (params.errNode_out != nullptr) {
    if (cudaGraphNodeGetType(params.errNode_out, &type) == cudaSuccess) {
      message += ", at a node of type \"" + kind_name(type) + "\"";
    } else {
      cudaGetLastError();
    }
  }
  throw std::runtime_error(message + ")");
}

}  // namespace

std::string why_no_graph_loop() {
  int driver = 0;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess && driver == 0) return "there is no CUDA driver";
  if (error == cudaSuccess && driver < kWhileNodes) {
    return "the driver serves CUDA " + version_name(driver) + ", WHILE nodes need " +
           version_name(kWhileNodes);
  }
  int count = 0;
  if (error == cudaSuccess) error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    std::string reason = described(error);
    if (error == cudaErrorInsufficientDriver) {
      reason += " (driver: CUDA " + version_name(driver) + ", powerkernels was built with " +
                version_name(CUDART_VERSION) + ")";
    }
    return reason;
  }
  return count == 0 ? "there is no CUDA device" : "";
}

std::map<std::string, int64_t> graph_node_kinds(uintptr_t graph) {
  if (graph == 0) throw std::invalid_argument("graph must be a cudaGraph_t, got a null address");
  std::map<std::string, int64_t> kinds;
  for_each_node(reinterpret_cast<cudaGraph_t>(graph),
                [&](cudaGraphNode_t, cudaGraphNodeType type) { ++kinds[kind_name(type)]; });
  return kinds;
}

struct GraphLoop::State {
  explicit State(int on_device) : device(on_device) {}
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  // Frees what there is, so that a constructor that fails half-way leaves nothing behind.
  ~State() {
    try {
      const Scope scope(device);
      if (shared != nullptr) shared->stop = 1;
      if (ended != nullptr) {
        cudaEventSynchronize(ended);
        cudaEventDestroy(ended);
      }
      if (executable != nullptr) cudaGraphExecDestroy(executable);
      if (graph != nullptr) cudaGraphDestroy(graph);
      if (shared != nullptr) cudaFreeHost(shared);
      cudaGetLastError();
    } catch (const std::runtime_error&) {
      // The process is ending and the driver is gone: it has freed everything.
    }
  }

  void build(cudaGraph_t tick, const int32_t* flag) {
    PK_CUDA(cudaEventCreateWithFlags, &ended, cudaEventDisableTiming);
    PK_CUDA(cudaHostAlloc, reinterpret_cast<void**>(&shared), sizeof(Shared), cudaHostAllocMapped);
    new (shared) Shared();
    PK_CUDA(cudaHostGetDevicePointer, &shared_on_device, static_cast<void*>(shared), 0);

    PK_CUDA(cudaGraphCreate, &graph, 0);
    cudaGraphConditionalHandle condition = 0;
    PK_CUDA(cudaGraphConditionalHandleCreate, &condition, graph, 0, cudaGraphCondAssignDefault);
    const cudaGraphNode_t first = add_setter(graph, nullptr, condition, flag, 0);
    const cudaGraph_t body = add_while(graph, first, condition);
    cudaGraphNode_t tick_node = nullptr;
    PK_CUDA(cudaGraphAddChildGraphNode, &tick_node, body, nullptr, 0, tick);
    add_setter(body, tick_node, condition, flag, 1);
    executable = instantiate(graph);
  }

  cudaGraphNode_t add_setter(cudaGraph_t to, cudaGraphNode_t after,
                             cudaGraphConditionalHandle condition, const int32_t* flag,
                             unsigned int just_done) {
    const auto* orders = static_cast<const ulonglong2*>(shared_on_device);
    auto* count = reinterpret_cast<unsigned long long*>(static_cast<char*>(shared_on_device) +
                                                        offsetof(Shared, ticks));
    void* arguments[] = {&condition, &flag, &orders, &count, &just_done};
    cudaKernelNodeParams params = {};
    params.func = reinterpret_cast<void*>(set_condition);
    params.gridDim = dim3(1);
    params.blockDim = dim3(1);
    params.kernelParams = arguments;
    cudaGraphNode_t node = nullptr;
    PK_CUDA(cudaGraphAddKernelNode, &node, to, &after, after == nullptr ? 0 : 1, &params);
    return node;
  }

  int device;
  Shared* shared = nullptr;
  void* shared_on_device = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaEvent_t ended = nullptr;
};

GraphLoop::GraphLoop(uintptr_t tick_graph, uintptr_t flag, int device) {
  if (tick_graph == 0) {
    throw std::invalid_argument("tick_graph must be a cudaGraph_t, got a null address");
  }
  if (flag == 0) {
    throw std::invalid_argument("flag must be the address of an int32 on the device, got null");
  }
  const std::string reason = why_no_graph_loop();
  if (!reason.empty()) throw std::runtime_error("no loop on the device: " + reason);
  const Scope scope(device);
  const auto tick = reinterpret_cast<cudaGraph_t>(tick_graph);
  check_tick(tick);
  state_ = std::make_unique<State>(device);
  state_->build(tick, reinterpret_cast<const int32_t*>(flag));
}

GraphLoop::~GraphLoop() = default;

void GraphLoop::launch(uintptr_t stream, uint64_t max_ticks) {
  if (!is_done()) {
    throw std::runtime_error("the loop is still running: one launch at a time");
  }
  const Scope scope(state_->device);
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  const uint64_t done = ticks();
  state_->shared->limit =
      max_ticks == 0 || max_ticks > kNoLimit - done ? kNoLimit : done + max_ticks;
  PK_CUDA(cudaGraphLaunch, state_->executable, on);
  PK_CUDA(cudaEventRecord, state_->ended, on);
}

bool GraphLoop::is_done() const {
  const Scope scope(state_->device);
  const cudaError_t status = cudaEventQuery(state_->ended);
  if (status == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  check(status, "cudaEventQuery");
  return true;
}

void GraphLoop::request_stop() { state_->shared->stop = 1; }

void GraphLoop::clear_stop() { state_->shared->stop = 0; }

uint64_t GraphLoop::ticks() const { return state_->shared->ticks; }

}  // namespace powerkernels
