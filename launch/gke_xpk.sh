#!/usr/bin/env bash
# A job on TPU slices of a GKE cluster, through xpk (pip install xpk): submitted, followed, submitted again after status 75.
#
#   bash launch/gke_xpk.sh up JOB --name NAME --cluster CLUSTER --zone ZONE --type v5litepod-256 --image IMAGE [options] -- WORDS...
#   bash launch/gke_xpk.sh logs|status|down --name NAME --cluster CLUSTER --zone ZONE [--project PROJECT]
#
#   bash launch/gke_xpk.sh up train --name b3o --cluster pod --zone us-west4-a --type v5litepod-256 \
#     --image us-docker.pkg.dev/PROJECT/blip3o/tpu:1 -- \
#     --config configs/pretrain_8b.py --workdir gs://BUCKET/runs/8b --config.init_from=gs://BUCKET/models/start-8b
#
# JOB is train, generate, caption or cache-features; WORDS are those of `blip3o JOB`. The image holds this checkout,
# installed (pip install ".[tpu]"), and is its working directory. The cluster is yours: nothing here makes or deletes one.
# Every attempt is a workload NAME-1, NAME-2, ... of its own; `down` deletes those that `up` submitted on this machine
# (noted in $BLIP3O_STATE, by default ~/.local/state/blip3o), and no others.
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

# submit WORKLOAD: a pod ends with the job's own status. xpk hands the status on only as "not 0", so 75 is said in the log.
submit() {
  local line inner
  mapfile -t line < <(job_words "$job")
  line=(env "LIBTPU_INIT_ARGS=$(tpu_flags "$type")" BLIP3O_DISTRIBUTED=1 "${variables[@]}" "${line[@]}" "${words[@]}")
  inner="$(quoted "${line[@]}"); status=\$?; echo \"blip3o ended with status \$status\"; exit \$status"
  [[ -n "${DRY_RUN:-}" ]] || { mkdir -p "$state" && printf '%s\n' "$1" >>"$ours"; }
  run xpk workload create "--workload=$1" "${where[@]}" "--tpu-type=$type" "--num-slices=$slices" \
    "--docker-image=$image" "--command=$inner"
}

# Every status that the pods of a workload said, one a line.
said() {
  kubectl logs "--selector=jobset.sigs.k8s.io/jobset-name=$1" --tail=-1 --prefix=false 2>/dev/null |
    sed -n 's/^blip3o ended with status \([0-9]*\)$/\1/p'
}

up() {
  check_word --type "$type"
  check_word --image "$image"
  tpu_flags "$type" >/dev/null
  local attempt workload status
  attempt=$(($([[ -e "$ours" ]] && wc -l <"$ours" || echo 0) + 1))
  for ((; attempt <= attempts; attempt++)); do
    workload="$name-$attempt"
    submit "$workload"
    run xpk workload list "${where[@]}" "--wait-for-job-completion=$workload" --timeout=604800 || true
    if [[ -n "${DRY_RUN:-}" ]]; then
      say "and submitted again after status 75, up to $attempts times"
      return 0
    fi
    status="$(said "$workload" | sort -rn | uniq)"
    case "$status" in
    0) say "done" && return 0 ;;
    "") say "$workload left no status (its slice was taken away?); submitting again" ;;
    *)
      # 75 beside 0 or alone; any other number is a failure that would only be repeated.
      status="$(grep -vxE '0|75' <<<"$status" | head -n 1)" || true
      [[ -z "$status" ]] || { say "the job failed with status $status; see the logs" && return "$status"; }
      say "pre-empted, everything saved; submitting again"
      ;;
    esac
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
  while read -r workload; do
    run xpk workload delete "--workload=$workload" "${where[@]}" --force </dev/null || true
  done <"$ours"
  [[ -n "${DRY_RUN:-}" ]] || rm -f "$ours"
  ;;
esac
