#!/usr/bin/env bash
# A rank that dies, computes a number that is not one, or meets a full disk: the job ends by itself within seconds,
# with a status that is not 0, says which rank or step, and can be resumed.
. "$(dirname "$0")/e2e.sh"
prepare

train straight
expect 0 ranks 2 "${arguments[@]}"

# fault WORDS STATUS PATTERN: a run with the fault, what it says, and the same run without it.
fault() {
    local run=run-${1//:/-} begun
    train "$run"
    begun=$EPOCHREALTIME
    SELECTRA_FAULT=$1 start 2 "${arguments[@]}"
    ended "$2" 20 && said "$3"
    echo "$1: over $(seconds_since $begun) s after its start, status $ended_with"
    check "$1: no process is left" test -z "$(grep -lsa "run[.]dir=$run" /proc/[0-9]*/cmdline)"
    expect 0 ranks 2 "${arguments[@]}"
    check "$1: the run goes on" grep -q 'resuming from step' out
    same_state straight "$run" 60
}
fault 1:forward:30:kill   137  'rank 1 .*has died: it was in forward of step 30'
fault 0:backward:25:nan   1    'step 25: the gradient is not finite .*on rank 0, in backward'
fault 1:save:40:enospc    1    'saving step 40: rank 1: .*No space left'
fault 0:validate:60:kill  137  'rank 0 .*has died: it was in validate of step 60'
if [ -z "${SEL_TEST_QUICK:-}" ]; then
    fault 0:backward:30:kill  137  'rank 0 .*has died: it was in backward of step 30'
    fault 1:reduce:1:kill     137  'rank 1 .*has died: it was in reduce of step 1'
    fault 1:forward:25:nan    1    'step 25: the loss is not finite .*on rank 1, in forward'
    fault 0:save:40:enospc    1    'saving step 40: rank 0: .*No space left'
    fault 1:save:40:kill      137  'rank 1 .*has died: it was in save of step 40'
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
