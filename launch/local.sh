#!/usr/bin/env bash
# Rehearse a multi-host run: several processes on this machine, each with fake CPU devices.
#   launch/local.sh PROCESSES DEVICES_EACH [flags of jaxcl train]
#   launch/local.sh 2 2 --config=configs/excon.py --workdir=runs/rehearsal
# Process K writes process-K.log into a temporary folder, whose name is printed. Process 0 also writes to the
# terminal. The script ends with the first exit code that is not 0 and then stops the other processes.
set -euo pipefail
if [ $# -lt 3 ] || [ "$1" = "--help" ]; then sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; fi
processes=$1 devices=$2; shift 2
python=${PYTHON:-python3}
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
logs=$(mktemp -d); echo "logs: $logs"
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
for ((i = 0; i < processes; i++)); do
  log="$logs/process-$i.log"
  run=(env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$devices"
       "$python" -m jaxcl train "--distributed=127.0.0.1:$port,$processes,$i" "$@")
  if [ "$i" = 0 ]; then "${run[@]}" > >(tee "$log") 2>&1 & else "${run[@]}" > "$log" 2>&1 & fi
  pids+=($!)
done
for _ in "${pids[@]}"; do wait -n || { code=$?; echo "a process ended with code $code; logs: $logs" >&2; exit "$code"; }; done
trap - EXIT
