// What the CUDA runtime sees, for `powerkernels doctor`. Also what shows that the CUDA part builds,
// links (runtime static) and imports where there is no GPU.
#include <cuda_runtime.h>

#include "powerkernels/device_info.h"

namespace powerkernels {

CudaInfo cuda_info() {
  CudaInfo info;
  cudaRuntimeGetVersion(&info.runtime_version);
  cudaDriverGetVersion(&info.driver_version);  // 0 without a driver
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  for (int i = 0; error == cudaSuccess && i < count; ++i) {
    cudaDeviceProp properties;
    error = cudaGetDeviceProperties(&properties, i);
    if (error != cudaSuccess) break;
    info.devices.push_back({properties.name, properties.major, properties.minor,
                            properties.multiProcessorCount, properties.totalGlobalMem});
  }
  if (error != cudaSuccess) {
    info.error = cudaGetErrorName(error);
    cudaGetLastError();  // torch must not find our error
  }
  return info;
}

}  // namespace powerkernels
