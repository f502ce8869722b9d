// The kernels of bilinear layers' dw and tdw: see bilinear.h.
#include "cuda/bilinear_kernel.cuh"

namespace FM_CUDA {

template <class S>
void launch_weights(Product<S> p, index_t tasks, Choice choice, const Exec& exec) {
  launch_form<Form::weights>(p, tasks, choice, exec);
}

template void launch_weights(Product<float>, index_t, Choice, const Exec&);
template void launch_weights(Product<double>, index_t, Choice, const Exec&);

}  // namespace FM_CUDA
