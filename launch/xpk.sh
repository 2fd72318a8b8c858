#!/usr/bin/env bash
# A run on a GKE cluster that xpk made (pip install xpk). xpk writes the JobSet and queues it with Kueue.
#   launch/xpk.sh COMMAND NAME --cluster=CLUSTER --zone=ZONE [options] [-- flags of jaxcl train]
#   launch/xpk.sh create excon-1 --cluster=my-cluster --zone=us-central1-a --tpu-type=v5litepod-16 \
#       --image=REGION-docker.pkg.dev/PROJECT/REPO/jaxcl:1 -- --config=configs/excon.py --workdir=gs://my-bucket/excon
# Commands:
#   create   create the workload, unless one of that name exists
#   logs     follow the log of its first process
#   delete   delete the workload; the nodes of the cluster stay, and are billed, until they scale down or are deleted
# Options:
#   --cluster=NAME --zone=ZONE --project=PROJECT (default: gcloud's own)
#   --tpu-type=TYPE [--num-slices=N]   or   --device-type=TYPE [--num-nodes=N] for GPUs
#   --image=IMAGE    a container with this project in /jaxcl, installed by pip install '.[tpu,gcs]' (or cuda)
#   --restarts=N     (default 50)   --dry_run: print the commands instead of running them
set -euo pipefail
help() { sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; }
fail() { echo "xpk.sh: $1" >&2; exit 2; }
case "${1:-}" in
  create | logs | delete) command=$1; shift ;;
  -h | --help) help; exit 0 ;;
  *) help >&2; exit 2 ;;
esac
name=${1:-}; shift || true
[[ $name =~ ^[a-z][-a-z0-9]*$ ]] || fail "'$name' is not a valid workload name; expected lower-case letters, digits and hyphens"
where=() kind=() image="" dry="" restarts=50
while [ $# -gt 0 ]; do
  case "$1" in
    --cluster=* | --zone=* | --project=*) where+=("$1") ;;
    --tpu-type=* | --num-slices=* | --device-type=* | --num-nodes=*) kind+=("$1") ;;
    --image=*) image=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --dry_run) dry=1 ;;
    --) shift; break ;;
    *) fail "unknown option $1; flags of jaxcl train come after --" ;;
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
    [[ " $* " == *" --workdir=gs://"* ]] || fail "no --workdir=gs://...: the pods share no disk"
    if there; then echo "workload $name already exists"; exit 0; fi
    do_ xpk workload create "--workload=$name" "${where[@]}" "${kind[@]}" "--docker-image=$image" \
      "--max-restarts=$restarts" "--command=cd /jaxcl && exec python -m jaxcl train $(printf '%q ' --distributed=auto "$@")"
    ;;
  logs)
    do_ kubectl logs --follow "--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" \
      --all-containers --tail=-1
    ;;
  delete) do_ xpk workload delete "--workload=$name" "${where[@]}" ;;
esac
