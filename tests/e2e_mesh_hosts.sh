#!/usr/bin/env bash
# Three hosts: the losses and weights of one, bytes between them as the theory has it, with and without dist.zero.
. "$(dirname "$0")/e2e.sh"
. "$SOURCE/tests/many_hosts.sh"
hosts_up 3
prepare

settings=(train.steps=20 train.batch=24 train.validate_every=0 checkpoint.every=0)

# row RUN KEY: of the last logged step.
row() { tail -n 1 "$1/metrics.jsonl" | sed -n "s/.*\"$2\":\([^,}]*\).*/\1/p"; }

# as_theory RUN HOSTS BYTES: bytes between hosts a step are those of 2 (hosts - 1) gradients, within 5%.
as_theory() {
    local floats
    floats=$(( ($(stat -c %s "$(state "$1" 20)/model.safetensors") - 8192) / 4 ))
    check "$1 sends what it must" awk -v sent="$(row "$1" wire_bytes)" -v least="$(row "$1" wire_bytes_least)" \
        -v theory=$((2 * ($2 - 1) * floats * $3)) 'BEGIN {
            print sent, least, theory
            exit !(sent >= least && sent <= 1.05 * least && least > 0.95 * theory && least < 1.05 * theory) }'
}

train one "${settings[@]}"
expect 0 ranks 3 "${arguments[@]}"
train three "${settings[@]}"
expect 0 on_hosts 1 "${arguments[@]}"
check "three hosts are seen" grep -q '3 ranks on 3 hosts' out
same_state one three 20     # a tree over three ranks is the same wherever they are
as_theory three 3 4
train three.zero "${settings[@]}" dist.zero=1
expect 0 on_hosts 1 "${arguments[@]}"
same_state one three.zero 20
as_theory three.zero 3 4
train three.bf16 "${settings[@]}" dist.wire=bfloat16
expect 0 on_hosts 1 "${arguments[@]}"
as_theory three.bf16 3 2

# Two ranks a host: shared memory in each, parts between them.
train six "${settings[@]}"
expect 0 on_hosts 2 "${arguments[@]}"
check "six ranks on three hosts" grep -q '6 ranks on 3 hosts' out
as_theory six 3 4
SELECTRA_HOSTS=2,2,2 train six.here "${settings[@]}"
SELECTRA_HOSTS=2,2,2 expect 0 ranks 6 "${arguments[@]}"
same_state six six.here 20

expect 0 on_hosts 1 bench mesh --bytes 4000000 --runs 3 --json
check "the benchmark has rows between hosts" grep -q '"name": "allreduce_hosts", "bytes": 3999996' out
verdict
