#!/usr/bin/env bash
# A job on TPU slices of a GKE cluster, through xpk (pip install xpk): submitted, followed, submitted again after status 75.
#
#   bash launch/gke_xpk.sh up JOB --name NAME --cluster CLUSTER --zone ZONE --type v5litepod-256 --image IMAGE [options] -- WORDS...
#   bash launch/gke_xpk.sh logs|status|down --name NAME --cluster CLUSTER --zone ZONE [--project PROJECT]
#
#   bash launch/gke_xpk.sh up train --name b3o --cluster pod --zone us-west4-a --type v5litepod-256 \
#     --image us-docker.pkg.dev/PROJECT/blip3o/tpu:1 -- \
#     --config configs/pretrain_8b.py --workdir gs://BUCKET/runs/8b --config.init_from=gs://BUCKET/models/start-8b \
#     --config.data.path=gs://BUCKET/captions
#
# JOB is train, generate, caption or cache-features; WORDS are those of `blip3o JOB`. The image holds this checkout,
# installed (pip install ".[tpu,gcs]"), and is its working directory. The cluster is yours: nothing here makes or deletes one.
# Every attempt is a workload NAME-1, NAME-2, ... of its own; `up` called again follows the last one, if that still runs.
# `down` deletes those that `up` submitted on this machine (noted in $BLIP3O_STATE, by default ~/.local/state/blip3o), and
# no others.
#
#   --type TYPE        accelerator type: v4-512, v5litepod-256, v5p-128, v6e-256
#   --slices N         so many slices of that type (default 1)
#   --env NAME=VALUE   set in the containers; may be repeated
#   --attempts N       submit at most so often (default 100)
#   --dry-run          print the exact commands, run none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

cluster="" zone="" project="" type="" image="" slices=1
read_words "cluster zone project type image slices" "" "$@"
check_name --cluster "$cluster"
check_word --zone "$zone"
check_count --slices "$slices"
where=("--cluster=$cluster" "--zone=$zone")
[[ -z "$project" ]] || { check_word --project "$project" && where+=("--project=$project"); }
state="${BLIP3O_STATE:-$HOME/.local/state/blip3o}/gke"
ours="$state/${project:-default}.$zone.$cluster.$name" # names of the workloads that `up` submitted, one a line

latest() { if [[ -e "$ours" ]]; then tail -n 1 "$ours"; fi; }

# submit WORKLOAD: a pod ends with the job's own status. With `exec` xpk's SIGTERM reaches the job, not a shell around it.
submit() {
  local line
  mapfile -t line < <(job_words "$job")
  line=(env "LIBTPU_INIT_ARGS=$(tpu_flags "$type")" BLIP3O_DISTRIBUTED=1 "${variables[@]}" "${line[@]}" "${words[@]}")
  if [[ -z "${DRY_RUN:-}" ]]; then
    [[ "$(state_of "$1")" == gone ]] || die "there is a workload $1 that was not submitted here; take another --name"
    mkdir -p "$state" && printf '%s\n' "$1" >>"$ours"
  fi
  retry xpk workload create "--workload=$1" "${where[@]}" "--tpu-type=$type" "--num-slices=$slices" \
    "--docker-image=$image" "--command=exec $(quoted "${line[@]}")" </dev/null || # else xpk would ask
    [[ "$(state_of "$1")" != gone ]] || die "xpk did not submit $1, see above"
}

wait_for() { run xpk workload list "${where[@]}" "--wait-for-job-completion=$1" --timeout=604800; }

# asked WORDS...: what kubectl says, asked until there is an answer. xpk goes first: it points kubectl at the cluster.
asked() {
  until xpk workload list "${where[@]}" "--filter-by-job=$name" >&2 && kubectl --namespace=default "$@"; do
    say "no answer from $cluster; asking again" && sleep "$poll"
  done
}

# gone, running, Completed or Failed. Only the workload itself tells: a wait may end for reasons of its own.
state_of() { # WORKLOAD
  local seen
  seen="$(asked get jobset "$1" --ignore-not-found \
    -o 'jsonpath={.metadata.name} {.status.conditions[?(@.status=="True")].type}')"
  case "$seen " in
  " ") echo gone ;;
  *" Completed "*) echo Completed ;;
  *" Failed "*) echo Failed ;;
  *) echo running ;;
  esac
}

# Every status that pods of a workload ended with, one a line.
statuses() { # WORKLOAD
  local path='jsonpath={range .items[*]}{.status.containerStatuses[0].state.terminated.exitCode}{"\n"}{end}'
  asked get pods "--selector=jobset.sigs.k8s.io/jobset-name=$1" -o "$path" | { grep -xE '[0-9]+' || true; } | sort -nu
}

up() {
  check_word --type "$type"
  check_word --image "$image"
  tpu_flags "$type" >/dev/null
  local i workload number now seen failed status unclear=0
  workload="$(latest)"
  number="${workload##*-}"
  if [[ -n "${DRY_RUN:-}" ]]; then
    submit "$name-$((number + 1))"
    wait_for "$name-$((number + 1))"
    say "and submitted again after status 75, up to $attempts times; one of before that still runs is followed first"
    return 0
  fi
  [[ -z "$workload" || "$(state_of "$workload")" == running ]] || workload="" # of an `up` before this one
  for ((i = 1; i <= attempts; i++)); do
    if [[ -z "$workload" ]]; then
      workload="$name-$((++number))"
      submit "$workload"
    fi
    while now="$(state_of "$workload")" && [[ "$now" == running ]]; do wait_for "$workload" || sleep "$poll"; done
    case "$now" in
    Completed) say "done" && return 0 ;;
    gone) die "$workload is not in $cluster any more: deleted, or ended half a day ago; not submitted again" ;;
    esac
    seen="$(statuses "$workload")"
    ! grep -qx 2 <<<"$seen" || { say "the job failed with status 2; see the logs" && return 2; }
    # Any other status is of a job that failed, or of one that lost a machine: Kubernetes ends the pods beside a failed
    # one, and what they said goes with them. Three in a row are no bad luck.
    if failed="$(grep -vxE '0|75' <<<"${seen:-75}")"; then
      status="${failed%%$'\n'*}"
      ((++unclear < 3)) || { say "the job failed with status $status; see the logs" && return "$status"; }
      say "a machine was lost, or the job failed with status ${failed//$'\n'/, }; submitting again"
    else
      unclear=0
      say "pre-empted; submitting again"
    fi
    workload=""
  done
  say "submitted $attempts times and not done"
  return 75
}

case "$verb" in
up) up ;;
logs) run kubectl logs "--selector=jobset.sigs.k8s.io/jobset-name=$(latest)" --tail=100 --follow --max-log-requests=256 ;;
status) run xpk workload list "${where[@]}" "--filter-by-job=$name" ;;
down)
  [[ -e "$ours" ]] || die "no workload $name of $cluster was submitted by this script on this machine, so none is deleted; use xpk yourself"
  left=0
  while read -r workload; do
    run xpk workload delete "--workload=$workload" "${where[@]}" --force </dev/null ||
      [[ "$(state_of "$workload" </dev/null)" == gone ]] || left=1
  done <"$ours"
  [[ "$left" == 0 ]] || { say "not all could be deleted, see above; take it down again" && exit 1; }
  [[ -n "${DRY_RUN:-}" ]] || rm -f "$ours"
  ;;
esac
