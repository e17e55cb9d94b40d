#!/bin/bash
# All workers of one TPU pod: launch/tpu_pod.sh TPU_NAME ZONE --config=configs/7b.py --workdir=...
# Needs gcloud, and this repository with its environment at ~/qwen_jax on every worker. The processes
# find each other. DRY_RUN=1 prints the command.
set -eu
if [ "$#" -lt 3 ]; then
  echo "usage: $0 TPU_NAME ZONE ARGUMENTS_OF_TRAIN..." >&2
  exit 2
fi
name=$1 zone=$2
shift 2
remote="cd ~/qwen_jax && exec .venv/bin/python -m qwen_jax.train $(printf '%q ' "$@")"
command=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=$remote")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
