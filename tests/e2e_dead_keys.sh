#!/usr/bin/env bash
# Training that leaves out dead keys is training that does not: the same losses, to rounding, step by step.  Later the
# kinks of selection drive any two runs apart that round differently at all, so the steps are few.
. "$(dirname "$0")/e2e.sh"
prepare

STEPS=20
same=(model.context=512 model.head_width=64 train.batch=2 train.steps=$STEPS train.validate_tokens=4096
      attention.memory_loss.epsilon=0.1 checkpoint.every=0)

# numbers RUN KEY: of the metrics' rows, one a line.
numbers() { sed -n "s/.*\"$2\":\([-+.0-9e]*\).*/\1/p" "$1/metrics.jsonl"; }

# apart RUN RUN KEY: the largest difference of their rows; nothing where they have not as many.
apart() {
    paste <(numbers "$1" "$3") <(numbers "$2" "$3") |
        awk 'NF != 2 { exit } { d = $1 - $2; if (d < 0) d = -d; if (d > most) most = d; n++ } END { if (n) print n, most }'
}

train off "${same[@]}" attention.dead_keys=off
expect 0 selectra "${arguments[@]}"
for kind in rounding exact; do
    train $kind "${same[@]}" attention.dead_keys=$kind
    expect 0 selectra "${arguments[@]}"
    check "$kind: keys die" awk -v live="$(sed -n 's/.*"live_keys":\[\([.0-9]*\).*/\1/p' $kind/metrics.jsonl | tail -n 1)" \
        'BEGIN { exit !(live > 0 && live < 0.95) }'
    for key in loss memory_loss; do
        check "$kind: $key of all steps but for rounding" awk -v of="$(apart off $kind $key)" -v steps=$STEPS \
            'BEGIN { split(of, x, " "); print of; exit !(x[1] >= steps && x[2] < 1e-5) }'
    done
done
verdict
