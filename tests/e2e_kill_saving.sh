#!/usr/bin/env bash
# kill -9 at a random moment, 30 times (8 with SEL_TEST_QUICK), in a run that saves after every step: every restart
# works, and in the end the weights are those of a run that was never killed.  KILL_SEED=N repeats a sequence of
# moments.
. "$(dirname "$0")/e2e.sh"
export OMPI_MCA_odls_base_sigkill_timeout=0   # the other ranks die at once too, not after a second
prepare

KILL_SEED=${KILL_SEED:-$$}
RANDOM=$KILL_SEED
echo "KILL_SEED=$KILL_SEED"
steps=240 margin=100 most=30   # no delay below lasts as long as `margin` steps
[ -z "${SEL_TEST_QUICK:-}" ] || steps=80 margin=40 most=8
size=(model.width=512 model.ffn_width=1024 train.batch=2 train.steps=$steps train.validate_tokens=256)   # 40 MB to save

train straight "${size[@]}" checkpoint.every=0
expect 0 ranks 2 "${arguments[@]}"

# finish: what was killed goes on to the end, and is the straight run then.
finish() {
    train killed "${size[@]}" checkpoint.every=0
    expect 0 ranks 2 "${arguments[@]}"
    same_state straight killed $steps
    check "nothing half-written is left" test -z "$(find killed -name '.tmp-*' -o -name '*.tmp')"
}

unfinished=0
for ((kills = 1; kills <= most; kills++)); do
    before=$(last_step killed)
    if [ "$before" -gt $((steps - margin)) ]; then   # a fast machine: another run, lest it should end before its kill
        finish
        rm -rf killed
        before=-1
    fi
    train killed "${size[@]}" checkpoint.every=1
    start 2 "${arguments[@]}"
    # The first start may be hit before anything is saved; the others once they have gone on.
    for ((tries = 0; tries < 500; tries++)); do [ -n "$(one_rank 1)" ] && break; sleep 0.02; done
    if [ $kills -gt 1 ] && ! wait_step killed $((before + 1)); then
        fail "start $kills did not go on from step $before"
        tail -n 20 out err
    fi
    sleep "$(printf '0.%03d' $((RANDOM % 600)))"
    rank=$(one_rank $((RANDOM % 2)))
    check "there is a rank to kill" kill -9 "$rank"
    ended fail 20
    ls -d killed/checkpoints/.tmp-* >/dev/null 2>&1 && unfinished=$((unfinished + 1))
done
echo "killed $most times, $unfinished times within a save; now at step $(last_step killed)"
check "some kills fell within a save" test $unfinished -gt 0
finish
verdict
