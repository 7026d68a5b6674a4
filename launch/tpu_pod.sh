#!/usr/bin/env bash
# A job on Cloud TPU slices, from asking for them to the end: queued resource, setup on all workers, run, resume, logs.
#
#   bash launch/tpu_pod.sh up JOB --name NAME --zone ZONE --type v5litepod-256 [options] -- WORDS...
#   bash launch/tpu_pod.sh logs|status|down --name NAME --zone ZONE [--project PROJECT]
#
#   bash launch/tpu_pod.sh up train --name b3o --zone us-west4-a --type v5litepod-256 --spot -- \
#     --config configs/pretrain_8b.py --workdir gs://BUCKET/runs/8b --config.init_from=gs://BUCKET/models/start-8b
#
# JOB is train, generate, caption or cache-features; WORDS are those of `blip3o JOB`. `up` does what is missing: it asks for
# the slice, waits, copies this checkout (what git has committed) and installs it, starts the job on every worker, and
# stays. When the job was pre-empted (exit status 75) or the slice was taken away it starts again: the job goes on from
# its last save. Call `up` again after this machine was off. The slice stays until `down`, which deletes only what `up`
# asked for on this machine (noted in $BLIP3O_STATE, by default ~/.local/state/blip3o).
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
poll="${BLIP3O_POLL_SECONDS:-30}"
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

slice_state() {
  "${tpu[@]}" queued-resources describe "$name" "${where[@]}" "--format=value(state.state)" 2>/dev/null || true
}

create() {
  local nodes=("--node-id=$name")
  [[ "$slices" == 1 ]] || nodes=("--node-count=$slices" "--node-prefix=$name")
  # Noted before it is asked for: what is asked for can always be deleted again.
  [[ -n "${DRY_RUN:-}" ]] || { mkdir -p "$state" && printf '%s\n' "$type x $slices" >"$ours"; }
  run "${tpu[@]}" queued-resources create "$name" "${nodes[@]}" "${where[@]}" "--accelerator-type=$type" \
    "--runtime-version=${version:-$(runtime_version)}" "${tier[@]}"
}

delete() {
  [[ -n "${DRY_RUN:-}" || -e "$ours" ]] ||
    die "$name in $zone was not asked for by this script on this machine, so it is not deleted; use gcloud yourself"
  run "${tpu[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
  [[ -n "${DRY_RUN:-}" ]] || rm -f "$ours"
}

# Leaves an active slice; 1 if there is nothing to wait for.
wait_for_slice() {
  local now
  while true; do
    now="$(slice_state)"
    case "$now" in
    ACTIVE) return 0 ;;
    FAILED | SUSPENDED | SUSPENDING) say "the slice is $now" && return 1 ;;
    *) say "the slice is ${now:-not known yet}; waiting" && sleep "$poll" ;;
    esac
  done
}

have_slice() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    create
    return
  fi
  case "$(slice_state)" in
  "") create ;;
  FAILED | SUSPENDED) delete && create ;; # the cloud keeps the name of a slice that it took away
  *) say "the slice $name is there already" ;;
  esac
  # A slice that is taken away while it is waited for is asked for again.
  wait_for_slice || { delete && create && wait_for_slice; }
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
    run "${tpu[@]}" tpu-vm ssh "$node" "${where[@]}" "--worker=$1" "--command=$2"
  done
}

setup() {
  local node archive
  archive="$(mktemp -d)/blip3o.tar.gz"
  run git archive --format=tar.gz "--output=$archive" HEAD
  for node in $(nodes); do
    run "${tpu[@]}" tpu-vm scp "$archive" "$node:$there.tar.gz" "${where[@]}" --worker=all
  done
  on_workers all "mkdir -p $there && tar xzf $there.tar.gz -C $there && cd $there && BLIP3O_EXTRAS=tpu bash launch/local.sh --version"
  rm -rf "$(dirname "$archive")"
}

# Starts the job on every worker, detached from the connection; its exit status is left in a file.
start() {
  local line settings=("LIBTPU_INIT_ARGS=$(tpu_flags "$type")" BLIP3O_EXTRAS=tpu BLIP3O_DISTRIBUTED=1)
  mapfile -t line < <(job_words "$job")
  line=(env "${settings[@]}" "${variables[@]}" bash launch/local.sh "${line[@]:1}" "${words[@]}")
  local inner
  inner="$(quoted "${line[@]}") >>../$name.log 2>&1; echo \$? >../$name.status"
  on_workers all "cd $there && rm -f ../$name.status && { setsid nohup bash -c $(quoted "$inner") </dev/null >/dev/null 2>&1 & echo \$! >../$name.pid; }"
}

# One line a worker: its exit status, "running" or "gone" (the machine came back without the job).
worker_states() {
  local look="cat $name.status 2>/dev/null || { kill -0 \$(cat $name.pid 2>/dev/null) 2>/dev/null && echo running || echo gone; }"
  local node
  for node in $(nodes); do
    "${tpu[@]}" tpu-vm ssh "$node" "${where[@]}" --worker=all "--command=$look" 2>/dev/null
  done
}

# Waits for the end of the job: 0, 75 (start again), 76 (the slice is gone), or the status of the worker that failed.
follow() {
  local states state
  while true; do
    [[ "$(slice_state)" == ACTIVE ]] || return 76
    states="$(worker_states)" || states=running # a connection that failed says nothing about the job
    for state in $states; do
      if [[ "$state" =~ ^[0-9]+$ && "$state" != 0 && "$state" != 75 ]]; then
        sleep "$poll" # the workers of a slice that is being taken away fail before the cloud says so
        [[ "$(slice_state)" == ACTIVE ]] || return 76
        return "$state"
      fi
    done
    # Pre-empted, or lost: the others stop at their next save or barrier, so all are started again together.
    if grep -qE '^(75|gone)$' <<<"$states" && ! grep -qx running <<<"$states"; then return 75; fi
    if ! grep -qvx 0 <<<"$states"; then return 0; fi
    sleep "$poll"
  done
}

up() {
  check_word --type "$type"
  runtime_version >/dev/null
  tpu_flags "$type" >/dev/null
  [[ -z "$version" ]] || check_word --version "$version"
  local attempt status running=""
  have_slice
  if [[ -z "${DRY_RUN:-}" ]] && grep -qx running <<<"$(worker_states || true)"; then
    say "the job is running already" && running=1
  else
    setup
  fi
  for ((attempt = 1; attempt <= attempts; attempt++)); do
    [[ -n "$running" ]] || start
    running=""
    if [[ -n "${DRY_RUN:-}" ]]; then
      say "then it is looked at every $poll s, and started again after status 75, up to $attempts times"
      return 0
    fi
    say "started, attempt $attempt; bash launch/tpu_pod.sh logs --name $name --zone $zone shows what it says"
    status=0
    follow || status=$?
    case "$status" in
    0) say "done; the slice is still yours, and is paid for: bash launch/tpu_pod.sh down --name $name --zone $zone" && return 0 ;;
    75) say "pre-empted, everything saved; starting again" ;;
    76) say "the slice was taken away; asking for it again" && have_slice && setup ;;
    *) say "the job failed with status $status on a worker; see its log" && return "$status" ;;
    esac
  done
  say "started $attempts times and not done"
  return 75
}

case "$verb" in
up) up ;;
logs) on_workers 0 "tail -n 100 -F $name.log" ;;
status)
  run "${tpu[@]}" queued-resources describe "$name" "${where[@]}"
  [[ -n "${DRY_RUN:-}" ]] || worker_states
  ;;
down) delete ;;
esac
