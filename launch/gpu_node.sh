#!/bin/bash
# One machine with GPUs: launch/gpu_node.sh --config=configs/1_8b.py --workdir=... ; restarts after a
# preemption (exit code 42) and on nothing else. DRY_RUN=1 prints the command.
set -u
cd "$(dirname "$0")/.." || exit 1
command=("${PYTHON:-python3}" -m qwen_jax.train "$@")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
stop=0
# bash does not pass signals on to its child, and the run must be told to save.
trap 'stop=1; kill -TERM "$child"' TERM INT
while true; do
  "${command[@]}" &
  child=$!
  wait "$child"
  code=$?
  if [ "$stop" -eq 1 ]; then
    wait "$child"  # the first wait was cut short by the signal
    code=$?
  fi
  if [ "$code" -ne 42 ] || [ "$stop" -eq 1 ]; then
    exit "$code"
  fi
done
