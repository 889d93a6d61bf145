#!/usr/bin/env bash
# A rank that hangs or is stopped: the watchdog names it, with phase and step, ends the job with status 75 within seconds,
# and nobody is left.  A job that is suspended as a whole goes on, and one whose launcher dies ends.
. "$(dirname "$0")/e2e.sh"
prepare
LIMIT_SECONDS=2

train straight
expect 0 ranks 2 "${arguments[@]}"

# stuck WORDS PATTERN
stuck() {
    local run=run-${1//:/-} begun
    train "$run" dist.watchdog_seconds=$LIMIT_SECONDS
    SELECTRA_FAULT=$1 start 2 "${arguments[@]}"
    wait_step "$run" $(($(cut -d: -f3 <<<"$1") - 1))
    begun=$EPOCHREALTIME
    ended 75 15 && said "$2"
    echo "$1: the job ended $(seconds_since $begun) s after the fault"
    check "$1: a stack is shown" grep -qE '^\[rank [01]\]  .*main' err
    check "$1: no process is left" test -z "$(grep -lsa "run[.]dir=$run" /proc/[0-9]*/cmdline)"
}
stuck 1:forward:30:sleep 'rank 1 on host .* no progress for [23] s: in forward of step 30, after its collective'
stuck 1:reduce:30:stop   'rank 1 has given no sign of life for [23] s: in reduce of step 30.*stopped by a signal'
stuck 0:save:40:stop     'rank 0 has given no sign of life for [23] s: in save of step 40.*stopped by a signal'
stuck 0:validate:60:sleep 'rank 0 on host .* no progress for [23] s: in validate of step 60'
expect 0 ranks 2 "${arguments[@]}"
same_state straight run-0-validate-60-sleep 60

# In rounds of the watchdog's own: a job that sleeps as a whole for longer than the limit is not stuck.
train suspended dist.watchdog_seconds=$LIMIT_SECONDS train.steps=400 checkpoint.every=0
start 2 "${arguments[@]}"
if wait_step suspended 5; then pass; else fail "the run did not reach step 5"; fi
pids=$(rank_pids)
kill -STOP $pids
sleep 4
kill -CONT $pids
ended 0 60

# mpirun is killed: its ranks do not go on alone, and nothing of ours stays in /dev/shm.
export TMPDIR=$TEMP   # for Open MPI's files
train orphaned train.steps=1000000
start 2 "${arguments[@]}"
if wait_step orphaned 5; then pass; else fail "the run did not reach step 5"; fi
maps=$(cat /proc/$(one_rank 0)/maps)
check "windows have no names while they are used" awk '/ \/dev\/shm\/osc_sm/ { n++; named += !/\(deleted\)$/ }
    END { exit !(n > 0 && !named) }' <<<"$maps"
segments=$(grep -o '/dev/shm/vader_segment[^ ]*[.]' <<<"$maps" | sort -u)
kill -9 "$job"
ended 137 5
for ((i = 0; i < 100; i++)); do
    left=$(grep -lsa "run[.]dir=orphaned" /proc/[0-9]*/cmdline)
    [ -z "$left" ] && break
    sleep 0.1
done
check "the ranks of a dead mpirun end" test -z "$left"
for segment in $segments; do rm -f "$segment"*; done   # which nobody removes now
verdict
