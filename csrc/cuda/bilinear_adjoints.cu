// Both adjoints of a bilinear layer in one launch: blocks of dw (tdw), which have the longer sums,
// then those of dx (tdx). Few tasks and samples make grids of either that leave multiprocessors
// idle, and a launch takes longer than many of them.
#include "cuda/bilinear_kernel.cuh"

namespace FM_CUDA {
namespace {

template <class S>
struct ProductPair {
  Product<S> weights, inputs;
  int blocks;  // of `weights`
};

template <class S, class Loop>
FM_KERNEL void __launch_bounds__(kProductThreads, Loop::kMinBlocks)
    bilinear_adjoints_kernel(const ProductPair<S> p) {
  await_previous_kernels();
  const int block = int(blockIdx.x);
  if (block < p.blocks) {
    bilinear_block<S, Loop, Form::weights>(p.weights, block);
  } else {
    bilinear_block<S, Loop, Form::inputs>(p.inputs, block - p.blocks);
  }
}

}  // namespace

template <class S>
void launch_adjoints(Product<S> weights, Product<S> inputs, index_t tasks, Choice choice,
                     const Exec& exec) {
  ProductPair<S> p{weights, inputs, 0};
  with_loop<S>(choice, [&](auto loop) {
    using Loop = typename decltype(loop)::type;
    const index_t first = cut_into_tiles<Loop>(p.weights, tasks);
    const index_t blocks = first + cut_into_tiles<Loop>(p.inputs, tasks);
    p.blocks = int(first);
    const std::size_t shared =
        max_of(kProductShared<S, Loop, Form::weights>, kProductShared<S, Loop, Form::inputs>);
    launch(bilinear_adjoints_kernel<S, Loop>, dim3(unsigned(blocks)), kProductThreads, shared, exec,
           p);
  });
}

template void launch_adjoints(Product<float>, Product<float>, index_t, Choice, const Exec&);
template void launch_adjoints(Product<double>, Product<double>, index_t, Choice, const Exec&);

}  // namespace FM_CUDA
