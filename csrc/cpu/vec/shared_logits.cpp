#include "shared_forward.h"
#include "shared_sweep.h"

namespace fusefeat {
namespace {

template <typename A, bool kPairs>
constexpr cpu::SharedKernels kKernels = {
    kStrip<A>,
    kPairs ? 2 : 1,
    sizeof(A),
    worker_bytes<A, kPairs>,
    pack_transposed<A, kPairs>,
    pack_rows<A, kPairs>,
    forward_task<A, kPairs>,
    combine_strip<A, kPairs>,
    column_sums<A, kPairs>,
    write_assignment<A, kPairs>,
    logits_task<A, kPairs>,
    dots_task<A, kPairs>,
    combine_dots<A, kPairs>,
    gradient_task<A, kPairs>,
    sweep_task<A, kPairs>,
    write_rows<A, kPairs>,
    write_sums<A, kPairs>,
};

}  // namespace

namespace cpu {

#if defined(FUSEFEAT_BF16)
const SharedKernels* shared_kernels_avx512_bf16() {
  return &kKernels<float, true>;
}
#elif defined(FUSEFEAT_ISA_AVX512)
const SharedKernels* shared_kernels_avx512(bool is_double) {
  return is_double ? &kKernels<double, false> : &kKernels<float, false>;
}
#elif defined(FUSEFEAT_ISA_AVX2)
const SharedKernels* shared_kernels_avx2(bool is_double) {
  return is_double ? &kKernels<double, false> : &kKernels<float, false>;
}
#else
const SharedKernels* shared_kernels_generic(bool is_double) {
  return is_double ? &kKernels<double, false> : &kKernels<float, false>;
}
#endif

}  // namespace cpu
}  // namespace fusefeat
