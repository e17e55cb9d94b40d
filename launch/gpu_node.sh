#!/bin/bash
# One machine with its GPUs (or CPUs):
#
#   launch/gpu_node.sh [--dry-run] --config=configs/1_8b.py --workdir=DIR ...
#
# The arguments are those of qwen_jax.train. Started again after exit code 42 and on nothing else;
# told to stop, it passes the signal on and returns the code of the run. PYTHON chooses the
# interpreter. --dry-run prints the command.
set -u
cd "$(dirname "$0")/.." || exit 1
dry_run=0
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
command=("${PYTHON:-python3}" -m qwen_jax.train "$@")
if [ "$dry_run" -eq 1 ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
child='' stopping=0
stop() {
  stopping=1
  if [ -n "$child" ]; then kill -TERM "$child"; fi
}
# bash does not pass signals on to its child, and the run must be told to save.
trap stop TERM INT
while true; do
  "${command[@]}" &
  child=$!
  if [ "$stopping" -eq 1 ]; then kill -TERM "$child"; fi  # it came before there was a child
  wait "$child"
  code=$?
  if [ "$stopping" -eq 1 ]; then
    wait "$child"  # the first wait was cut short by the signal
    exit "$?"
  fi
  if [ "$code" -ne 42 ]; then exit "$code"; fi
done
