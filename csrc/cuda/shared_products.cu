// Launches of the products: which kernel takes which types.
#include <algorithm>

#include "gemm.cuh"
#include "shared_outputs.cuh"

namespace fusefeat::cuda {
namespace {

constexpr int64_t kBlocks = 264;  // two for each multiprocessor of the larger chips

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <class C, bool kFast, class Output>
void launch(GemmArgs<Output> args, cudaStream_t stream) {
  args.row_tiles = ceil_div(args.rows, C::kTile);
  args.column_tiles = ceil_div(args.columns, C::kTile);
  const int64_t blocks = args.row_tiles * args.column_tiles * args.parts.count;
  if (blocks == 0) return;
  LAUNCH((multiply<C, kFast, Output>), static_cast<unsigned>(blocks), kGemmThreads, 0, stream, args);
  if (args.parts.count == 1) return;
  const int64_t sums = ceil_div(args.rows * args.columns, 256);
  LAUNCH(
      (add_parts<typename C::Acc, Output>), static_cast<unsigned>(sums), 256, 0, stream, args.parts, args.rows,
      args.columns, args.out);
}

// HalfWords: what the product of float16 operands is made of.
template <class HalfWords, template <typename> class Output, class Make>
void launch_by_type(Products products, const Make& make, cudaStream_t stream) {
  if (products.compute == Compute::f64) return launch<SimtWords<double>, false>(make(Output<double>()), stream);
  const GemmArgs<Output<float>> args = make(Output<float>());
  if (!products.fast) return launch<SimtWords<float>, false>(args, stream);
  if (products.compute == Compute::bf16) return launch<PairWords<BFloat16>, true>(args, stream);
  if (products.compute == Compute::f16) return launch<HalfWords, true>(args, stream);
  launch<SimtWords<float>, true>(args, stream);
}

}  // namespace

Parts plan_parts(Products products, int64_t rows, int64_t columns, int64_t depth, int64_t bytes) {
  const bool is_double = products.compute == Compute::f64;
  const int64_t tile = is_double ? 64 : 128, step = 64, acc_bytes = is_double ? 8 : 4;
  const int64_t tiles = std::max<int64_t>(1, ceil_div(rows, tile) * ceil_div(columns, tile));
  const int64_t fit = bytes / std::max<int64_t>(1, rows * columns * acc_bytes);
  const int64_t wanted = std::clamp<int64_t>(std::min({kBlocks / tiles, fit, depth / (4 * step)}), 1, 256);
  Parts parts;
  parts.depth = std::max<int64_t>(1, ceil_div(ceil_div(depth, wanted), step)) * step;
  parts.count = std::max<int64_t>(1, ceil_div(depth, parts.depth));
  return parts;
}

void launch_logits(Products products, const LogitsArgs& from, cudaStream_t stream) {
  const bool packs = from.z != nullptr && reinterpret_cast<uintptr_t>(from.z) % 16 == 0 && from.stride % 4 == 0;
  const auto make = [&]<typename A>(LogitsOutput<A>) {
    GemmArgs<LogitsOutput<A>> args;
    args.a = from.rows;
    args.b = from.weight;
    args.rows = from.rows.rows;
    args.columns = from.weight.rows;
    args.depth = from.weight.cols;
    args.parts.depth = args.depth;
    args.out = {
        static_cast<const A*>(from.bias),
        static_cast<A>(from.margin),
        static_cast<A*>(from.z),
        from.stride,
        args.columns,
        packs,
        from.matrix,
        from.matrix_type};
    return args;
  };
  launch_by_type<PairWords<Half>, LogitsOutput>(products, make, stream);
}

void launch_row_gradient(Products products, const RowGradientArgs& from, cudaStream_t stream) {
  const auto make = [&]<typename A>(RowGradientOutput<A>) {
    GemmArgs<RowGradientOutput<A>> args;
    args.a = from.dz;
    args.b = from.weight;
    args.rows = from.dz.rows;
    args.columns = from.weight.cols;
    args.depth = from.weight.rows;
    args.parts = from.parts;
    args.out = {from.context,      from.input, from.context_type, from.input_type,
                from.context_rows, from.first, args.columns,      from.row_weight};
    return args;
  };
  launch_by_type<Tf32Words, RowGradientOutput>(products, make, stream);
}

void launch_weight_gradient(Products products, const WeightGradientArgs& from, cudaStream_t stream) {
  const auto make = [&]<typename A>(RunningOutput<A>) {
    GemmArgs<RunningOutput<A>> args;
    args.a = from.dz;
    args.b = from.rows;
    args.rows = from.dz.cols;
    args.columns = from.rows.cols;
    args.depth = from.rows.rows;
    args.parts = from.parts;
    args.out = {from.out, args.columns};
    return args;
  };
  launch_by_type<Tf32Words, RunningOutput>(products, make, stream);
}

}  // namespace fusefeat::cuda
