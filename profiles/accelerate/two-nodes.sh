#!/usr/bin/env bash
# Starts one training job on two machines that share this folder: the --launch of `ruadapt run`.
# SECOND names the other machine, reached by ssh; MASTER is this one's address for it, PORT a free port of it;
# CONFIG is accelerate's configuration for both.
set -euo pipefail
: "${SECOND:?name the second machine}" "${MASTER:=$(hostname)}" "${PORT:=29500}"
: "${CONFIG:=profiles/accelerate/fsdp-2x8.yaml}"
# ssh gives the other machine none of this one's settings: neither the environment that holds `accelerate`.
settings=
for name in PATH PYTHONPATH LD_LIBRARY_PATH ${!HF_*} ${!NCCL_*} ${!GLOO_*} ${!TORCH_*} ${!OMP_*} ${!TOKENIZERS_*}; do
    # Whoever may list processes sees a command: no secrets. A job reads nothing from the hub.
    [[ -z ${!name+set} || $name == *_TOKEN ]] || settings+="export $name=${!name@Q}; "
done
shared="--config_file ${CONFIG@Q} --main_process_ip ${MASTER@Q} --main_process_port $PORT"
start() { echo "$settings cd ${PWD@Q} && exec accelerate launch $shared --machine_rank $1 $job"; }
job=${*@Q}
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
trap 'exit 143' HUP INT TERM
exec 3<&0
bash -c "$(start 0)" <&3 &
ssh -tt "$SECOND" "$(start 1)" < /dev/null &
# Whoever started this holds the other end of its input: gone, nobody waits for the job.
cat <&3 &> /dev/null &
starter=$!
# One machine that fails would leave the other waiting for it.
for _ in first second; do
    wait -n
    kill -0 $starter 2> /dev/null || exit 1
done
