// The kernels of bilinear layers' dw and tdw: see bilinear.h.
#include "cuda/bilinear_kernel.cuh"

namespace FM_CUDA {

template <class S>
void launch_weights(Product<S> p, index_t tasks, Arithmetic arithmetic, TileShape tile,
                    const Exec& exec) {
  launch_form<Form::weights>(p, tasks, arithmetic, tile, exec);
}

template void launch_weights(Product<float>, index_t, Arithmetic, TileShape, const Exec&);
template void launch_weights(Product<double>, index_t, Arithmetic, TileShape, const Exec&);

}  // namespace FM_CUDA
