#!/usr/bin/env bash
# More ranks than cores: 64 of them train, and agree with one to the bit.  What a rank's state takes with dist.zero, as
# measured, is what the formula says: 8 bytes a parameter for its moments without it, 8 / R with it.
. "$(dirname "$0")/e2e.sh"
prepare

many=(train.steps=4 train.batch=64 train.validate_every=0 checkpoint.every=0 dist.virtual_ranks=64 model.context=32)
train one "${many[@]}"
expect 0 ranks 1 "${arguments[@]}"
train sixtyfour "${many[@]}"
LIMIT=200 expect 0 ranks 64 "${arguments[@]}"
same_state one sixtyfour 4
check "said once that ranks share cores" [ "$(grep -c 'ranks share cores: on host' err)" = 1 ]

# memory RUN R ZERO: mean bytes of the ranks after the second step, what they share counted once.
memory() {
    train "$1" train.steps=1000 train.batch=8 train.validate_every=0 checkpoint.every=0 dist.zero="$3" model.width=512 \
        model.layers=4 model.heads=8 model.kv_heads=8 model.head_width=64 model.ffn_width=1365 model.context=8
    start "$2" "${arguments[@]}"
    wait_step "$1" 2 || fail "no second step with $2 ranks"
    kill -STOP $(rank_pids)
    cat $(rank_pids | sed 's,.*,/proc/&/smaps_rollup,') | awk -v ranks="$2" '/^Pss:/ { s += $2 } END { print int(s * 1024 / ranks) }'
    kill -9 $(rank_pids)
    wait "$job" 2>/dev/null
    job=
}

# Not with SEL_TEST_QUICK, under the sanitizers: it would measure their memory.
[ -n "${SEL_TEST_QUICK:-}" ] || for np in 1 2 4 8; do
    memory m$np.0 $np 0 >plain
    memory m$np.1 $np 1 >sharded
    floats=$(($(stat -c %s "$(state m$np.0 0)/model.safetensors") / 4))
    check "memory of $np ranks" awk -v a="$(cat plain)" -v b="$(cat sharded)" -v n="$floats" -v r="$np" 'BEGIN {
        saved = 8 * n * (1 - 1 / r); printf "%d ranks: %.1f MiB a rank, %.1f with dist.zero; saved %.1f, by the formula %.1f\n",
            r, a / 1048576, b / 1048576, (a - b) / 1048576, saved / 1048576
        d = (a - b) - saved; if (d < 0) d = -d; exit !(d <= 0.1 * saved + 2e6) }'
    cat check.out
done
verdict
