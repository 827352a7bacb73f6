// The device of an operator's tensors and its current stream, for the length of a call.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include "launch.cuh"

namespace fusefeat::cuda {

#ifdef __CUDACC__

class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

#else

class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

#endif

inline void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "fusefeat: ", what, " could not be launched: ", cudaGetErrorString(error));
}

}  // namespace fusefeat::cuda
