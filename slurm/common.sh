# shellcheck shell=bash
# What the batch scripts share: where ranks meet, how they are launched, and what happens when they end.
#
# Settings, by environment (or exported by the file that MPL_SCALE_SITE names, which is read first):
#     MPL_SCALE_SITE              a shell file of the cluster: modules, NCCL_*, containers
#     MPL_SCALE_PYTHON            default: <repository>/.venv/bin/python where there is one, else python3
#     MPL_SCALE_LAUNCHER          srun (default, one task per rank) or torchrun (one task per node starts the ranks)
#     MPL_SCALE_CONTAINER         an image; needs MPL_SCALE_CONTAINER_RUNTIME=pyxis or apptainer
#     MPL_SCALE_CONTAINER_MOUNTS  further folders to mount, parted by commas
#     MPL_SCALE_SRUN_OPTIONS      further options of srun, parted by blanks
#     MPL_SCALE_MAX_RESTARTS      restarts in a row without a newer checkpoint after which a job gives up; default 3
#
# The ranks end with: 0 done, or stopped with the state saved; 2 bad input, which a restart would not mend; 75 ranks did
# not join, or the watchdog found a hang; 128 + N signal N ended them before their first step, or a second one at once;
# anything else is a crash. All but bad input go back into the queue.

readonly BAD_INPUT=2
readonly HANG=75
readonly WHOLE_NODE=(-u SLURM_GPUS_PER_TASK -u SLURM_TRES_PER_TASK -u SLURM_GPU_BIND) # srun reads them as its options

say() {
    echo "mpl_scale[job ${SLURM_JOB_ID:-none}, start $((${SLURM_RESTART_COUNT:-0} + 1))]: $*" >&2
}

# output_folder CONFIG [train.py options]: prints the run's folder, by train.py's rule.
output_folder() {
    local folder
    folder="runs/$(basename "${1%.*}")"
    shift
    while (($#)); do
        case "$1" in
            --output) folder="${2-}" && shift ;;
            --output=*) folder="${1#--output=}" ;;
        esac
        shift || true
    done
    echo "$folder"
}

# newest_step FOLDER: prints the step of the run's newest checkpoint, -1 without one.
newest_step() {
    local newest=-1 path step
    for path in "$1"/checkpoints/step_*/index.json; do
        step="$(basename "$(dirname "$path")")"
        step="${step#step_}"
        step="${step%%.*}"
        if [[ "$step" =~ ^[0-9]+$ ]] && ((10#$step > newest)); then
            newest=$((10#$step))
        fi
    done
    echo "$newest"
}

# count_restart FOLDER: keeps <folder>/restarts, "step without_progress total"; false when the job must give up.
count_restart() {
    local file="$1/restarts" step last=-1 fruitless=0 total=0
    step="$(newest_step "$1")"
    if [[ -f "$file" ]]; then
        read -r last fruitless total <"$file" || true
    fi
    if ((${SLURM_RESTART_COUNT:-0} == 0)); then
        fruitless=0 # somebody submitted it anew
    else
        total=$((total + 1))
        fruitless=$((step > last ? 0 : fruitless + 1))
    fi
    mkdir -p "$1"
    echo "$step $fruitless $total" >"$file.tmp"
    mv "$file.tmp" "$file"
    if ((fruitless >= ${MPL_SCALE_MAX_RESTARTS:-3})); then
        say "gave up: $fruitless restarts in a row and no checkpoint newer than step $step; see the messages above," \
            "then submit again"
        return 1
    fi
}

# export_rendezvous: MASTER_ADDR is the job's first node as Slurm reaches it, MASTER_PORT follows from job and restart.
export_rendezvous() {
    local first address
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    address="$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
    export MASTER_ADDR="${address:-$first}"
    # below Linux's ephemeral ports; another one after a restart, whose predecessor may still be dying
    export MASTER_PORT="$((20000 + (SLURM_JOB_ID + 101 * ${SLURM_RESTART_COUNT:-0}) % 12000))"
}

# export_defaults: what a site has not decided.
export_defaults() {
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
    export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
    export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}" # srun stopped reading it in 22.05
}

# each_twice MOUNTS: /a,/b:/c becomes /a:/a,/b:/c, as pyxis wants it.
each_twice() {
    local mount mounts=() pairs=()
    IFS=, read -ra mounts <<<"$1"
    for mount in "${mounts[@]}"; do
        [[ "$mount" == *:* ]] || mount="$mount:$mount"
        pairs+=("$mount")
    done
    (IFS=, && echo "${pairs[*]}")
}

# launch_command ROOT [train.py options]: fills the array `command`.
launch_command() {
    local root="$1" python mounts
    shift
    python="${MPL_SCALE_PYTHON:-python3}"
    if [[ -z "${MPL_SCALE_PYTHON:-}" && -z "${MPL_SCALE_CONTAINER:-}" && -x "$root/.venv/bin/python" ]]; then
        python="$root/.venv/bin/python"
    fi
    local further=()
    read -ra further <<<"${MPL_SCALE_SRUN_OPTIONS:-}"
    command=(srun --kill-on-bad-exit=1 "${further[@]}")
    local inside=()
    if [[ -n "${MPL_SCALE_CONTAINER:-}" ]]; then
        mounts="$root,$PWD${MPL_SCALE_CONTAINER_MOUNTS:+,$MPL_SCALE_CONTAINER_MOUNTS}"
        case "${MPL_SCALE_CONTAINER_RUNTIME:-}" in
            pyxis)
                command+=("--container-image=$MPL_SCALE_CONTAINER" "--container-workdir=$PWD"
                    "--container-mounts=$(each_twice "$mounts")")
                ;;
            apptainer)
                inside=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$MPL_SCALE_CONTAINER")
                ;;
            *)
                say "MPL_SCALE_CONTAINER_RUNTIME = '${MPL_SCALE_CONTAINER_RUNTIME:-}': give pyxis or apptainer"
                return "$BAD_INPUT"
                ;;
        esac
    fi
    case "${MPL_SCALE_LAUNCHER:-srun}" in
        srun)
            command+=("${inside[@]}" "$python" "$root/train.py" "$@")
            ;;
        torchrun)
            # torchrun reads --node_rank from PET_NODE_RANK, which only the task on the node knows
            # shellcheck disable=SC2016
            # its one task sees all GPUs of the node, whatever share a task of the job was given
            command=(env "${WHOLE_NODE[@]}" "${command[@]}" "--ntasks=$SLURM_NNODES" --ntasks-per-node=1
                bash -c 'export PET_NODE_RANK="$SLURM_NODEID"; exec "$@"' torchrun
                "${inside[@]}" "$python" -m torch.distributed.run "--nnodes=$SLURM_NNODES"
                "--nproc_per_node=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
                "--master_addr=$MASTER_ADDR" "--master_port=$MASTER_PORT" "$root/train.py" "$@")
            ;;
        *)
            say "MPL_SCALE_LAUNCHER = '$MPL_SCALE_LAUNCHER': give srun or torchrun"
            return "$BAD_INPUT"
            ;;
    esac
}

# supervise OUTPUT: runs `command`; USR1 asks the ranks to save and leave. Sets `status` and `cancelled`.
supervise() {
    local output="$1" interrupted=1 code
    status=0 cancelled=""
    rm -f "$output/PAUSE"
    # a file, not a signal: it reaches ranks under any launcher and container, and kills none that is still starting
    trap 'interrupted=1; say "asked to leave: saving"; touch "$output/PAUSE"' USR1
    trap 'interrupted=1; cancelled=yes' TERM
    "${command[@]}" &
    while ((interrupted)); do # a trap ends `wait` early
        interrupted=0
        code=0
        wait "$!" || code=$?
        if ((code != 127)); then # 127: ended, and told before
            status="$code"
        fi
    done
    trap '' USR1
}

# run_job ROOT CONFIG [train.py options]: one start of a job, from the checks before it to the requeue after it.
run_job() {
    local root="$1" config="$2" output
    shift 2
    if [[ -n "${MPL_SCALE_SITE:-}" ]]; then
        # shellcheck source=/dev/null
        source "$MPL_SCALE_SITE"
    fi
    output="$(output_folder "$config" "$@")"
    if [[ -e "$output/STOP" ]]; then
        say "$output/STOP is there: nothing is trained; remove it to continue"
        return 0
    fi
    count_restart "$output" || return 1
    export_rendezvous
    export_defaults
    local command=() status cancelled
    launch_command "$root" --ds_config "$config" "$@" || return
    supervise "$output"
    if [[ -n "$cancelled" ]]; then
        say "ended by Slurm: cancelled, out of time or preempted; a preempted job comes back by itself"
        return "$((status ? status : 143))"
    fi
    if ((status == 0)) && [[ -e "$output/DONE" ]]; then
        return 0
    fi
    if [[ -e "$output/STOP" ]]; then
        say "stopped, as $output/STOP asks, with status $status"
        return "$status"
    fi
    case "$status" in
        0) say "saved at step $(newest_step "$output"), not done: back into the queue" ;;
        "$BAD_INPUT")
            say "the input is bad (see above): not requeued"
            return "$status"
            ;;
        "$HANG") say "ranks did not join, or the watchdog ended a hang (see above, and $output/stacks): back into the queue" ;;
        130 | 138 | 143) say "ended by a signal before it could save (status $status): back into the queue" ;;
        *) say "crashed with status $status: back into the queue" ;;
    esac
    requeue "$status"
}

# requeue STATUS: only a job that is running; a cancelled one stays so.
requeue() {
    local state
    state="$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T || true)"
    if [[ "$state" != RUNNING ]]; then
        say "not requeued: the job is ${state:-gone}"
        return "$1"
    fi
    trap '' TERM # the requeue ends this script
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "not requeued: Slurm refuses; was it submitted with --no-requeue?"
        return "$((${1} ? ${1} : 1))"
    fi
}
