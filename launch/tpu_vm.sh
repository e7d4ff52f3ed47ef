#!/usr/bin/env bash
# Runs an entry of jaxrec on every worker of a Cloud TPU VM; the workers find one another by JAX's own means.
#
#   TPU_NAME=pod ZONE=us-east5-a launch/tpu_vm.sh setup
#   TPU_NAME=pod ZONE=us-east5-a launch/tpu_vm.sh train --config=configs/tpu_pod.py --workdir=gs://bucket/run
#
# --dry-run (first) prints the commands instead of running them.
# Environment: TPU_NAME, ZONE; PROJECT (default: gcloud's); JAXREC_* and XLA_FLAGS go to the workers as they are.
set -euo pipefail

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
(($# > 0)) || usage
: "${TPU_NAME:?set TPU_NAME to the name of the TPU VM}" "${ZONE:?set ZONE to its zone}"

run() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

where=(--zone="$ZONE" --worker=all)
[[ ${PROJECT:-} ]] && where+=(--project="$PROJECT")

on_all_workers() {
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --command="$1"
}

if [[ $1 == setup ]]; then
  archive=$(mktemp --suffix=.tar.gz)
  trap 'rm -f "$archive"' EXIT
  run git archive --format=tar.gz --prefix=jaxrec/ --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:jaxrec.tar.gz" "${where[@]}"
  on_all_workers "set -e
command -v python3.11 > /dev/null || sudo apt-get install -y -q make python3.11 python3.11-venv
tar xzf jaxrec.tar.gz
make -C jaxrec install EXTRAS=tpu"
  exit
fi

entry=$1
shift
environment=(JAXREC_DISTRIBUTED=1)
for name in $(compgen -e | grep -E '^(JAXREC_|XLA_FLAGS$|LIBTPU_INIT_ARGS$)' || true); do
  environment+=("$name=${!name}")
done
on_all_workers "cd jaxrec && $(printf '%q ' env "${environment[@]}" .venv/bin/python -m "jaxrec.$entry" "$@")"
