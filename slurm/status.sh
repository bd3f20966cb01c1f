#!/usr/bin/env bash
# How runs are doing, from what they leave in their folders; no Slurm needed:
#
#     slurm/status.sh runs/*
set -euo pipefail

if (($# < 1)); then
    echo "usage: slurm/status.sh RUN_FOLDER..." >&2
    exit 2
fi

# field NAME: the value of "NAME": VALUE in the heartbeat's one line
field() {
    sed -nE "s/.*\"$1\": (\"([^\"]*)\"|([^,}]*)).*/\2\3/p" <<<"$heartbeat"
}

printf '%-28s %-9s %8s %-16s %15s %9s %8s %10s\n' run state age phase step img/s restarts checkpoint
for folder in "$@"; do
    [[ -d "$folder" ]] || continue
    heartbeat="" age=- phase=- step=- rate=- state=starting restarts=0 checkpoint=-
    if [[ -f "$folder/heartbeat.json" ]]; then
        heartbeat="$(<"$folder/heartbeat.json")"
        # the clock since boot on the run's own host: unlike the time of day, nobody sets it
        if [[ "$(field host)" == "$(uname -n)" ]]; then
            seconds="$(field monotonic)"
            read -r now _ </proc/uptime
        else
            seconds="$(field wall)"
            now="$(date +%s)"
        fi
        age="$((${now%%.*} - ${seconds%%.*}))s"
        phase="$(field phase)"
        step="$(field step)/$(field steps)"
        rate="$(field images_per_second)"
        rate="${rate%%.*}"
        state="$(field doing)"
        # several missed beats: ended, killed, or hanging
        if ((${age%s} > 60)); then
            state=silent
        elif ((${age%s} < -1)); then # the host was booted since, or two hosts' times of day differ
            age="?" state=unknown
        fi
    fi
    if [[ -e "$folder/DONE" ]]; then
        state="done"
    elif [[ -e "$folder/STOP" ]]; then
        state=stopped
    fi
    if [[ -f "$folder/restarts" ]]; then
        read -r _ _ restarts <"$folder/restarts" || true
    fi
    if [[ -f "$folder/checkpoints/latest" ]]; then
        read -r checkpoint <"$folder/checkpoints/latest" || true
        checkpoint="${checkpoint#step_}"
    fi
    printf '%-28s %-9s %8s %-16s %15s %9s %8s %10s\n' "$folder" "$state" "$age" "$phase" "$step" "$rate" "$restarts" \
        "$checkpoint"
done
