#!/usr/bin/env bash
# The number of ranks does not change what is learnt: the losses of 1, 2, 3 and 4 ranks agree to 1e-4 over 60 steps,
# in which the loss falls by at least 1 nat.  So with other micro-batches, and when ranks change at a checkpoint.
#
# Ranks sum gradients in another order, so weights differ in their last bits.  Selection has a kink: a logit of head 0
# that lies so near to 0 that those bits change its sign changes the gradient by far more than rounding.  This is met
# in about one run of twenty at this size.  A selective run that has met it is repeated with the next of three seeds;
# standard attention has no kink and gets no second chance.
. "$(dirname "$0")/e2e.sh"
prepare

# agree FILE FILE: two lists of 60 "step loss" lines, to 1e-4.
agree() {
    awk 'NR == FNR { a[$1] = $2; next }
         { n++; d = $2 - a[$1]; if (!($1 in a) || !(d * d <= 1e-8)) { print $1, a[$1], $2; bad = 1; exit } }
         END { exit bad || n != 60 }' "$1" "$2"
}

# all_agree KIND SEED: the run in all its ways; the list of those that differ is in the file differ.
all_agree() {
    local np settings=(attention.kind="$1" run.seed="$2")
    rm -rf run losses.* differ
    for np in 1 2 3 4; do
        train run/$np "${settings[@]}"
        expect 0 ranks $np "${arguments[@]}"
        losses run/$np >losses.$np
    done
    train run/micro "${settings[@]}" train.micro_batch=3
    expect 0 ranks 2 "${arguments[@]}"
    losses run/micro >losses.micro

    # Saved by two ranks at step 30, carried on by three.
    train run/mixed "${settings[@]}"
    SELECTRA_FAULT=0:forward:30:term expect 85 ranks 2 "${arguments[@]}"
    expect 0 ranks 3 "${arguments[@]}"
    check "three ranks resumed what two had saved" grep -q 'resuming from step 30' out
    losses run/mixed >losses.mixed

    check "$1: the loss falls by 1 nat or more" \
        awk 'NR == 1 { first = $2 } { last = $2 } END { print first, last; exit !(first - last >= 1) }' losses.1
    for way in 2 3 4 micro mixed; do
        agree losses.1 losses.$way >first || echo "$way: $(cat first)" >>differ
    done
    [ ! -e differ ]
}

if all_agree standard 1; then pass; else fail "standard attention: losses differ by more than 1e-4"; cat differ; fi

for seed in 1 2 3; do
    all_agree selective $seed && break
    echo "seed $seed: $(tr '\n' ' ' <differ)"
done
if [ ! -e differ ]; then pass; else fail "selective attention: losses differ by more than 1e-4 with three seeds"; fi
verdict
