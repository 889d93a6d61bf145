#!/usr/bin/env bash
# A run that was killed, or asked to end, and then went on is the run that never stopped: the same weights and moments
# to the bit, the same metrics but for times.
. "$(dirname "$0")/e2e.sh"
prepare

# Wide enough that a step takes some hundredths of a second: there must be time to hit the run in its middle.
size=(model.width=128 model.context=128 checkpoint.every=10 checkpoint.keep=20)

for np in $(all_or_some 1 2 1); do
    train straight$np "${size[@]}"
    expect 0 ranks $np "${arguments[@]}"
    check "no escape codes where the output is a file" test "$(grep -c "$(printf '\033')" out)" -eq 0
    check "all 60 steps are logged" test "$(losses straight$np | wc -l)" -eq 60

    # kill -9 once step 20 is saved and left behind
    train killed$np "${size[@]}"
    start $np "${arguments[@]}"
    if wait_step killed$np 21; then pass; else fail "the run with $np ranks did not reach step 21"; fi
    kill -9 "$(one_rank $((np - 1)))"
    ended fail 20
    check "it was killed before its end" test "$(last_step killed$np)" -lt 60
    expect 0 ranks $np "${arguments[@]}"
    check "it resumed" grep -q 'resuming from step [2-5]0' out
    same_state straight$np killed$np 60
    same_metrics straight$np killed$np
    check "its provenance has two starts" test "$(grep -c '"resumed_from"' killed$np/provenance.json)" -eq 2
done

# unhandled PID: TERM, INT, HUP, USR1, USR2 and XCPU are blocked but in the one thread that waits for them, since the frame
# of a handler would overwrite what generated code of the linear layers keeps below the stack pointer.
unhandled() {
    local mask blocked=0 open=0
    for mask in $(sed -n 's/^SigBlk:[[:space:]]*//p' /proc/"$1"/task/*/status); do
        if [ $((0x$mask & 0x804a03)) -eq $((0x804a03)) ]; then blocked=$((blocked + 1)); else open=$((open + 1)); fi
    done
    echo "$blocked threads block them, $open wait for them"
    [ $blocked -gt 1 ] && [ $open -le 1 ]
}

# A signal to either rank: the step is finished and saved, status 85.
rank=0
for signal in $(all_or_some 2 TERM USR1 INT HUP USR2 XCPU); do
    train asked$signal "${size[@]}"
    start 2 "${arguments[@]}"
    if wait_step asked$signal 5; then pass; else fail "the run for $signal did not reach step 5"; fi
    check "$signal: no handler on a stack that computes" unhandled "$(one_rank $rank)"
    kill -$signal "$(one_rank $rank)"
    ended 85 20
    at=$(last_step asked$signal)
    check "$signal: stopped before the end" test "$at" -lt 60
    check "$signal: the user is told, once" test "$(grep -c "SIG$signal received: finishing step $at, then saving" err)" -eq 1
    check "$signal: saved at the step it reached, $at" test -f "$(state asked$signal "$at")/manifest.json"
    expect 0 ranks 2 "${arguments[@]}"
    check "$signal: resumed at step $at" grep -q "resuming from step $at\$" out
    same_state straight2 asked$signal 60
    same_metrics straight2 asked$signal
    rank=$((1 - rank))
done

# What can wait does not keep the save from being in time: no validation once the signal is known.
train hurried train.steps=10 train.validate_every=1
SELECTRA_FAULT=1:forward:5:term,0:validate:5:kill expect 85 ranks 2 "${arguments[@]}"
said 'SIGTERM received: finishing step 5, then saving'
check "step 5 is saved" test -f "$(state hurried 5)/manifest.json"
check "step 4 was validated, step 5 was not" test "$(sed -nE 's/^\{"step":([0-9]+),.*"val_loss".*/\1/p' hurried/metrics.jsonl |
    tail -n 1)" -eq 4
verdict
