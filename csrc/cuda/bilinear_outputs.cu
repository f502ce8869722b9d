// The kernels of bilinear layers' y and ty: see bilinear.h.
#include "cuda/bilinear_kernel.cuh"

namespace FM_CUDA {

template <class S>
void launch_outputs(Product<S> p, index_t tasks, Arithmetic arithmetic, TileShape tile,
                    const Exec& exec) {
  launch_form<Form::outputs>(p, tasks, arithmetic, tile, exec);
}

template void launch_outputs(Product<float>, index_t, Arithmetic, TileShape, const Exec&);
template void launch_outputs(Product<double>, index_t, Arithmetic, TileShape, const Exec&);

}  // namespace FM_CUDA
