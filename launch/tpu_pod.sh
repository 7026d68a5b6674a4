#!/usr/bin/env bash
# A job on Cloud TPU slices, from asking for them to the end: queued resource, setup on all workers, run, resume, logs.
#
#   bash launch/tpu_pod.sh up JOB --name NAME --zone ZONE --type v5litepod-256 [options] -- WORDS...
#   bash launch/tpu_pod.sh logs|status|down --name NAME --zone ZONE [--project PROJECT]
#
#   bash launch/tpu_pod.sh up train --name b3o --zone us-west4-a --type v5litepod-256 --spot -- \
#     --config configs/pretrain_8b.py --workdir gs://BUCKET/runs/8b --config.init_from=gs://BUCKET/models/start-8b \
#     --config.data.path=gs://BUCKET/captions
#
# JOB is train, generate, caption or cache-features; WORDS are those of `blip3o JOB`. `up` does what is missing: it asks for
# the slice, waits, copies this checkout (what git has committed) and installs it, starts the job on every worker, and
# stays. When the job was pre-empted (exit status 75), or the slice or one of its machines was lost, it starts again: the
# job goes on from its last save. Call `up` again after this machine was off. The slice stays until `down`, which deletes
# only what `up` asked for on this machine (noted in $BLIP3O_STATE, by default ~/.local/state/blip3o).
#
#   --type TYPE        accelerator type: v4-512, v5litepod-256, v5p-128, v6e-256
#   --slices N         so many slices of that type (default 1)
#   --version NAME     runtime version (default: the one for the type)
#   --spot             may be taken away at any time; --reserved: from your reservation
#   --env NAME=VALUE   set on the workers; may be repeated
#   --attempts N       start at most so often (default 100)
#   --dry-run          print the exact commands, run none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

zone="" project="" type="" slices=1 version=""
read_words "zone project type slices version" "spot reserved" "$@"
check_word --zone "$zone"
check_count --slices "$slices"
where=("--zone=$zone")
[[ -z "$project" ]] || { check_word --project "$project" && where+=("--project=$project"); }

state="${BLIP3O_STATE:-$HOME/.local/state/blip3o}/tpu"
ours="$state/${project:-default}.$zone.$name" # exists while a slice that `up` asked for does
there="blip3o-$name"           # of the checkout on the workers
extras=tpu,gcs                 # what it is installed with
tpu=(gcloud compute tpus)

# ---- the slice

runtime_version() {
  case "$type" in
  v4-* | v5p-*) [[ $type == v4-* ]] && printf 'tpu-ubuntu2204-base' || printf 'v2-alpha-tpuv5' ;;
  v5litepod-*) printf 'v2-alpha-tpuv5-lite' ;;
  v6e-*) printf 'v2-alpha-tpuv6e' ;;
  *) die "--type is $(printf %q "$type"); take v4-N, v5litepod-N, v5p-N or v6e-N" ;;
  esac
}

# MISSING only if the cloud says so: an expired token or a lost network is UNKNOWN, and says nothing about the slice.
slice_state() {
  local out
  if out="$("${tpu[@]}" queued-resources describe "$name" "${where[@]}" "--format=value(state.state)" 2>&1)"; then
    grep -xE '[A-Z_]+' <<<"$out" || echo UNKNOWN # gcloud's warnings may stand beside it
  elif [[ "$out" == *NOT_FOUND* ]]; then
    echo MISSING
  else
    echo UNKNOWN
  fi
}

lost() { [[ "$(slice_state)" == @(MISSING|DELETING|SUSPENDING|SUSPENDED|FAILED) ]]; }

create() {
  local nodes=("--node-id=$name")
  [[ "$slices" == 1 ]] || nodes=("--node-count=$slices" "--node-prefix=$name")
  # Noted before it is asked for: what is asked for can always be deleted again.
  [[ -n "${DRY_RUN:-}" ]] || { mkdir -p "$state" && printf '%s\n' "$type x $slices" >"$ours"; }
  if ! retry "${tpu[@]}" queued-resources create "$name" "${nodes[@]}" "${where[@]}" "--accelerator-type=$type" \
    "--runtime-version=${version:-$(runtime_version)}" "${tier[@]}"; then
    [[ "$(slice_state)" != MISSING ]] || { rm -f "$ours" && die "gcloud refused to make the slice $name, see above"; }
  fi
}

delete() {
  [[ -n "${DRY_RUN:-}" || -e "$ours" ]] ||
    die "$name in $zone was not asked for by this script on this machine, so it is not deleted; use gcloud yourself"
  run "${tpu[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet ||
    [[ "$(slice_state)" == MISSING ]] || return 1
  [[ -n "${DRY_RUN:-}" ]] || rm -f "$ours"
}

# Leaves an active slice, asked for as often as it takes.
have_slice() {
  local now
  while now="$(slice_state)" && [[ "$now" != ACTIVE ]]; do
    say "the slice is $now"
    case "$now" in
    MISSING) create ;;
    FAILED | SUSPENDED) delete || say "it could not be deleted; trying again" ;; # else the cloud keeps its name
    esac
    sleep "$poll"
  done
}

# ---- the workers

nodes() {
  local i
  if [[ "$slices" == 1 ]]; then printf '%s\n' "$name"; else for ((i = 0; i < slices; i++)); do printf '%s\n' "$name-$i"; done; fi
}

# on_workers WORKERS COMMAND: one shell command on the workers of every slice.
on_workers() {
  local node
  for node in $(nodes); do
    retry "${tpu[@]}" tpu-vm ssh "$node" "${where[@]}" "--worker=$1" "--command=$2" || return
  done
}

setup() {
  local node folder status=0
  folder="$(mktemp -d)"
  run git archive --format=tar.gz "--output=$folder/blip3o.tar.gz" HEAD || die "git cannot pack this checkout, see above"
  for node in $(nodes); do
    retry "${tpu[@]}" tpu-vm scp "$folder/blip3o.tar.gz" "$node:$there.tar.gz" "${where[@]}" --worker=all || status=$?
  done
  rm -rf "$folder"
  [[ "$status" == 0 ]] || return "$status"
  # Ubuntu 22.04, which the machines run, brings Python 3.10; fresh ones may still be busy with updates of their own.
  local install="BLIP3O_EXTRAS=$extras bash launch/local.sh --version" apt="apt-get -qq -o DPkg::Lock::Timeout=300"
  apt="sudo $apt update && sudo DEBIAN_FRONTEND=noninteractive $apt install python3.11-venv"
  on_workers all "mkdir -p $there && tar xzf $there.tar.gz -C $there && cd $there && { $install || { $apt && $install; }; }"
}

# Shell words for a worker: is the job running there?
running="{ [ ! -s $name.status ] && kill -0 \$(cat $name.pid); } 2>/dev/null"

# Starts the job on every worker where it is not running, detached from the connection; its exit status is left in a file.
start() {
  local line inner settings=("LIBTPU_INIT_ARGS=$(tpu_flags "$type")" "BLIP3O_EXTRAS=$extras" BLIP3O_DISTRIBUTED=1)
  mapfile -t line < <(job_words "$job")
  line=(env "${settings[@]}" "${variables[@]}" bash launch/local.sh "${line[@]:1}" "${words[@]}")
  inner="cd $there && $(quoted "${line[@]}") >>../$name.log 2>&1; echo \$? >~/$name.status"
  inner="setsid nohup bash -c $(quoted "$inner") </dev/null >/dev/null 2>&1 & echo \$! >$name.pid"
  on_workers all "$running || { rm -f $name.status; $inner; }"
}

# One line a worker: its exit status, "running" or "gone" (the machine came back without the job). 1 if not all answer.
worker_states() {
  local node look="if $running; then echo running; else grep -s . $name.status || echo gone; fi"
  for node in $(nodes); do
    "${tpu[@]}" tpu-vm ssh "$node" "${where[@]}" --worker=all "--command=$look" |
      grep -xE '[0-9]+|running|gone' || return 1
  done
}

# Waits for the end of the job: 0, 75 (start again), 76 (the slice or a machine is lost), or the status of a worker.
follow() {
  local states failed
  while true; do
    ! lost || return 76
    if ! states="$(worker_states 2>/dev/null)"; then
      say "not all workers answer; waiting" # which says nothing about the job
    elif ! grep -qx running <<<"$states"; then
      break
    fi
    sleep "$poll"
  done
  # A status counts when all have ended: of a machine that is lost, JAX tells the others by ending them with any status.
  ! grep -qx gone <<<"$states" || return 76
  if ! failed="$(grep -vxE '0|75' <<<"$states" | sort -n)"; then
    ! grep -qx 75 <<<"$states" || return 75
    return 0
  fi
  sleep "$poll" # the workers of a slice that is being taken away fail before the cloud says so
  ! lost || return 76
  ! grep -qx 2 <<<"$failed" || return 2 # it says more than those which ended because of it
  return "${failed%%$'\n'*}"
}

# attempt LAST: one more, after one that ended with the status LAST; "running" if there is nothing to start.
attempt() {
  if [[ "$1" != running ]] && ! { { [[ "$1" == 75 ]] || setup; } && start; }; then
    ! lost || return 76
    return 1
  fi
  follow
}

up() {
  check_word --type "$type"
  runtime_version >/dev/null
  tpu_flags "$type" >/dev/null
  [[ -z "$version" ]] || check_word --version "$version"
  if [[ -n "${DRY_RUN:-}" ]]; then
    create
    setup
    start
    say "then it is looked at every $poll s, and started again after status 75, up to $attempts times"
    return 0
  fi
  local i states status=0 last="" at="--name $name --zone $zone"
  local paid="the slice is still yours, and is paid for: bash launch/tpu_pod.sh down $at"
  have_slice
  until states="$(worker_states)"; do
    say "not all workers answer; waiting" && sleep "$poll"
    have_slice
  done
  ! grep -qx running <<<"$states" || { say "the job is running already" && last=running; }
  for ((i = 1; i <= attempts; i++)); do
    say "attempt $i; bash launch/tpu_pod.sh logs $at shows what it says"
    status=0
    attempt "$last" || status=$?
    case "$status" in
    0) say "done; $paid" && return 0 ;;
    75) say "pre-empted, everything saved; starting again" ;;
    76)
      # The cloud keeps the name of what it takes away.
      [[ "$(slice_state)" != @(MISSING|DELETING) ]] || die "somebody deleted the slice $name; not asked for again"
      say "the slice or one of its machines was lost; starting again"
      have_slice
      ;;
    *) say "failed with status $status, see above and the log; $paid" && return "$status" ;;
    esac
    last="$status"
  done
  say "started $attempts times and not done"
  return 75
}

case "$verb" in
up) up ;;
logs) on_workers 0 "tail -n 100 -F $name.log" ;;
status)
  run "${tpu[@]}" queued-resources describe "$name" "${where[@]}"
  [[ -n "${DRY_RUN:-}" ]] || worker_states || say "not all workers answer"
  ;;
down) delete ;;
esac
