# The CUDA backend. Sets `cuda_build` (what was built, for people), `cuda_libraries`, and the
# definitions FM_HAVE_CUDA or FM_HAVE_CUDA_EMULATED; appends to `objects`.
#
# ON compiles csrc/cuda/ with nvcc and links CUDA's runtime statically, so that the module loads on
# machines without a GPU. EMULATED compiles the same files as C++ and adds the host emulation.
file(GLOB cuda_kernels CONFIGURE_DEPENDS csrc/cuda/*.cu)
file(GLOB cuda_hosts CONFIGURE_DEPENDS csrc/cuda/backend_*.cpp)
set(cuda_emulation csrc/cuda/host_emulation.cpp csrc/cuda/machine.cpp csrc/cuda/fiber.cpp)
set(cuda_libraries "")

# ------------------------------------------------------------------- is there a compiler
if(cuda MATCHES "^(AUTO|ON)$")
  find_program(
    FASTMAML_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
    DOC "the CUDA compiler")
  set(reason "")
  if(NOT FASTMAML_NVCC)
    set(reason "found no nvcc on PATH or below CUDA_HOME")
  else()
    execute_process(COMMAND ${FASTMAML_NVCC} --version OUTPUT_VARIABLE told ERROR_QUIET)
    string(REGEX MATCH "release ([0-9]+)\\.([0-9]+)" release "${told}")
    if(NOT release OR CMAKE_MATCH_1 LESS 12)
      set(reason "${FASTMAML_NVCC} is not of CUDA 12 or later (${release})")
    endif()
  endif()
  if(cuda STREQUAL "ON" AND reason)
    message(FATAL_ERROR "FASTMAML_CUDA=ON, but ${reason}. Install the CUDA toolkit 12 or 13, set "
                        "CUDA_HOME to where it is, or build with FASTMAML_CUDA=OFF.")
  elseif(reason)
    set(cuda OFF)
    set(cuda_build "none: ${reason}")
  elseif(NOT cuda_hosts AND NOT cuda_kernels)
    if(cuda STREQUAL "ON")
      message(FATAL_ERROR "FASTMAML_CUDA=ON, but this version of fastmaml has no CUDA backend. Build "
                          "with FASTMAML_CUDA=AUTO or OFF; models on a GPU then run on the "
                          "functional engine.")
    endif()
    set(cuda OFF)
    set(cuda_build "none: this version has no CUDA backend")
  else()
    set(cuda ON)
  endif()
elseif(cuda STREQUAL "OFF")
  set(cuda_build "none: built with FASTMAML_CUDA=OFF")
endif()

# ----------------------------------------------------------------------------- with nvcc
if(cuda STREQUAL "ON")
  set(archs ${FASTMAML_CUDA_ARCHS})
  if(NOT archs)
    find_program(NVIDIA_SMI nvidia-smi)
    if(NVIDIA_SMI)
      execute_process(COMMAND ${NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
                      OUTPUT_VARIABLE caps ERROR_QUIET)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]+" caps "${caps}")
      list(TRANSFORM caps REPLACE "\\." "")
      list(REMOVE_DUPLICATES caps)
      foreach(cap IN LISTS caps)
        if(cap LESS 80)
          message(FATAL_ERROR "The GPU here has compute capability ${cap}: fastmaml's kernels need "
                              "80 or later. Build with FASTMAML_CUDA=OFF.")
        endif()
        list(APPEND archs ${cap}-real)
      endforeach()
    endif()
  endif()
  if(NOT archs)
    set(archs 80-real 90) # 90: machine code, and PTX for what comes after
  endif()
  set(CMAKE_CUDA_COMPILER ${FASTMAML_NVCC})
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
  set(CMAKE_CUDA_ARCHITECTURES ${archs})
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
  set_source_files_properties(${cuda_hosts} PROPERTIES LANGUAGE CUDA)
  add_library(fm_cuda OBJECT ${cuda_kernels} ${cuda_hosts})
  target_compile_options(fm_cuda PRIVATE -lineinfo -Xcompiler=-Wall,-Wextra,-Wno-psabi)
  set(cuda_libraries CUDA::cudart_static)
  string(REPLACE ";" "," cuda_build "${archs}")
  set(cuda_build "CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${cuda_build}")
endif()

# ----------------------------------------------------------------------- as C++, for tests
if(cuda STREQUAL "EMULATED")
  set_source_files_properties(${cuda_kernels} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")
  add_library(fm_cuda OBJECT ${cuda_kernels} ${cuda_hosts} ${cuda_emulation})
  target_compile_options(fm_cuda PRIVATE $<$<NOT:$<BOOL:${FASTMAML_SANITIZE}>>:-O2>
                         -Wno-unknown-pragmas)
  set(cuda_build "emulated on the CPU")
endif()

if(TARGET fm_cuda)
  list(APPEND objects $<TARGET_OBJECTS:fm_cuda>)
  if(cuda_hosts) # the table that the binding asks for
    if(cuda STREQUAL "ON")
      target_compile_definitions(fm_bind PRIVATE FM_HAVE_CUDA)
      target_compile_definitions(fm_cuda PRIVATE FM_HAVE_CUDA)
    else()
      target_compile_definitions(fm_bind PRIVATE FM_HAVE_CUDA_EMULATED)
      target_compile_definitions(fm_cuda PRIVATE FM_HAVE_CUDA_EMULATED)
    endif()
  endif()
endif()
