# Whether there will be a CUDA backend. Reads `cuda` (AUTO, ON, OFF or EMULATED), and leaves it ON,
# OFF or EMULATED; sets `cuda_archs` where it is ON, and `cuda_build` (what was built, for people)
# where it is OFF.
file(GLOB cuda_kernels CONFIGURE_DEPENDS csrc/cuda/*.cu)
file(GLOB cuda_hosts CONFIGURE_DEPENDS csrc/cuda/backend_*.cpp)

if(cuda MATCHES "^(AUTO|ON)$")
  find_program(
    FASTMAML_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
    DOC "the CUDA compiler")
  set(reason "")
  if(NOT EXISTS "${FASTMAML_NVCC}")
    set(reason "found no nvcc on PATH or below CUDA_HOME")
  else()
    execute_process(COMMAND ${FASTMAML_NVCC} --version OUTPUT_VARIABLE told ERROR_QUIET)
    string(REGEX MATCH "release ([0-9]+)\\.[0-9]+" release "${told}")
    if(NOT release OR CMAKE_MATCH_1 LESS 12)
      set(reason "${FASTMAML_NVCC} is not of CUDA 12 or later (it says '${release}')")
    endif()
  endif()
  # Without a wish: of the GPUs here, else of A100 and H100, with PTX for what comes after.
  set(cuda_archs ${FASTMAML_CUDA_ARCHS})
  find_program(NVIDIA_SMI nvidia-smi)
  if(NOT cuda_archs AND NVIDIA_SMI)
    execute_process(COMMAND ${NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE caps ERROR_QUIET)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" caps "${caps}")
    list(REMOVE_DUPLICATES caps)
    foreach(cap IN LISTS caps)
      if(cap VERSION_GREATER_EQUAL 8.0)
        string(REPLACE "." "" cap ${cap})
        list(APPEND cuda_archs ${cap}-real)
      endif()
    endforeach()
    if(caps AND NOT cuda_archs)
      set(reason "the GPU here has compute capability ${caps}, and fastmaml needs 8.0 or later")
    endif()
  endif()
  if(NOT cuda_archs)
    set(cuda_archs 80-real 90)
  endif()

  if(cuda STREQUAL "ON" AND reason)
    message(FATAL_ERROR "FASTMAML_CUDA=ON, but ${reason}. Install the CUDA toolkit 12 or 13, set "
                        "CUDA_HOME to where it is and FASTMAML_CUDA_ARCHS to what it shall be "
                        "built for, or build with FASTMAML_CUDA=OFF.")
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
