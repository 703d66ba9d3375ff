#!/bin/bash
# A TPU pod slice of TPU VMs, driven from your own machine:
#
#   TPU=name ZONE=us-west4-a launch/tpu-pod.sh configs/quickstart.py /shared/runs/quickstart [flags …]
#
# Every worker needs this repository with its .venv in ~/siglip, and a shared folder (a Filestore share, or a bucket mounted
# with gcsfuse) under the same path. Set up once:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker=all --command '
#     git clone REPOSITORY siglip && cd siglip && python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[tpu]"
#     sudo mkdir -p /shared && sudo mount -t nfs ADDRESS:/share /shared'
#
# The workers find each other through the metadata server. When they stop, this script starts them again, until the run is done,
# the input is bad (exit code 2), or it has tried 50 times. Ctrl-C stops only this script. To stop the run, send SIGTERM to one
# worker (--worker=0 --command 'pkill -TERM -f "siglip train"'): all save the same step.
# A spot TPU is reclaimed without a signal to processes started through ssh; it loses at most checkpoint.every_steps.

set -uo pipefail
tpu=${TPU:?the name of the TPU} zone=${ZONE:?its zone}
config=${1:?a recipe, such as configs/quickstart.py}
workdir=${2:?a folder that all workers share}
shift 2

# Compiler flags, commented out; docs/scaling.md says which are worth trying.
environment="JAX_COMPILATION_CACHE_DIR=$(printf %q "$(dirname "$workdir")/xla-cache")" # LIBTPU_INIT_ARGS=...
arguments=$(printf ' %q' "$config" --workdir "$workdir" "$@")

for attempt in $(seq 50); do
  gcloud compute tpus tpu-vm ssh "$tpu" --zone "$zone" --worker=all \
    --command "cd siglip && $environment exec .venv/bin/siglip train$arguments"
  code=$?
  case $code in
    0 | 2) exit $code ;;
  esac
  echo "attempt $attempt ended with $code; starting again in 30 s" >&2
  sleep 30
done
exit 1
