#!/usr/bin/env bash
# Everything about this checkout that only a GPU can tell, by one command in under ten minutes and
# without network: builds for the GPU present, tests, sanitizers, speed against the peers, kernels
# against the card's ceilings. Writes one JSON file, whatever fails on the way.
#
#   bench/gpu.sh [--out FILE] [--only STAGE ...] [--commit NAME]
#   bench/gpu.sh --dry        # the same steps on the CPU with CUDA emulated, tiny sizes
#
# Needs nvcc, a GPU, and a Python (PYTHON, default python3) with torch, pytest, numpy, setuptools,
# pybind11, cmake and ninja. Leaves the card's settings alone.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
# the Python's own cmake and ninja
PATH="$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH"
dry=
for argument in "$@"; do [ "$argument" = --dry ] && dry=1; done

refuse() {
  echo "bench/gpu.sh: $1" >&2
  exit 2
}

if [ -z "$dry" ]; then
  if ! command -v nvcc > /dev/null; then
    home="${CUDA_HOME:-${CUDA_PATH:-/usr/local/cuda}}"
    if [ -x "$home/bin/nvcc" ]; then PATH="$home/bin:$PATH"; fi
  fi
  command -v nvcc > /dev/null ||
    refuse "no nvcc on PATH or below CUDA_HOME: install the CUDA toolkit 12 or 13, or try --dry"
  nvidia-smi -L 2> /dev/null | grep -q '^GPU' ||
    refuse "nvidia-smi finds no GPU here: run it on a machine with one, or try --dry"
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    refuse "$python has no torch that sees the GPU: set PYTHON to one that has, or try --dry"
fi
export PATH PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" -m bench.gpu "$@"
