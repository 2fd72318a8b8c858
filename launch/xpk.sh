#!/usr/bin/env bash
# A run on a GKE cluster made by xpk (pip install xpk), which writes the JobSet and queues it with Kueue.
#   launch/xpk.sh COMMAND NAME --cluster=CLUSTER --zone=ZONE [options] [-- jaxcl.main flags]
#   launch/xpk.sh create excon-1 --cluster=my-cluster --zone=us-central1-a --tpu-type=v5litepod-16 \
#       --image=REGION-docker.pkg.dev/PROJECT/REPO/jaxcl:1 -- --config=configs/excon.py --workdir=gs://my-bucket/excon
# Commands:
#   create   the workload, unless one of that name is there
#   logs     follow its first process
#   delete   the workload; the cluster and its nodes stay, and stay billed, until they scale down or are deleted
# Options:
#   --cluster=NAME --zone=ZONE --project=PROJECT (default: gcloud's own)
#   --tpu-type=TYPE [--num-slices=N]   or   --device-type=TYPE [--num-nodes=N] for GPUs
#   --image=IMAGE    a container with this project installed: pip install '.[tpu,gcs]' (or cuda), and configs/ in /jaxcl
#   --restarts=N     (default 50)   --dry_run: print the commands instead
set -euo pipefail
help() { sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; }
fail() { echo "xpk.sh: $1" >&2; exit 2; }
case "${1:-}" in
  create | logs | delete) command=$1; shift ;;
  -h | --help) help; exit 0 ;;
  *) help >&2; exit 2 ;;
esac
name=${1:-}; shift || true
[[ $name =~ ^[a-z][-a-z0-9]*$ ]] || fail "'$name' is no name for a workload; expected lower-case letters, digits and hyphens"
where=() kind=() image="" dry="" restarts=50
while [ $# -gt 0 ]; do
  case "$1" in
    --cluster=* | --zone=* | --project=*) where+=("$1") ;;
    --tpu-type=* | --num-slices=* | --device-type=* | --num-nodes=*) kind+=("$1") ;;
    --image=*) image=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --dry_run) dry=1 ;;
    --) shift; break ;;
    *) fail "unknown option $1; jaxcl.main's own flags come after --" ;;
  esac
  shift
done
[[ " ${where[*]} " == *" --cluster="* ]] || fail "no --cluster"
do_() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
there() { [ -z "$dry" ] && kubectl get jobset "$name" -o name >/dev/null 2>&1; }
case "$command" in
  create)
    [ -n "$image" ] || fail "no --image; a container with jaxcl installed"
    [ ${#kind[@]} -gt 0 ] || fail "no --tpu-type or --device-type; for example --tpu-type=v5litepod-16"
    [[ " $* " == *" --workdir=gs://"* ]] || fail "no --workdir=gs://...: the pods have no disk in common"
    if there; then echo "workload $name is there already"; exit 0; fi
    do_ xpk workload create "--workload=$name" "${where[@]}" "${kind[@]}" "--docker-image=$image" \
      "--max-restarts=$restarts" "--command=cd /jaxcl && exec python -m jaxcl.main $(printf '%q ' --distributed=auto "$@")"
    ;;
  logs)
    do_ kubectl logs --follow "--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" \
      --all-containers --tail=-1
    ;;
  delete) do_ xpk workload delete "--workload=$name" "${where[@]}" ;;
esac
