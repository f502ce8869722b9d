// The kernels of bilinear layers' y and ty: see bilinear.h.
#include "cuda/bilinear_kernel.cuh"

namespace FM_CUDA {

template <class S>
void launch_outputs(Product<S> p, index_t tasks, Choice choice, const Exec& exec) {
  launch_form<Form::outputs>(p, tasks, choice, exec);
}

template void launch_outputs(Product<float>, index_t, Choice, const Exec&);
template void launch_outputs(Product<double>, index_t, Choice, const Exec&);

}  // namespace FM_CUDA
