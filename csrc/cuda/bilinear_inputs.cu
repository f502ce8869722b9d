// The kernels of bilinear layers' dx and tdx: see bilinear.h.
#include "cuda/bilinear_kernel.cuh"

namespace FM_CUDA {

template <class S>
void launch_inputs(Product<S> p, index_t tasks, Choice choice, const Exec& exec) {
  launch_form<Form::inputs>(p, tasks, choice, exec);
}

template void launch_inputs(Product<float>, index_t, Choice, const Exec&);
template void launch_inputs(Product<double>, index_t, Choice, const Exec&);

}  // namespace FM_CUDA
