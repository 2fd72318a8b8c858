#!/usr/bin/env bash
# The commands that launch/tpu_vm.sh runs on each worker of a TPU; do not call it by hand.
#   tpu_worker.sh setup | start [flags of jaxcl train] | follow | stop
# The run is in the background and outlives the ssh connection that started it: ~/run.pid, ~/run.log, ~/run.exit.
set -euo pipefail
cd "$HOME/jaxcl"
alive() { [ -f ~/run.pid ] && kill -0 "$(cat ~/run.pid)" 2>/dev/null; }
case "${1:-}" in
  setup)
    want=$(cat setup.cfg setup.py pyproject.toml | sha256sum)
    if [ "$(cat ~/env/.made 2>/dev/null)" = "$want" ]; then exit 0; fi
    rm -rf ~/env
    for python in python3.13 python3.12 python3.11; do
      if "$python" -m venv ~/env 2>/dev/null; then break; fi
    done
    # The VM's own Python may be too old.
    if [ ! -x ~/env/bin/pip ]; then
      rm -rf ~/env; python3 -m pip install -q --user uv; python3 -m uv venv -q --seed --python 3.12 ~/env
    fi
    ~/env/bin/pip install -q -e '.[tpu,gcs]'
    echo "$want" > ~/env/.made
    ;;
  start)
    shift
    if alive; then echo "the run is active as process $(cat ~/run.pid)"; exit 0; fi
    rm -f ~/run.exit
    # shellcheck disable=SC2016  # the inner shell expands them
    setsid nohup bash -c 'trap "kill -TERM \$child" TERM
      ~/env/bin/python -m jaxcl train "$@" & child=$!
      code=0; wait "$child" || code=$?
      while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
      echo "$code" > ~/run.exit' run "$@" >> ~/run.log 2>&1 < /dev/null &
    echo $! > ~/run.pid
    ;;
  follow)
    tail -n +1 -F --pid="$(cat ~/run.pid)" ~/run.log
    exit "$(cat ~/run.exit 2>/dev/null || echo 75)"  # no exit code: the run was killed
    ;;
  stop)
    if alive; then kill -TERM "$(cat ~/run.pid)"; fi
    for ((i = 0; i < 300; i++)); do if alive; then sleep 1; else exit 0; fi; done
    echo "the run did not end within 300 s" >&2; exit 1
    ;;
  *) sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
