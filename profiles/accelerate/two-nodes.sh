#!/usr/bin/env bash
# Starts one training job on two machines that share this folder: the --launch of `ruadapt run`.
# SECOND names the other machine, reached by ssh; MASTER is this one's address for it.
set -euo pipefail
: "${SECOND:?name the second machine}" "${MASTER:=$(hostname)}"
shared="--config_file profiles/accelerate/fsdp-2x8.yaml --main_process_ip $MASTER --main_process_port 29500"
start() { echo "cd ${PWD@Q} && exec accelerate launch $shared --machine_rank $1 $job"; }
job=${*@Q}
ssh -tt "$SECOND" "$(start 1)" < /dev/null &
second=$!
trap 'kill $second 2> /dev/null || true' EXIT
bash -c "$(start 0)"
wait "$second"
