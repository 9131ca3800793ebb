#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace powerkernels {

struct CudaDevice {
  std::string name;
  int major, minor;  // compute capability
  int num_sms;
  size_t memory_bytes;
};

struct CudaInfo {
  int runtime_version = 0;  // 1000 * major + 10 * minor
  int driver_version = 0;   // 0: no driver
  std::string error;        // name of the CUDA error, empty if none
  std::vector<CudaDevice> devices;
};

CudaInfo cuda_info();

}  // namespace powerkernels
