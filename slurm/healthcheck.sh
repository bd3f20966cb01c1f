#!/usr/bin/env bash
# Look at every node before a long run; prints what is wrong, and the hosts to exclude:
#
#     slurm/healthcheck.sh --nodes 16 --ntasks-per-node 8 --gpus-per-node 8 --partition gpu     # options of srun
#     sbatch --exclude "$(slurm/healthcheck.sh --quiet --nodes 16 ...)" slurm/train.sbatch ...
#
# On each node: the GPUs answer and have no uncorrected memory errors, free memory, free disk, a small all-reduce over all
# ranks. Inside an allocation the options may be left out. Ends with 0 if every node is well, else 1.
#     MPL_SCALE_CHECK_MEMORY_GB   least free memory of a node, default 8
#     MPL_SCALE_CHECK_DISK_GB     least free space in MPL_SCALE_CHECK_DISKS, default 5
#     MPL_SCALE_CHECK_DISKS       folders, parted by blanks; default: /tmp and the current one
#     MPL_SCALE_CHECK_SECONDS     for the all-reduce, default 60
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

check_gpus() {
    local wanted="${SLURM_GPUS_ON_NODE:-0}" found=0 errors
    if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus >/dev/null 2>&1; then
        found="$(nvidia-smi --list-gpus | wc -l)"
        errors="$(nvidia-smi --query-gpu=ecc.errors.uncorrected.volatile.total --format=csv,noheader | grep -c '^[1-9]' ||
            true)"
        if ((errors)); then
            echo "$host FAIL $errors GPUs with uncorrected memory errors"
        fi
    fi
    if ((found < wanted)); then
        echo "$host FAIL $found of $wanted GPUs answer"
    fi
}

check_memory() {
    local free
    free="$(awk '/^MemAvailable:/ { print int($2 / 1048576) }' /proc/meminfo)"
    if ((free < ${MPL_SCALE_CHECK_MEMORY_GB:-8})); then
        echo "$host FAIL $free GB of memory free, less than ${MPL_SCALE_CHECK_MEMORY_GB:-8}"
    fi
}

check_disks() {
    local folder free folders=()
    read -ra folders <<<"${MPL_SCALE_CHECK_DISKS:-/tmp .}"
    for folder in "${folders[@]}"; do
        if [[ ! -w "$folder" ]]; then
            echo "$host FAIL $folder cannot be written to"
            continue
        fi
        free="$(df --output=avail --block-size=1G "$folder" | tail -n 1)"
        if ((free < ${MPL_SCALE_CHECK_DISK_GB:-5})); then
            echo "$host FAIL $((free)) GB free in $folder, less than ${MPL_SCALE_CHECK_DISK_GB:-5}"
        fi
    done
}

if [[ "${1:-}" == --node ]]; then # on each node, under srun
    host="${SLURMD_NODENAME:-$(hostname)}"
    check_gpus
    check_memory
    check_disks
    echo "$host looked"
    exit 0
fi

quiet=""
if [[ "${1:-}" == --quiet ]]; then
    quiet=yes
    shift
fi
if [[ -z "${SLURM_JOB_ID:-}" ]]; then # one allocation for both steps
    # shellcheck disable=SC2093
    exec salloc --quiet "$@" "$root/slurm/healthcheck.sh" ${quiet:+--quiet}
fi
# shellcheck source=slurm/common.sh
source "$root/slurm/common.sh"
if [[ -n "${MPL_SCALE_SITE:-}" ]]; then
    # shellcheck source=/dev/null
    source "$MPL_SCALE_SITE"
fi
export_rendezvous
export_defaults
python="${MPL_SCALE_PYTHON:-python3}"
if [[ -z "${MPL_SCALE_PYTHON:-}" && -x "$root/.venv/bin/python" ]]; then
    python="$root/.venv/bin/python"
fi
lines="$(env "${WHOLE_NODE[@]}" srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 "$root/slurm/healthcheck.sh" --node || true)"
# srun ends what hangs; ranks that failed do not end the others, which have more to say
limit=$(((${MPL_SCALE_CHECK_SECONDS:-60} + 119) / 60))
lines+=$'\n'"$(srun --time="$limit" --kill-on-bad-exit=0 "$python" "$root/slurm/allreduce_check.py" || true)"
count() { # count HOST: its ranks that joined
    grep -c "^$1 joined " <<<"$lines" || true
}
most=0
while read -r host; do
    ((most >= $(count "$host"))) || most="$(count "$host")"
done < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
bad=()
while read -r host; do
    if ! grep -q "^$host looked" <<<"$lines"; then
        lines+=$'\n'"$host FAIL does not run a task"
    elif (($(count "$host") < most || most == 0)); then
        lines+=$'\n'"$host FAIL $(count "$host") of its ranks joined the all-reduce"
    fi
    if grep -q "^$host FAIL" <<<"$lines"; then
        bad+=("$host")
    fi
done < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if [[ -z "$quiet" ]]; then
    sort -u <<<"$lines" | grep -E ' (ok|FAIL) ' || true
fi
if ((${#bad[@]})); then
    [[ -n "$quiet" ]] || echo "exclude:"
    (IFS=, && echo "${bad[*]}")
    exit 1
fi
