// The debug mode FUSEFEAT_POISON=1, read once when a library is loaded: outputs and scratch are filled with 0xff
// bytes before kernels run, NaN in every floating type and -1 in every integer one, so that what nobody writes shows.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace fusefeat {

inline const bool kPoison = [] {
  const char* wish = std::getenv("FUSEFEAT_POISON");
  return wish != nullptr && std::strcmp(wish, "1") == 0;
}();

inline void poison(void* data, int64_t bytes) {
  if (kPoison && bytes > 0) std::memset(data, 0xff, static_cast<size_t>(bytes));
}

// A contiguous tensor on any device.
inline void poison(torch::stable::Tensor& tensor) {
  if (!kPoison) return;
  if (tensor.device().is_cpu()) {
    poison(tensor.mutable_data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
    return;
  }
  const bool whole = tensor.scalar_type() == torch::headeronly::ScalarType::Int ||
                     tensor.scalar_type() == torch::headeronly::ScalarType::Long;
  torch::stable::fill_(tensor, whole ? -1.0 : std::numeric_limits<double>::quiet_NaN());
}

}  // namespace fusefeat
