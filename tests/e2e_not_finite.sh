#!/usr/bin/env bash
# dist.on_nan: skip.  A step that is not finite on one rank is left out on all; as many as dist.nan_rollback in a row go
# back to the last checkpoint, and come to the weights of a run that left out the same batches without going back.
. "$(dirname "$0")/e2e.sh"
prepare
three=1:forward:25:nan,0:backward:26:nan,1:backward:27:nan

# events RUN: the text of its events.
events() { sed -nE 's/^\{"step":([0-9]+),"event":"(.*)"\}$/\1 \2/p' "$1/metrics.jsonl"; }
# skipped RUN STEP: the list in a checkpoint's manifest.
skipped() { tr -d ' \n' <"$(state "$1" "$2")/manifest.json" | sed -nE 's/.*"skipped":\[([0-9,]*)\].*/\1/p'; }

train through dist.on_nan=skip dist.nan_rollback=4
SELECTRA_FAULT=$three expect 0 ranks 2 "${arguments[@]}"
said 'step 25: the loss is not finite .*on rank 1, in forward.*its batch is left out'
said 'step 26: the gradient is not finite .*on rank 0, in backward.*its batch is left out'
check "three events" test "$(events through | grep -c 'its batch is left out$')" -eq 3
check "the manifest names them" test "$(skipped through 40)-$(skipped through 60)" = 25,26,27-25,26,27
check "before them it names none" test -z "$(skipped through 20)"
check "no row of a step that was left out" test "$(losses through | grep -cE '^(25|26|27) ')" -eq 0
check "57 batches were trained on" grep -q '"step":60,.*"tokens":43776,' through/metrics.jsonl

train back dist.on_nan=skip dist.nan_rollback=3
SELECTRA_FAULT=$three expect 0 ranks 2 "${arguments[@]}"
said 'steps 25 to 27 were not finite: back to step 20, their batches are left out'
same_state through back 60
losses through >losses.1
losses back >losses.2
check "the same losses" cmp losses.1 losses.2
check "each step has one row" test "$(losses back | cut -d' ' -f1 | sort | uniq -d | wc -l)" -eq 0
check "the manifest names them" test "$(skipped back 60)" = 25,26,27
check "the events stay" test "$(events back | grep -cE '^(20 steps 25 to 27|2[567] step 2[567]: its batch is left out)')" -eq 4

# It is no use: the batches that follow are as bad.
train worse dist.on_nan=skip dist.nan_rollback=2
SELECTRA_FAULT=1:forward:25:nan,1:forward:26:nan,1:forward:27:nan,1:forward:28:nan expect 1 ranks 2 "${arguments[@]}"
said 'steps 27 to 28: not finite again, after a return to the last checkpoint'

# A checkpoint that is due while steps are not finite waits for one that is.
train due dist.on_nan=skip train.steps=50
SELECTRA_FAULT=0:forward:39:nan,0:forward:40:nan,0:forward:41:nan expect 0 ranks 2 "${arguments[@]}"
check "the checkpoint of step 40 came with step 42" test -d "$(state due 42)" -a ! -e "$(state due 40)"
verdict
