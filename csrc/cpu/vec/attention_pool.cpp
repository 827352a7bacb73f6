// Both pools on the CPU: the kernels of one instruction set (see simd.h) and their table.
#include "pool_backward.h"
#include "pool_forward.h"
#include "products.h"

namespace fusefeat {
namespace {

template <typename T>
void convert_rows(const void* from, int64_t row_stride, int64_t stride, int64_t rows, int64_t count, void* to) {
  using A = typename AccOf<T>::type;
  for (int64_t r = 0; r < rows; ++r) {
    gather<A>(static_cast<const T*>(from) + r * row_stride, stride, count, static_cast<A*>(to) + r * count);
  }
}

template <typename T>
constexpr cpu::PoolKernels kernels_of = {
    convert_rows<T>,
    forward_scratch<T>,
    forward_item<T>,
    combine_parts<T>,
    normalise_part<T>,
    backward_scratch<T>,
    weight_dots_part<T>,
    weight_dots_sum<T>,
    backward_item<T>,
    sum_query<T>,
    multiply<typename AccOf<T>::type>,
};

}  // namespace

namespace cpu {

#if defined(FUSEFEAT_BF16)
const PoolKernels* pool_kernels_avx512_bf16(TokenType) {
  return &kernels_of<BFloat16>;
}
#else
#if defined(FUSEFEAT_ISA_AVX512)
#define FUSEFEAT_POOL_KERNELS pool_kernels_avx512
#elif defined(FUSEFEAT_ISA_AVX2)
#define FUSEFEAT_POOL_KERNELS pool_kernels_avx2
#else
#define FUSEFEAT_POOL_KERNELS pool_kernels_generic
#endif

const PoolKernels* FUSEFEAT_POOL_KERNELS(TokenType type) {
  switch (type) {
    case TokenType::f32:
      return &kernels_of<float>;
    case TokenType::f64:
      return &kernels_of<double>;
    case TokenType::bf16:
      return &kernels_of<BFloat16>;
    case TokenType::f16:
      return &kernels_of<Half>;
  }
  return nullptr;
}
#endif

}  // namespace cpu
}  // namespace fusefeat
