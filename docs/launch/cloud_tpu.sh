#!/bin/bash
# Trains on a Cloud TPU slice of any number of hosts.
#
#   PROJECT=my-project ZONE=us-east5-b TYPE=v6e-16 \
#     docs/launch/cloud_tpu.sh --config=configs/tiny.py \
#     --workdir=/mnt/runs/tiny --config.parallel.preset=fsdp
#
# Makes the slice if it is not there, installs jaxlm on every host, mounts BUCKET
# (if given) at /mnt/runs, and starts the same command on all hosts: there jaxlm
# finds its place by the metadata server. The bucket has to have a hierarchical
# namespace: checkpoints rely on renaming folders at once. What a preemption
# stops goes on from its last checkpoint when this script is run again. The slice
# stays, and costs, until it is deleted:
#
#   gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --project="$PROJECT"
set -o errexit -o nounset -o pipefail

: "${PROJECT:?the Google Cloud project}"
: "${ZONE:?e.g. us-east5-b}"
: "${TYPE:?the kind and size of the slice, e.g. v6e-16}"
NAME=${NAME:-jaxlm}
BUCKET=${BUCKET:-}
SOURCE=${SOURCE:-.} # a checkout of jaxlm
case "$TYPE" in
  v6e-*) default_version=v2-alpha-tpuv6e ;;
  v5p-*) default_version=v2-alpha-tpuv5 ;;
  v5litepod-*) default_version=v2-alpha-tpuv5-lite ;;
  *) default_version=tpu-ubuntu2204-base ;;
esac
VERSION=${VERSION:-$default_version}

if (( $# == 0 )); then
  echo "usage: $0 --config=FILE --workdir=DIR [flags of jaxlm.train]" >&2
  exit 2
fi

tpu() { # a verb of `gcloud compute tpus tpu-vm`, for this slice
  local verb=$1
  shift
  gcloud compute tpus tpu-vm "$verb" "$@" --zone="$ZONE" --project="$PROJECT"
}

everywhere() { # a command on all hosts at once
  tpu ssh "$NAME" --worker=all --command="$1"
}

state=$(tpu describe "$NAME" --format='value(state)' 2>/dev/null || true)
if [[ "$state" == PREEMPTED || "$state" == TERMINATED ]]; then
  tpu delete "$NAME" --quiet
  state=
fi
if [[ -z "$state" ]]; then
  tpu create "$NAME" --accelerator-type="$TYPE" --version="$VERSION"
fi

archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
tar --exclude=.git --exclude=runs -C "$SOURCE" -czf "$archive" .
tpu scp "$archive" "$NAME":jaxlm.tar.gz --worker=all
everywhere "mkdir -p jaxlm && tar -C jaxlm -xzf jaxlm.tar.gz &&
  python3 -m venv venv && venv/bin/pip install -q -e './jaxlm[tpu]'"
if [[ -n "$BUCKET" ]]; then
  everywhere "mountpoint -q /mnt/runs || { sudo mkdir -p /mnt/runs &&
    sudo chown \$USER /mnt/runs && gcsfuse --implicit-dirs $BUCKET /mnt/runs; }"
fi

# Quoted once more, because the hosts' shells read the arguments again.
arguments=$(printf '%q ' "$@")
everywhere "cd jaxlm && ../venv/bin/python -u -m jaxlm.train $arguments"
