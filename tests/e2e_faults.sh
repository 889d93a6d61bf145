#!/usr/bin/env bash
# A rank that dies, computes a number that is not one, meets a full disk, hangs, is stopped or is asked to end: the job
# ends by itself within seconds, with the status for it, says which rank and where it was, leaves nobody behind, and goes
# on from the last checkpoint to the weights of a run without the fault, to the bit.
#
#     e2e_faults.sh [DATAxSEQUENCE...]     the meshes; without any, two data-parallel ranks
. "$(dirname "$0")/e2e.sh"
prepare
LIMIT_SECONDS=2   # of the watchdog, where it is what notices

# on_mesh DATAxSEQUENCE STEPS EVERY: the mesh of what follows, the steps of a run, and how often it saves.
on_mesh() {
    mesh=$1 steps=$2 every=$3
    data=${mesh%x*} sequence=${mesh#*x} np=$((${mesh%x*} * ${mesh#*x}))
    settings=(dist.mesh.data=$data dist.mesh.sequence=$sequence train.steps=$steps checkpoint.every=$every
              train.warmup=5 train.validate_tokens=2048)
    train straight-$mesh "${settings[@]}"
    expect 0 ranks $np "${arguments[@]}"
}

# fault WORDS STATUS SECONDS PATTERN [key=value...]: a run with the fault, that ends within so many seconds of its last
# row, and what it says; then the same run without it.
fault() {
    local run=run-$mesh-${1//:/-} step took from
    step=$(cut -d: -f3 <<<"$1")
    from=$(((step - 1) / every * every))
    [ "$2" != 85 ] || from=$step
    train "$run" "${settings[@]}" "${@:5}"
    SELECTRA_FAULT=$1 start $np "${arguments[@]}"
    ended "$2" 30 && said "$4"
    # config.yaml is there before any row is
    took=$(seconds_since "$(stat -c %.Y "$run/config.yaml" "$run/metrics.jsonl" 2>/dev/null | sort -g | tail -n 1)")
    echo "$mesh, $1: status $ended_with, over $took s after the last row"
    check "$mesh, $1: over within $3 s, not $took" awk -v a="$took" -v b="$3" 'BEGIN { exit !(a <= b) }'
    check "$mesh, $1: no process is left" test -z "$(grep -lsa "run[.]dir=$run" /proc/[0-9]*/cmdline)"
    expect 0 ranks $np "${arguments[@]}"
    check "$mesh, $1: goes on from step $from" grep -q "resuming from step $from\b" out
    same_state straight-$mesh "$run" $steps
}

# shared_sequences MESH: the faults in a mesh of groups that share sequences, which wait for each other in every layer.
shared_sequences() {
    local watched=dist.watchdog_seconds=$LIMIT_SECONDS last first group="in its sequence group's exchange of"
    on_mesh "$1" 24 8
    last=$((np - 1)) first=$((np - 2))   # of the last group
    fault $last:keys:12:kill       137 6 "rank $last .*has died: it was in forward of step 12, $group keys"
    fault $first:validate:24:kill  137 6 "rank $first .*has died: it was in validate of step 24"
    fault $last:forward:12:sleep   75 9 "rank $last on host .* no progress for [23] s: in forward of step 12, after" $watched
    fault $first:forward:11:nan    1 4 "step 11: the loss is not finite .*among ranks $first to $last, .*in forward"
    [ -z "${SEL_TEST_QUICK:-}" ] || return 0
    fault $first:gradients:12:kill 137 6 "rank $first .*has died: it was in backward of step 12, $group gradients"
    fault $first:reduce:12:kill    137 6 "rank $first .*has died: it was in reduce of step 12"
    fault $last:save:16:kill       137 6 "rank $last .*has died: it was in save of step 16"
    fault $last:sums:12:stop       75 9 \
        "rank $last has given no sign of life for [23] s: in forward of step 12, $group sums; .*stopped by a signal" $watched
    fault $last:save:16:enospc     1 4 "saving step 16: rank $last: .*No space left"
    fault $last:keys:12:term       85 4 'SIGTERM received: finishing step 12, then saving'
}

if [ $# -gt 0 ]; then   # at once: most of the time is waiting
    for mesh in "$@"; do
        mkdir $mesh
        ln -s ../train ../valid $mesh/
        (cd $mesh && shared_sequences $mesh && verdict) >$mesh.out 2>&1 &
    done
    for mesh in "$@"; do
        wait -n && pass || fail "a mesh of them"
    done
    tail -n +1 "${@/%/.out}"
    verdict
fi

on_mesh 2x1 60 20
fault 1:forward:30:kill   137 6 'rank 1 .*has died: it was in forward of step 30'
fault 0:backward:25:nan   1 4   'step 25: the gradient is not finite .*on rank 0, in backward'
fault 1:save:40:enospc    1 4   'saving step 40: rank 1: .*No space left'
fault 0:validate:60:kill  137 6 'rank 0 .*has died: it was in validate of step 60'
if [ -z "${SEL_TEST_QUICK:-}" ]; then
    fault 0:backward:30:kill  137 6 'rank 0 .*has died: it was in backward of step 30'
    fault 1:reduce:1:kill     137 6 'rank 1 .*has died: it was in reduce of step 1'
    fault 1:forward:25:nan    1 4   'step 25: the loss is not finite .*on rank 1, in forward'
    fault 0:save:40:enospc    1 4   'saving step 40: rank 0: .*No space left'
    fault 1:save:40:kill      137 6 'rank 1 .*has died: it was in save of step 40'
fi

# A number that is not finite is left in the metrics until the run goes on without it.
train event
SELECTRA_FAULT=0:forward:25:nan expect 1 ranks 2 "${arguments[@]}"
check "the metrics tell the event" grep -q '"event":.*step 25' event/metrics.jsonl

# The very first checkpoint fails: the run does not begin.
train early
SELECTRA_FAULT=1:save:0:enospc expect 1 ranks 2 "${arguments[@]}"
said 'space'

# What cannot be read is a mistake.
for words in 1:forward:5 1:forwards:5:kill x:forward:5:kill 1:forward:5:explode 1:forward:-1:kill 1:2:3:4:5; do
    train wrong
    SELECTRA_FAULT=$words expect 2 ranks 2 "${arguments[@]}"
    said "SELECTRA_FAULT: $words"
    check "no run folder" test ! -e wrong
done
verdict
