# Shared by the launchers in this directory; sourced, never run.
# shellcheck shell=bash

# The words of `blip3o` that a launcher runs on every worker.
JOBS="train generate caption cache-features"

# Seconds between two looks at a job.
poll="${BLIP3O_POLL_SECONDS:-30}"

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# The comment at the top of the launcher, and leave.
usage() { # status
  sed -n '2,/^set -/p' "launch/${0##*/}" | sed '$d; s/^# \{0,1\}//'
  exit "$1"
}

# shown CMD...: prints the command as it can be typed again; with --dry-run that is all.
shown() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
}

run() {
  shown "$@"
  [[ -n "${DRY_RUN:-}" ]] || "$@"
}

# retry CMD...: for what goes over the network and may be done twice.
retry() {
  local try
  for try in 1 2 3 4; do
    run "$@" && return 0
    say "that failed; trying again ($try of 4)" && sleep "$poll"
  done
  run "$@"
}

# Names that go to a cloud API and into paths: nothing that a shell or a flag parser could read as something else.
check_name() { # what value
  [[ "$2" =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    die "$1 is $(printf %q "$2"); take 1 to 40 lower-case letters, digits and dashes, a letter first"
}

check_word() { # what value: a zone, a project, a type, an image
  [[ "$2" =~ ^[A-Za-z0-9][A-Za-z0-9._:/@=-]*$ ]] ||
    die "$1 is $(printf %q "$2"); take letters, digits and . _ : / @ = - only"
}

check_count() { # what value
  [[ "$2" =~ ^[1-9][0-9]{0,5}$ ]] || die "$1 is $(printf %q "$2"); give a whole number from 1 on"
}

check_job() {
  [[ " $JOBS " == *" $1 "* ]] || die "the job is $(printf %q "$1"); choose one of: $JOBS"
}

check_variable() { # NAME=VALUE
  [[ "$1" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "--env $(printf %q "$1") is not NAME=VALUE"
}

# read_words OPTIONS FLAGS WORD...: the command line of a launcher, checked as far as all of them are alike. OPTIONS take
# a value, which goes to the variable of that name; of FLAGS the last one given is `tier`.
verb="" job="" name="" attempts=100 tier=() variables=() words=()
read_words() {
  local options=" name attempts $1 " flags=" $2 " option
  shift 2
  [[ $# -gt 0 ]] || usage 2
  verb="$1" && shift
  case "$verb" in
  -h | --help) usage 0 ;;
  up) [[ $# -gt 0 ]] && job="$1" && shift ;;
  logs | status | down) ;;
  *) die "$(printf %q "$verb") is no command; there are up, logs, status and down" ;;
  esac
  while [[ $# -gt 0 ]]; do
    [[ "$1" != -- ]] || { shift && words=("$@") && break; }
    [[ "$1" =~ ^--([a-z-]+)$ ]] || die "unknown argument $(printf %q "$1"); words of the job come after --"
    option="${BASH_REMATCH[1]}"
    if [[ "$option" == dry-run ]]; then
      DRY_RUN=1 && shift
    elif [[ "$flags" == *" $option "* ]]; then
      # shellcheck disable=SC2034
      tier=("$1") && shift
    elif [[ "$option" == env || "$options" == *" $option "* ]]; then
      [[ -n "${2:-}" ]] || die "$1 needs a value"
      if [[ "$option" == env ]]; then check_variable "$2" && variables+=("$2"); else printf -v "$option" %s "$2"; fi
      shift 2
    else
      die "unknown argument $1; words of the job come after --"
    fi
  done
  check_name --name "$name"
  check_count --attempts "$attempts"
  [[ "$verb" != up ]] || {
    check_job "$job"
    [[ ${#words[@]} -gt 0 ]] || die "no words for blip3o $job; give them after --"
  }
}

# quoted WORD...: one string that a remote shell reads as exactly these words.
quoted() {
  local out
  printf -v out '%q ' "$@"
  printf '%s' "${out% }"
}

# blip3o WORDS of a job: caption and cache-features live under `data`.
job_words() {
  case "$1" in
  caption | cache-features) printf '%s\n' blip3o data "$@" ;;
  *) printf '%s\n' blip3o "$@" ;;
  esac
}

# XLA and libtpu flags, one group a chip family. They choose how collectives overlap with arithmetic, never what is
# computed. Nothing here was tuned on a TPU yet: each group is what the compiler's makers publish for such jobs (MaxText,
# benchmarks/xla_flags_library.py); measure before trusting it, and empty a group to see what it brings.
tpu_flags() { # accelerator type
  # All: gather and reduce weights (fsdp) while the matrix units work.
  local overlap="--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
  overlap+=" --xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true"
  overlap+=" --xla_enable_async_all_gather=true"
  # And stack for the compiler's own threads: libtpu 0.0.42.1 overflows it where it compiles the 4B for v6e.
  overlap+=" --fibers_default_thread_stack_size=4194304"
  case "$1" in
  v4* | v5p*) # a three-dimensional torus
    printf '%s' "$overlap --xla_tpu_data_parallel_opt_different_sized_ops=true --xla_tpu_enable_data_parallel_all_reduce_opt=true"
    ;;
  v5e* | v5lite*) # a two-dimensional torus
    printf '%s' "$overlap --xla_tpu_enable_data_parallel_all_reduce_opt=true"
    ;;
  v6e*) # more on-chip memory for the compiler to schedule in, KiB
    printf '%s' "$overlap --xla_tpu_scoped_vmem_limit_kib=98304"
    ;;
  *) die "there are no XLA flags for accelerator $(printf %q "$1"); known: v4, v5e (v5litepod), v5p, v6e" ;;
  esac
}
