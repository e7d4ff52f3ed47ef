#!/usr/bin/env bash
# Runs an entry of jaxrec on one machine with one or more GPUs: one process drives them all.
#
#   launch/gpu_box.sh setup
#   launch/gpu_box.sh train --config=configs/multi_gpu.py --workdir=runs/multi_gpu
#
# --dry-run (first) prints the commands instead of running them.
# Environment: CUDA_VISIBLE_DEVICES chooses the GPUs; XLA_FLAGS and JAXREC_* go through as they are.
# XLA_FLAGS=--xla_gpu_deterministic_ops=true makes runs, and those that were killed and resumed, equal to the bit.
set -euo pipefail

usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
(($# > 0)) || usage

run() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ $1 == setup ]]; then
  run make install EXTRAS=cuda
  exit
fi

entry=$1
shift
# A GPU that cannot be used is an error, never a silent day on the CPU. JAX takes most of the memory at once,
# since a table that grows into a fragmented heap fails late.
# `exec`: the signal that warns of a preemption must reach the training, not this shell.
run exec env JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}" \
  XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}" \
  .venv/bin/python -m "jaxrec.$entry" "$@"
