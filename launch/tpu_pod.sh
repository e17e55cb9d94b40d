#!/bin/bash
# Cloud TPU slices through queued resources, kept at work until the run is done:
#
#   launch/tpu_pod.sh --name=NAME --zone=ZONE [OPTIONS] -- --config=configs/7b.py --workdir=DIR ...
#
#   --type=v5p-256 --runtime=v2-alpha-tpuv5   create NAME when there is none (else it must exist)
#   --slices=N, --spot                        how it is created; default: one slice, not spot
#   --setup=COMMAND                           run on every host before each start, in its home
#                                             folder; it leaves this repository in ~/qwen_jax with
#                                             its packages in .venv (default: they are there)
#   --max-restarts=100
#   --dry-run                                 print the commands
#
# What follows -- are the arguments of qwen_jax.train; the workdir is one that all hosts see. The
# run is started again when it exits 42, when a host or the whole resource is lost, and on nothing
# else.
# Told to stop, it lets the run save and returns its code. The resource stays: delete it yourself.
set -u
name='' zone='' type='' runtime='' slices=1 spot='' setup=true max_restarts=100 dry_run=0
while [ "$#" -gt 0 ]; do
  case "$1" in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --spot) spot=--spot ;;
    --setup=*) setup=${1#*=} ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *) echo "$0: unknown option $1; the arguments of qwen_jax.train go after --" >&2 && exit 2 ;;
  esac
  shift
done
if [ -z "$name" ] || [ -z "$zone" ] || [ "$#" -eq 0 ]; then
  echo "usage: $0 --name=NAME --zone=ZONE [OPTIONS] -- ARGUMENTS_OF_TRAIN..." >&2
  exit 2
fi
if [ -n "$type" ] && [ -z "$runtime" ]; then
  echo "$0: --type=$type needs --runtime=VERSION, the software of the hosts" >&2
  exit 2
fi

# On each host. gcloud repeats a command whose connection broke, and a second start could not join
# the processes of the first: the folder `started` lets it run once. The lock is held as long as a
# run lives, so that the next start waits for what is left of the last.
prepare="$setup && cd ~/qwen_jax && flock -w 300 run.lock rm -rf started run.pid"
start="cd ~/qwen_jax && { mkdir started || exit 42; } && exec 9>run.lock && flock 9 || exit 1
.venv/bin/python -m qwen_jax.train $(printf '%q ' "$@") & echo \$! >run.pid
wait \$!; code=\$?; echo qwen_jax exit code \$code; exit \$code"
stop="cd ~/qwen_jax && timeout 60 sh -c 'until [ -s run.pid ]; do sleep 1; done'
kill -TERM \$(cat run.pid)"

resources=(gcloud compute tpus queued-resources)
find=("${resources[@]}" list "--zone=$zone" "--filter=name~/$name\$" "--format=value(state.state)")
create=("${resources[@]}" create "$name" "--zone=$zone" "--accelerator-type=$type"
  "--runtime-version=$runtime" ${spot:+"$spot"})
if [ "$slices" -gt 1 ]; then
  create+=("--node-count=$slices" "--node-prefix=$name")
else
  create+=("--node-id=$name")
fi
delete=("${resources[@]}" delete "$name" "--zone=$zone" --force --quiet)
# All hosts at once: with the default of 64 at a time the first 64 would wait for the rest for ever.
# A host that is gone closes no connection: ssh has to ask.
ssh=("${resources[@]}" ssh "$name" "--zone=$zone" --node=all --worker=all --batch-size=all
  --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oConnectTimeout=30)

if [ "$dry_run" -eq 1 ]; then
  show() { printf '# %s\n' "$1" && shift && printf '%q ' "$@" && echo; }
  show "state" "${find[@]}"
  if [ -n "$type" ]; then
    show "when there is none" "${create[@]}"
    show "when it was preempted or failed, before it is created again" "${delete[@]}"
  fi
  show "once it is ACTIVE, before each start" "${ssh[@]}" "--command=$prepare"
  show "start" "${ssh[@]}" "--command=$start"
  show "on SIGTERM" "${ssh[@]}" "--command=$stop"
  exit 0
fi

# Passes the output on; fails with the first code of a host that is a fault, 1 to 127 but not 42.
fault_of_a_host() {
  local line code fault=0
  while IFS= read -r line; do
    printf '%s\n' "$line"
    if [[ "$line" =~ qwen_jax\ exit\ code\ ([0-9]+)$ ]]; then
      code=${BASH_REMATCH[1]}
      if [ "$fault" -eq 0 ] && [ "$code" -ne 42 ] && [ "$code" -lt 128 ]; then fault=$code; fi
    fi
  done
  return "$fault"
}

# 0, the code of a fault, or 42: preempted, aborted because another host is gone, or out of reach.
run_on_all_hosts() {
  local codes
  "${ssh[@]}" "--command=$start" | fault_of_a_host
  codes=("${PIPESTATUS[@]}")
  if [ "${codes[1]}" -ne 0 ]; then return "${codes[1]}"; fi
  if [ "${codes[0]}" -ne 0 ]; then return 42; fi
}

running=0 stopping=0
# shellcheck disable=SC2329  # the trap calls it
on_signal() {
  stopping=1
  if [ "$running" -eq 1 ]; then "${ssh[@]}" "--command=$stop"; fi
}
trap on_signal TERM INT
pause() {
  sleep "$1" &
  wait "$!"
}

restarts=0
while [ "$stopping" -eq 0 ] && [ "$restarts" -le "$max_restarts" ]; do
  state=$("${find[@]}") || state=UNKNOWN
  echo "$name: ${state:-none}" >&2
  case "$state" in
    ACTIVE)
      code=42
      if "${ssh[@]}" "--command=$prepare" && [ "$stopping" -eq 0 ]; then
        running=1
        run_on_all_hosts &
        run=$!
        wait "$run"
        code=$?
        if [ "$stopping" -eq 1 ]; then
          wait "$run"  # the first wait was cut short by the signal
          code=$?
        fi
        running=0
      fi
      if [ "$code" -ne 42 ] || [ "$stopping" -eq 1 ]; then exit "$code"; fi
      restarts=$((restarts + 1))
      echo "$name: restart $restarts of at most $max_restarts" >&2
      pause 30
      ;;
    '')
      if [ -z "$type" ]; then
        echo "$0: there is no queued resource $name in $zone; --type and --runtime create it" >&2
        exit 2
      fi
      "${create[@]}" || exit 1
      pause 30
      ;;
    SUSPENDED | FAILED)
      if [ -z "$type" ]; then
        echo "$0: $name is $state; --type and --runtime let it be created anew" >&2
        exit 1
      fi
      "${delete[@]}" || pause 60
      ;;
    *) pause 60 ;;  # queued, being made, on its way out, or the state could not be read
  esac
done
if [ "$stopping" -eq 1 ]; then exit 143; fi
echo "$0: gave up after $max_restarts restarts" >&2
exit 42
