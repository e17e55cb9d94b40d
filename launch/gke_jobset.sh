#!/bin/bash
# One or several TPU slices of a GKE cluster, as the JobSet of launch/gke_jobset.yaml:
#
#   launch/gke_jobset.sh --name=NAME --image=IMAGE --claim=PVC --topology=4x4x4 [OPTIONS] -- \
#       --config=configs/7b.py --workdir=/data/run ...
#
#   --image=IMAGE                 its working folder is this repository, python3 has the packages
#   --claim=PVC                   a volume claim that many nodes may write; seen as /data
#   --accelerator=tpu-v5p-slice   and --topology: labels of the node pool
#   --slices=1, --chips-per-host=4
#   --queue=multislice-queue      the local queue of Kueue; without Kueue it means nothing
#   --max-restarts=100
#   --dry-run                     print the command and what it applies
#
# What follows -- are the arguments of qwen_jax.train. The JobSet controller starts all hosts again
# when the run exits 42 or a host is lost, and fails on everything else. The command
# `kubectl delete jobset NAME` stops the run, which saves first.
set -eu
name='' image='' claim='' accelerator=tpu-v5p-slice topology='' slices=1 chips=4
queue=multislice-queue max_restarts=100 dry_run=0
while [ "$#" -gt 0 ]; do
  case "$1" in
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --claim=*) claim=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --chips-per-host=*) chips=${1#*=} ;;
    --queue=*) queue=${1#*=} ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *) echo "$0: unknown option $1; the arguments of qwen_jax.train go after --" >&2 && exit 2 ;;
  esac
  shift
done
if [[ -z "$name" || -z "$image" || -z "$claim" || -z "$topology" || "$#" -eq 0 ]]; then
  echo "usage: $0 --name= --image= --claim= --topology= [OPTIONS] -- ARGUMENTS_OF_TRAIN..." >&2
  exit 2
fi
if [[ ! "$topology" =~ ^[0-9]+(x[0-9]+)+$ ]]; then
  echo "$0: --topology=$topology must read like 4x4 or 2x2x4" >&2
  exit 2
fi
hosts=$((${topology//x/*} / chips))
if [ "$((hosts * chips))" -ne "$((${topology//x/*}))" ]; then
  echo "$0: --topology=$topology is no multiple of --chips-per-host=$chips" >&2
  exit 2
fi
# The arguments as a JSON list, which is YAML: no value of theirs can change the manifest.
arguments=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@")
export name image claim accelerator topology slices chips hosts queue max_restarts arguments
manifest=$(python3 -c 'import os, string, sys
print(string.Template(open(sys.argv[1]).read()).substitute(os.environ))' \
  "$(dirname "$0")/gke_jobset.yaml")
if [ "$dry_run" -eq 1 ]; then
  printf "kubectl apply -f - <<'YAML'\n%s\nYAML\n" "$manifest"
  exit 0
fi
kubectl apply -f - <<<"$manifest"
