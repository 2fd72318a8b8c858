#!/usr/bin/env bash
# A run on a Cloud TPU VM, from one host to a whole pod slice. Every command can be repeated; it does what is left.
#   launch/tpu_vm.sh COMMAND NAME --zone=ZONE [options] [-- flags of jaxcl train]
#   launch/tpu_vm.sh train my-tpu --zone=us-central1-a --type=v5litepod-16 --spot -- \
#       --config=configs/excon.py --workdir=gs://my-bucket/excon
# Commands:
#   create   create the TPU unless it exists; a preempted TPU is deleted and created again
#   copy     copy this project to all workers and make a Python environment on each
#   start    start the run on all workers, in the background, unless it is running
#   logs     follow the log of worker 0; ends with the run and with its exit code
#   stop     send SIGTERM on all workers: the run saves its state and ends
#   delete   delete the TPU, which ends billing
#   train    create, copy, start, logs, delete; repeated after a preemption or a lost host (exit code 75)
# Options:
#   --zone=ZONE      --project=PROJECT (default: gcloud's own)
#   --type=TYPE      accelerator type, such as v5litepod-16
#   --version=NAME   software of the VM, such as v2-alpha-tpuv5-lite (default: chosen by the type)
#   --spot           cheaper capacity that can be preempted at any time
#   --restarts=N     most restarts of `train` (default 20)   --keep: `train` does not delete the TPU
#   --dry_run        print the commands instead of running them
# The TPU is billed from `create` until `delete`, even if nothing runs. The script needs gcloud, logged in, with the TPU
# API enabled.
set -euo pipefail
help() { sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; }
fail() { echo "tpu_vm.sh: $1" >&2; exit 2; }
case "${1:-}" in
  create | copy | start | logs | stop | delete | train) command=$1; shift ;;
  -h | --help) help; exit 0 ;;
  *) help >&2; exit 2 ;;
esac
name=${1:-}; shift || true
[[ $name =~ ^[a-z][-a-z0-9]*$ ]] || fail "'$name' is not a valid TPU name; expected lower-case letters, digits and hyphens"

zone="" project="" type="" version="" spot="" keep="" dry="" restarts=20
while [ $# -gt 0 ]; do
  case "$1" in
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --spot) spot=1 ;;
    --keep) keep=1 ;;
    --dry_run) dry=1 ;;
    --) shift; break ;;
    *) fail "unknown option $1; flags of jaxcl train come after --" ;;
  esac
  shift
done
[ -n "$zone" ] || fail "no --zone; for example --zone=us-central1-a"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts is '$restarts'; expected a number"
root=$(cd "$(dirname "$0")/.." && pwd)
where=("--zone=$zone"); [ -z "$project" ] || where+=("--project=$project")
if [ -z "$version" ]; then
  case "$type" in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi

do_() {  # run a command, or print it
  if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
on() {  # on WORKERS SHELL_COMMAND
  do_ gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
}
state() {  # READY, CREATING, PREEMPTED, ...; empty: no such TPU
  if [ -n "$dry" ]; then do_ gcloud compute tpus tpu-vm describe "$name" "${where[@]}" "--format=value(state)" >&2; return; fi
  gcloud compute tpus tpu-vm describe "$name" "${where[@]}" "--format=value(state)" 2>/dev/null || true
}
delete() {
  if [ -n "$dry" ] || [ -n "$(state)" ]; then do_ gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet; fi
}
create() {
  [ -n "$type" ] || fail "no --type; for example --type=v5litepod-16"
  case "$(state)" in
    READY | CREATING) return ;;
    "") ;;
    *) delete || return ;;  # a preempted or stopped TPU cannot be started again
  esac
  do_ gcloud compute tpus tpu-vm create "$name" "${where[@]}" "--accelerator-type=$type" "--version=$version" ${spot:+--spot}
}
copy() {
  local archive; archive=$(mktemp -d)/jaxcl.tar.gz
  do_ tar -C "$root" -czf "$archive" jaxcl configs launch setup.cfg setup.py pyproject.toml README.md LICENSE NOTICE &&
    do_ gcloud compute tpus tpu-vm scp "$archive" "$name:jaxcl.tar.gz" "${where[@]}" --worker=all &&
    on all "mkdir -p jaxcl && tar -C jaxcl -xzf jaxcl.tar.gz && bash jaxcl/launch/tpu_worker.sh setup" || return
  rm -rf "$(dirname "$archive")"
}
start() {
  [[ " $* " == *" --workdir=gs://"* ]] || fail "no --workdir=gs://...: the workers share no disk, and the disk of a TPU is lost with it"
  on all "bash jaxcl/launch/tpu_worker.sh start $(printf '%q ' --distributed=auto "$@")"
}
logs() { on 0 "bash jaxcl/launch/tpu_worker.sh follow"; }
stop() { on all "bash jaxcl/launch/tpu_worker.sh stop"; }
train() {
  local code tries=0 had=""
  while true; do
    code=0
    create && had=1 && copy && start "$@" && logs || code=$?
    # 75: stopped on request, or a host was lost. 255: an error of ssh, because the TPU was preempted or only because the
    # connection broke while the run continues. If no TPU was ever created, there is no capacity or an option is wrong.
    if [ "$code" = 0 ] || { [ -z "$had" ] && [ -z "$spot" ]; }; then break; fi
    if [ "$(state)" = READY ]; then
      case "$code" in
        75) stop || true ;;  # stop the processes that are left on other workers
        255) ;;
        *) break ;;
      esac
    fi
    tries=$((tries + 1))
    if [ "$tries" -gt "$restarts" ]; then echo "tpu_vm.sh: gave up after $restarts restarts" >&2; break; fi
    echo "tpu_vm.sh: exit code $code; restart $tries of $restarts" >&2
    sleep "${TPU_VM_RETRY_SECONDS:-60}"
  done
  if [ -z "$keep" ]; then delete; fi
  return "$code"
}
"$command" "$@"
