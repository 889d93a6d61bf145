#!/usr/bin/env bash
# Two hosts on a slow link: the bytes on it are those of the theory, by the metrics and by the interface's own counter;
# overlap hides some of their time; results are those of one host, to the bit.  A token bucket (tc's tbf) shapes the
# link.
#
#   e2e_links.sh                          the test, at 250 Mbit/s
#   e2e_links.sh "KEY=VALUE..." RATE...   a table instead (rates as tc has them: 100mbit 1gbit): dist/README.md has one
. "$(dirname "$0")/e2e.sh"
. "$(dirname "$0")/hosts.sh"
command -v tc >/dev/null || { echo "skipped: no tc (iproute2)"; exit 77; }
hosts_up
prepare
starter=(mpirun)

# shape RATE: both ways, at the bridge's ports, with a queue long enough that nothing is dropped.
shape() {
    local port
    for port in p1 p2; do
        if ! ip netns exec $lan tc qdisc replace dev $port root tbf rate "$1" burst 256kb latency 1s 2>why; then
            echo "skipped: the kernel shapes no link: $(cat why)"
            exit 77
        fi
    done
}

# across RUN [key=value...]: a rank on each host; what the first one has sent goes to RUN.sent.
across() {
    local before
    train "$@"
    before=$(on $head cat /sys/class/net/eth0/statistics/tx_bytes)
    start_hosts "${arguments[@]}"
    ended 0 120
    echo $(($(on $head cat /sys/class/net/eth0/statistics/tx_bytes) - before)) >"$1.sent"
}

# sorted RUN KEY: its values from the third step on; their median; the least of them.
sorted() {
    sed -n "s/^{\"step\":\([0-9]*\),.*\"$2\":\([^,}]*\).*/\1 \2/p" "$1/metrics.jsonl" |
        awk '$1 > 2 { print $2 }' | sort -g
}
median() { sorted "$@" | awk '{ x[NR] = $1 } END { print x[int((NR + 1) / 2)] }'; }
least() { sorted "$@" | head -n 1; }

floats() { echo $((($(stat -c %s "$(state "$1" "$2")/model.safetensors") - 8192) / 4)); }

steps=8
settings=(train.steps=$steps train.log_every=1 train.validate_every=0 checkpoint.every=0 data.validation=)

if [ $# -gt 0 ]; then
    settings+=($1)
    train here "${settings[@]}"
    expect 0 ranks 2 "${arguments[@]}"
    echo "rate wire overlap: tokens/s, seconds waited a step, share hidden, MB a host and step (metrics, interface)"
    echo "one host: $(median here tokens_per_second) $(median here wire_wait_seconds) $(median here wire_hidden)"
    for rate in "${@:2}"; do
        shape "$rate"
        for wire in float32 bfloat16; do
            for overlap in true false; do
                across $rate.$wire.$overlap "${settings[@]}" dist.wire=$wire dist.overlap=$overlap
                run=$rate.$wire.$overlap
                echo "$rate $wire $overlap: $(median $run tokens_per_second) $(median $run wire_wait_seconds)" \
                    "$(median $run wire_hidden)" \
                    "$(awk -v w="$(median $run wire_bytes)" -v s="$(cat $run.sent)" -v n=$steps \
                           'BEGIN { printf "%.2f %.2f", w / 2e6, s / n / 1e6 }')"
                rm -rf "$run"
            done
        done
    done
    verdict
fi

# Backward takes about as long as the gradient is on the link: 1.7 M floats, 6144 tokens a rank.
settings+=(model.width=128 model.layers=8 model.heads=4 model.kv_heads=4 model.head_width=32 model.ffn_width=341
           train.batch=192 train.micro_batch=96)
train here "${settings[@]}"
expect 0 ranks 2 "${arguments[@]}"
shape 250mbit
across on "${settings[@]}"
across off "${settings[@]}" dist.overlap=false
across rounded "${settings[@]}" dist.wire=bfloat16

same_state here on $steps
same_state here off $steps

# as_theory RUN BYTES: a host sends 2 (hosts - 1) / hosts = 1 gradient a step, in numbers of so many bytes; the
# interface's counter has headers, acknowledgements and what mpirun says on top.
as_theory() {
    check "$1: bytes on the wire" awk -v told="$(median "$1" wire_bytes)" -v sent="$(cat "$1.sent")" \
        -v theory=$(($(floats here $steps) * $2)) -v n=$steps 'BEGIN {
            print told / 2, sent / n, theory
            bad = told / 2 < 0.95 * theory || told / 2 > 1.05 * theory || sent / n < theory || sent / n > 1.05 * theory
            exit bad }'
    echo "$1: MB a step by the metrics, the interface, the theory:" \
        "$(awk '{ printf "%.3f %.3f %.3f", $1 / 1e6, $2 / 1e6, $3 / 1e6 }' check.out)"
}
as_theory on 4
as_theory off 4
as_theory rounded 2

for run in on off rounded; do
    echo "$run: waited $(median $run wire_wait_seconds) s a step, at best $(least $run wire_wait_seconds)," \
        "hidden $(median $run wire_hidden)"
done
# A busy machine adds to what is waited, so the best steps are compared: with overlap less is waited than without, where
# it is all of the link's time for the bytes (but for what fits into the bucket).
link_seconds=$(awk -v bytes=$(($(floats here $steps) * 4)) 'BEGIN { print bytes * 8 / 250e6 }')
check "overlap hides some of the link's $link_seconds s" \
    awk -v on="$(least on wire_wait_seconds)" -v off="$(least off wire_wait_seconds)" -v link="$link_seconds" \
        'BEGIN { exit !(on < off - 0.15 * link) }'
check "without overlap the link's time is waited for" \
    awk -v least="$(least off wire_wait_seconds)" -v link="$link_seconds" 'BEGIN { exit !(least > 0.85 * link) }'
check "without overlap nothing is hidden" awk -v h="$(median off wire_hidden)" 'BEGIN { exit !(h > -0.05 && h < 0.05) }'

# The fixed tree does not see where ranks are.
tree=(train.steps=4 train.batch=8 train.validate_every=0 checkpoint.every=0 dist.virtual_ranks=2)
train alone "${tree[@]}"
expect 0 ranks 1 "${arguments[@]}"
across apart "${tree[@]}"
same_state alone apart 4
verdict
