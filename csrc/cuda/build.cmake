# The CUDA backend, if compiler.cmake found that there is to be one. Sets `cuda_build` (what was
# built, for people), `cuda_libraries`, and the definitions FM_HAVE_CUDA or FM_HAVE_CUDA_EMULATED;
# appends to `objects`.
#
# ON compiles csrc/cuda/ with nvcc and links CUDA's runtime statically, so that the module loads on
# machines without a GPU. EMULATED compiles the same files as C++ and adds the host emulation.
set(cuda_emulation csrc/cuda/host_emulation.cpp csrc/cuda/machine.cpp csrc/cuda/fiber.cpp)
set(cuda_libraries "")

# ----------------------------------------------------------------------------- with nvcc
if(cuda STREQUAL "ON")
  set(CMAKE_CUDA_COMPILER ${FASTMAML_NVCC})
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
  set(CMAKE_CUDA_ARCHITECTURES ${cuda_archs})
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
  set_source_files_properties(${cuda_hosts} PROPERTIES LANGUAGE CUDA)
  add_library(fm_cuda OBJECT ${cuda_kernels} ${cuda_hosts})
  # relaxed: constexpr functions of the host are constants of kernels too.
  target_compile_options(fm_cuda PRIVATE --expt-relaxed-constexpr -lineinfo
                         -Xcompiler=-Wall,-Wextra,-Wno-psabi)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    target_compile_options(fm_cuda PRIVATE --compress-mode=size) # a third of the module's size
  endif()
  if(FASTMAML_STRICT)
    target_compile_options(fm_cuda PRIVATE -Werror=all-warnings -Xptxas=-warn-spills)
    # No product keeps anything in local memory, be it for registers that ran out.
    file(GLOB products csrc/cuda/bilinear*.cu)
    set_property(SOURCE ${products} APPEND PROPERTY COMPILE_OPTIONS -Xptxas=-warn-lmem-usage)
  endif()
  set(cuda_libraries CUDA::cudart_static)
  string(REPLACE ";" "," cuda_build "${cuda_archs}")
  set(cuda_build "CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${cuda_build}")
endif()

# ----------------------------------------------------------------------- as C++, for tests
if(cuda STREQUAL "EMULATED")
  set_source_files_properties(${cuda_kernels} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")
  add_library(fm_cuda OBJECT ${cuda_kernels} ${cuda_hosts} ${cuda_emulation})
  target_compile_options(fm_cuda PRIVATE -Wno-unknown-pragmas)
  if(NOT FASTMAML_SANITIZE)
    target_compile_options(fm_cuda PRIVATE -O2) # quicker to compile, as fast
  endif()
  set(cuda_build "emulated on the CPU")
endif()

if(TARGET fm_cuda)
  list(APPEND objects $<TARGET_OBJECTS:fm_cuda>)
  if(cuda_hosts) # the table that the binding asks for
    set(have $<IF:$<STREQUAL:${cuda},ON>,FM_HAVE_CUDA,FM_HAVE_CUDA_EMULATED>)
    target_compile_definitions(fm_bind PRIVATE ${have})
    target_compile_definitions(fm_cuda PRIVATE ${have})
  else()
    set(cuda_build "none: this version has no CUDA backend")
  endif()
endif()
