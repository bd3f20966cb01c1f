#!/usr/bin/env bash
# Submit slurm/train.sbatch:
#
#     slurm/submit.sh --nodes 16 --gpus 8 --time 24:00:00 --partition gpu ds_configs/l2.json --output runs/l2
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: slurm/submit.sh [options] CONFIG [train.py options]

  --nodes N          nodes (1)
  --gpus N           GPUs and ranks per node (8); 0: a run on CPUs, with --ranks
  --ranks N          ranks per node, where that is not the number of GPUs
  --cpus N           CPU cores per rank
  --time LIMIT       time limit of one start, as Slurm writes it
  --partition NAME
  --account NAME
  --name NAME        job name (mpl_scale)
  --lead SECONDS     ask for a checkpoint that long before the time limit (180)
  --chain N          N jobs of that name, each waits for the one before (singleton): where sites forbid requeueing
  --sbatch OPTION    one more option of sbatch; may be repeated
  --dry-run          print the commands instead
TEXT
}

need() { # need OPTION VALUE PATTERN WHAT
    if [[ ! "$2" =~ ^$3$ ]]; then
        echo "submit.sh: $1 $2: give $4" >&2
        exit 2
    fi
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
nodes=1 gpus=8 ranks="" lead=180 chain=1 name=mpl_scale dry=""
options=()
while (($#)); do
    case "$1" in
        -h | --help) usage && exit 0 ;;
        --dry-run) dry=yes && shift && continue ;;
        --*) (($# > 1)) || { echo "submit.sh: $1 takes a value" >&2 && exit 2; } ;;
        *) break ;;
    esac
    case "$1" in
        --nodes) need "$1" "$2" '[1-9][0-9]*' "a number of at least 1" && nodes="$2" ;;
        --gpus) need "$1" "$2" '[0-9]+' "a number" && gpus="$2" ;;
        --ranks) need "$1" "$2" '[1-9][0-9]*' "a number of at least 1" && ranks="$2" ;;
        --cpus) need "$1" "$2" '[1-9][0-9]*' "a number of at least 1" && options+=("--cpus-per-task=$2") ;;
        --time) need "$1" "$2" '[0-9:-]+' "a limit as 30, 24:00:00 or 2-00:00:00" && options+=("--time=$2") ;;
        --partition | --account) options+=("$1=$2") ;;
        --name) name="$2" ;;
        --lead) need "$1" "$2" '[0-9]+' "seconds" && lead="$2" ;;
        --chain) need "$1" "$2" '[1-9][0-9]*' "a number of at least 1" && chain="$2" ;;
        --sbatch) options+=("$2") ;;
        *) echo "submit.sh: unknown option $1" >&2 && usage >&2 && exit 2 ;;
    esac
    shift 2
done
if (($# < 1)); then
    usage >&2
    exit 2
fi
if [[ ! -f "$1" ]]; then
    echo "submit.sh: $1: no such config" >&2
    exit 2
fi
if ((gpus == 0)) && [[ -z "$ranks" ]]; then
    echo "submit.sh: --gpus 0 needs --ranks, the number of ranks on a node" >&2
    exit 2
fi
if ((gpus)); then
    options+=("--gpus-per-node=$gpus")
fi
if ((chain > 1)); then
    options+=(--dependency=singleton)
fi
command=(sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=${ranks:-$gpus}" "--signal=B:USR1@$lead"
    "${options[@]}" "$root/slurm/train.sbatch" "$@")
export MPL_SCALE_ROOT="$root"
for ((job = 0; job < chain; job++)); do
    if [[ -n "$dry" ]]; then
        printf '%q ' "MPL_SCALE_ROOT=$root" "${command[@]}"
        echo
    else
        "${command[@]}"
    fi
done
