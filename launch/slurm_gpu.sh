#!/usr/bin/env bash
# A job on GPU nodes under SLURM: one task a GPU, submitted by sbatch, put back into the queue after status 75.
#
#   bash launch/slurm_gpu.sh up JOB --name NAME --nodes N [options] -- WORDS...
#   bash launch/slurm_gpu.sh logs|status|down --name NAME
#
#   bash launch/slurm_gpu.sh up train --name b3o --nodes 4 --partition gpu --time 2-00:00:00 -- \
#     --config configs/pretrain_8b.py --workdir gs://BUCKET/runs/8b --config.init_from=gs://BUCKET/models/start-8b
#
# JOB is train, generate, caption or cache-features; WORDS are those of `blip3o JOB`. The checkout lies on a file system
# that all nodes see; its environment is made once, before the job is submitted. SLURM sends SIGTERM five minutes before
# the time is over or the node is taken away: the job saves, ends with 75, and goes on from there when it runs again.
# `down` cancels only what `up` submitted on this machine (noted in $BLIP3O_STATE, by default ~/.local/state/blip3o).
#
#   --nodes N          nodes (default 1); --gpus N: of each node (default 8)
#   --partition NAME, --account NAME, --time LIMIT: as sbatch takes them
#   --env NAME=VALUE   set for the tasks; may be repeated
#   --attempts N       run at most so often (default 100)
#   --dry-run          print the exact commands and the batch script, run none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

nodes=1 gpus=8 partition="" account="" time="" sbatch=()
read_words "nodes gpus partition account time" "" "$@"
check_count --nodes "$nodes"
check_count --gpus "$gpus"
for option in "--partition=$partition" "--account=$account" "--time=$time"; do
  [[ "$option" == *= ]] || { check_word "${option%%=*}" "${option#*=}" && sbatch+=("$option"); }
done
state="${BLIP3O_STATE:-$HOME/.local/state/blip3o}/slurm"
ours="$state/$name" # the number of the SLURM job that `up` submitted

# XLA flags for GPUs (NVIDIA): collectives beside arithmetic, as JAX's guide for GPUs says; not measured here.
gpu_flags() { printf '%s' "--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_triton_gemm=false"; }

# The batch script. The job puts itself back into the queue: the number, the place and the log stay the same.
script() {
  local line
  mapfile -t line < <(job_words "$job")
  line=(env "XLA_FLAGS=$(gpu_flags)" "${variables[@]}" "$PWD/.venv/bin/python" -m blip3o_jax "${line[@]:1}" "${words[@]}")
  cat <<EOF
#!/usr/bin/env bash
cd $(quoted "$PWD") || exit 2
srun --kill-on-bad-exit=0 $(quoted "${line[@]}")
status=\$?
if [[ \$status == 75 && \${SLURM_RESTART_COUNT:-0} -lt $((attempts - 1)) ]]; then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit \$status
EOF
}

up() {
  local submit number
  submit=(sbatch --parsable "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus"
    --exclusive --requeue --signal=TERM@300 --open-mode=append "--output=$PWD/runs/$name.log" "${sbatch[@]}")
  run env BLIP3O_EXTRAS=cuda,gcs bash launch/local.sh --version
  if [[ -n "${DRY_RUN:-}" ]]; then
    run "${submit[@]}"
    script
    return 0
  fi
  [[ ! -e "$ours" ]] || die "$name was submitted as job $(cat "$ours"); look at its status, or take it down first"
  mkdir -p runs "$state"
  shown "${submit[@]}"
  number="$("${submit[@]}" < <(script))"
  printf '%s\n' "${number%%;*}" >"$ours"
  say "submitted as job ${number%%;*}; bash launch/slurm_gpu.sh logs --name $name shows what it says"
}

number() {
  [[ -e "$ours" ]] || die "no job $name was submitted by this script on this machine; use SLURM's own commands"
  cat "$ours"
}

case "$verb" in
up) up ;;
logs) run tail -n 100 -F "runs/$name.log" ;;
status) id="$(number)" && run squeue "--jobs=$id" ;;
down) id="$(number)" && run scancel "$id" && { [[ -n "${DRY_RUN:-}" ]] || rm -f "$ours"; } ;;
esac
