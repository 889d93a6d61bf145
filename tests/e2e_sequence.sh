#!/usr/bin/env bash
# Ranks that share sequences learn what one rank learns: losses of 60 steps agree to 1e-4 (the bound, the learning rate
# and the batch are those of e2e_ranks.sh, which says why), whatever the mesh, the cut, the way that keys take, and
# through changes of the mesh at a checkpoint.  What cannot be divided is refused with what would work.
. "$(dirname "$0")/e2e.sh"
prepare

# difference FILE FILE: the largest between two lists of 60 "step loss" lines; 9e9 where steps are missing.
difference() {
    awk 'NR == FNR { a[$1] = $2; next }
         { n++; d = $2 - a[$1]; if (d < 0) d = -d; if (d > most) most = d; if (!($1 in a)) n = -1e9 }
         END { printf "%.3g\n", n == 60 ? most : 9e9 }' "$1" "$2"
}

# alike RUN RUN: their losses, and the loss on the validation corpus, whose last window is incomplete.
alike() {
    losses "$1" >losses.1
    losses "$2" >losses.2
    local far; far=$(difference losses.1 losses.2)
    echo "    $2: $far"
    check "losses of $1 and $2 differ by $far" awk -v d="$far" 'BEGIN { exit !(d <= 1e-4) }'
    far=$(grep -ho '"val_loss":[^,]*,"val_tokens":[0-9]*' "$1/metrics.jsonl" "$2/metrics.jsonl" | tr ':,' '  ' |
          awk '{ v[NR] = $2; n[NR] = $4 }
               END { d = v[1] - v[2]; print NR == 2 && n[1] == n[2] ? (d < 0 ? -d : d) : 9e9 }')
    check "validation losses of $1 and $2 differ by $far" awk -v d="$far" 'BEGIN { exit !(d <= 1e-4) }'
}

common=(train.lr=0.0002 train.batch=24 train.validate_tokens=0)
memory_loss=(attention.memory_loss.epsilon=0.1)
for kind in $(all_or_some 1 plain bilinear standard); do
    case $kind in
        plain) settings=("${common[@]}" "${memory_loss[@]}") ;;
        bilinear) settings=("${common[@]}" attention.selection.source=bilinear attention.dead_keys=rounding) ;;
        standard) settings=("${common[@]}" attention.kind=standard) ;;
    esac
    train $kind/1 "${settings[@]}"
    expect 0 ranks 1 "${arguments[@]}"
    echo "$kind: largest differences from 1 rank:"
    train $kind/2 "${settings[@]}" dist.mesh.sequence=2
    expect 0 ranks 2 "${arguments[@]}"
    check "zigzag where it divides" grep -q 'an early and a late chunk each (zigzag)' out
    alike $kind/1 $kind/2
    train $kind/2x2 "${settings[@]}" dist.mesh.sequence=2 dist.sequence_chunks=contiguous
    expect 0 ranks 4 "${arguments[@]}"
    check "contiguous where asked for" grep -q 'one chunk each (contiguous); 2 sequence groups' out
    alike $kind/1 $kind/2x2
    [ "${SEL_TEST_QUICK:-}" ] && continue
    train $kind/messages "${settings[@]}" dist.mesh.sequence=4 dist.shared_memory=false
    expect 0 ranks 4 "${arguments[@]}"
    said 'exchange keys by MPI, as dist.shared_memory asks'
    alike $kind/1 $kind/messages
done

if [ ! "${SEL_TEST_QUICK:-}" ]; then
    # Over hosts, with moments shared out over all ranks; what goes over the wire is counted.
    train hosts "${common[@]}" "${memory_loss[@]}" dist.mesh.sequence=4 dist.zero=1
    SELECTRA_HOSTS=2,2 expect 0 ranks 4 "${arguments[@]}"
    said 'sequence groups reach over several hosts'
    alike plain/1 hosts
    check "keys are counted" awk -F'"wire_bytes":' 'NR == 3 { exit !($2 + 0 > 1e5) }' hosts/metrics.jsonl

    # Where operands are bfloat16, keys go as bfloat16 between hosts, and are the same as in a window.  (dist.shared_memory
    # is the other way to have messages: but then gradients are summed by MPI, too.)
    bfloat16=("${common[@]}" "${memory_loss[@]}" train.precision=bfloat16 train.steps=6)
    train bfloat16.window "${bfloat16[@]}" dist.mesh.sequence=2
    expect 0 ranks 2 "${arguments[@]}"
    train bfloat16.hosts "${bfloat16[@]}" dist.mesh.sequence=2
    SELECTRA_HOSTS=1,1 expect 0 ranks 2 "${arguments[@]}"
    same_state bfloat16.window bfloat16.hosts 6
    train float32.hosts "${bfloat16[@]}" train.precision=float32 dist.mesh.sequence=2
    SELECTRA_HOSTS=1,1 expect 0 ranks 2 "${arguments[@]}"
    check "keys take half the bytes" awk -F'"wire_bytes":' '{ v[FNR == NR] = $2 + 0 } END { exit !(v[0] > 0 && v[0] < 0.95 * v[1]) }' \
        float32.hosts/metrics.jsonl bfloat16.hosts/metrics.jsonl

    # The mesh changes at checkpoints: 2 ranks a sequence, then none, then 4.
    train mixed "${common[@]}" "${memory_loss[@]}" dist.mesh.sequence=2
    SELECTRA_FAULT=1:forward:20:term expect 85 ranks 2 "${arguments[@]}"
    train mixed "${common[@]}" "${memory_loss[@]}"
    SELECTRA_FAULT=0:forward:40:term expect 85 ranks 1 "${arguments[@]}"
    check "one rank resumed what two had saved" grep -q 'resuming from step 20' out
    train mixed "${common[@]}" "${memory_loss[@]}" dist.mesh.sequence=4
    expect 0 ranks 4 "${arguments[@]}"
    check "four ranks resumed what one had saved" grep -q 'resuming from step 40' out
    alike plain/1 mixed
fi

# With virtual ranks the bits do not depend on how many groups share the batch; twice alike is equal to the bit.
virtual=("${common[@]}" "${memory_loss[@]}" train.steps=6 train.batch=16 train.micro_batch=1 dist.virtual_ranks=4
         dist.mesh.sequence=2)
for groups in 1 2 4; do
    train virtual$groups "${virtual[@]}"
    expect 0 ranks $((2 * groups)) "${arguments[@]}"
done
same_state virtual1 virtual2 6
same_state virtual1 virtual4 6
train again "${virtual[@]}"
SELECTRA_HOSTS=3,1 expect 0 ranks 4 "${arguments[@]}"
same_state virtual1 again 6

# Sixteen groups of four, on far fewer cores.
if [ ! "${SEL_TEST_QUICK:-}" ]; then
    many=("${common[@]}" train.steps=4 train.batch=64 train.validate_every=0 checkpoint.every=0 model.context=32)
    train one "${many[@]}"
    expect 0 ranks 1 "${arguments[@]}"
    train many "${many[@]}" dist.mesh.sequence=4
    LIMIT=200 expect 0 ranks 64 "${arguments[@]}"
    losses one >losses.1
    losses many >losses.2
    check "64 ranks, 16 x 4, agree with one" awk 'NR == FNR { a[$1] = $2; next }
        { n++; d = $2 - a[$1]; bad += d > 1e-5 || d < -1e-5 } END { exit !(n == 4 && !bad) }' losses.1 losses.2
fi

# Refusals: nothing is written.
refuse() { train refused "${common[@]}" "${@:3}"; expect 2 ranks "$1" "${arguments[@]}"; said "$2"; }
refuse 3 'do not make groups of 2 that share sequences; 1 or 3 would work' dist.mesh.sequence=2
refuse 2 'model.context: 63 tokens cannot be cut .* 62 or 64 would work' model.context=63 dist.mesh.sequence=2
refuse 2 'model.context: 66 tokens .*zigzag.* 64 or 68 would work.* or dist.sequence_chunks: contiguous' \
    model.context=66 dist.mesh.sequence=2 dist.sequence_chunks=zigzag
refuse 4 'train.batch: 25 samples .* 2 data-parallel ranks' train.batch=25 dist.mesh.sequence=2
refuse 4 'dist.mesh: data 4 x sequence 2' dist.mesh.data=4 dist.mesh.sequence=2
check "nothing written" [ ! -e refused ]
verdict
