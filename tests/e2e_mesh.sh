#!/usr/bin/env bash
# Distribution does not change what is learnt, to the bit where that is promised:
# dist.virtual_ranks 8 at 1, 2, 4 and 8 ranks, with ranks that change at a checkpoint, with hosts (pretended by
# SELECTRA_HOSTS), without shared memory and with dist.zero; the same ranks twice; dist.zero as without it.
. "$(dirname "$0")/e2e.sh"
prepare

settings=(train.steps=30 train.batch=16 train.clip=0.5 train.validate_every=0 checkpoint.every=0)

# trained RUN RANKS [key=value...]: 30 steps.
trained() {
    train "$1" "${settings[@]}" "${@:3}"
    expect 0 ranks "$2" "${arguments[@]}"
}

# ---- the fixed tree
tree=(dist.virtual_ranks=8)
trained w8.1 1 "${tree[@]}"
for np in 2 4 8; do
    trained w8.$np $np "${tree[@]}"
    same_state w8.1 w8.$np 30
    losses w8.1 >a; losses w8.$np >b
    check "losses of $np ranks are those of one, to the bit" cmp a b
done
trained w8.mpi 4 "${tree[@]}" dist.shared_memory=false
same_state w8.1 w8.mpi 30
said 'reduce by MPI, as dist.shared_memory asks'
for hosts in 2,2 1,1,1,1 1,3; do
    SELECTRA_HOSTS=$hosts trained w8.$hosts 4 "${tree[@]}"
    same_state w8.1 w8.$hosts 30
done
said 'do not fit into the fixed tree'
SELECTRA_HOSTS=2,2 trained w8.zero 4 "${tree[@]}" dist.zero=1
same_state w8.1 w8.zero 30

# Ranks that change at a checkpoint, and with them what each holds.
train w8.mixed "${settings[@]}" "${tree[@]}"
SELECTRA_FAULT=0:forward:11:term expect 85 ranks 8 "${arguments[@]}"
SELECTRA_FAULT=0:forward:19:term expect 85 ranks 1 "${arguments[@]}" dist.zero=1
expect 0 ranks 4 "${arguments[@]}" dist.zero=1
same_state w8.1 w8.mixed 30

# Another tree gives other bits: the comparisons above can fail.
trained w4 1 dist.virtual_ranks=4
if cmp -s "$(state w4 30)/model.safetensors" "$(state w8.1 30)/model.safetensors"; then
    fail "four leaves give the bits of eight"
else
    pass
fi

# ---- any ranks: the same twice, and with dist.zero
trained r3 3 train.batch=18
trained r3.again 3 train.batch=18
same_state r3 r3.again 30
same_metrics r3 r3.again
trained r3.zero 3 train.batch=18 dist.zero=1
same_state r3 r3.zero 30
SELECTRA_HOSTS=1,2 trained r3.hosts 3 train.batch=18
SELECTRA_HOSTS=1,2 trained r3.hosts.zero 3 train.batch=18 dist.zero=1
same_state r3.hosts r3.hosts.zero 30

# Bytes between hosts: no more than the least; bfloat16 halves them, with nearly the same loss and the same bits on all
# ranks (or saving refuses).
SELECTRA_HOSTS=1,1,1 trained r3.wire 3 train.batch=18
SELECTRA_HOSTS=1,1,1 trained r3.bf16 3 train.batch=18 dist.wire=bfloat16
bytes() { sed -n 's/.*"wire_bytes":\([0-9.e+]*\),"wire_bytes_least":\([0-9.e+]*\),.*/\1 \2/p' "$1/metrics.jsonl" | tail -n 1; }
check "bytes between hosts" awk -v a="$(bytes r3.wire)" -v b="$(bytes r3.bf16)" \
    'BEGIN { split(a, x); split(b, y); print a, b; exit !(x[1] > 0 && x[1] == x[2] && y[1] == y[2] && x[1] == 2 * y[1]) }'
losses r3 >a; losses r3.bf16 >b
check "losses with bfloat16 on the wire" awk 'NR == FNR { a[$1] = $2; next } { d = $2 - a[$1]; if (d * d > 1e-4) bad = 1 }
    END { exit bad }' a b

# ---- a host that lends too little shared memory: all goes by MPI, and is said
small_shm() {
    OMPI_MCA_btl=tcp,self unshare --mount -- bash -c 'mount -t tmpfs -o size=${SHM:-16m} tmpfs /dev/shm && exec "$@"' small "$@"
}
# in_small R ARGS...: as `ranks`, there.
in_small() {
    small_shm timeout -k 5 120 mpirun -n "$1" --oversubscribe --bind-to none --mca btl_tcp_if_include lo "$SELECTRA" \
        "${@:2}"
}
if [ -z "${MPIRUN:-}" ] && small_shm true 2>/dev/null; then
    large=(model.width=512 model.layers=3 model.head_width=128 model.ffn_width=1024 model.context=8 train.steps=2)
    trained large 2 "${large[@]}"
    train small "${settings[@]}" "${large[@]}"
    expect 0 in_small 2 "${arguments[@]}"
    said 'ranks of a host reduce by MPI, which is slower: .*shared memory are needed, /dev/shm has'
    same_state large small 2

    # Two sequence groups of 11 MiB each: room for either of them alone.
    long=(model.context=2048 train.batch=12 train.micro_batch=6 train.steps=1 dist.mesh.sequence=2)
    trained long 4 "${long[@]}"
    check "room for both groups" test -z "$(grep MPI err)"
    train narrow "${settings[@]}" "${long[@]}"
    expect 0 in_small 4 "${arguments[@]}"
    said 'sequence groups exchange keys by MPI, which is slower: .*2[12][.][0-9] MiB of shared memory are needed, /dev/shm has'
    same_state long narrow 1

    # Two hosts that lie on one count its room twice; that there is none is found when it is wanted.
    twice=(model.width=256 model.layers=1 model.head_width=64 model.ffn_width=896 model.context=8 train.steps=2)
    SELECTRA_HOSTS=2,2 trained twice 4 "${twice[@]}" dist.shared_memory=false
    train twice.small "${settings[@]}" "${twice[@]}"
    SELECTRA_HOSTS=2,2 expect 0 in_small 4 "${arguments[@]}"
    said 'ranks of a host reduce by MPI, which is slower: .*the host gives only .* MiB of shared memory that it promised'
    same_state twice twice.small 2

    # Open MPI keeps its files elsewhere, where room is short: it fails on one rank, and leaves the others waiting.
    mkdir full
    train stuck "${settings[@]}" "${large[@]}" dist.watchdog_seconds=2
    OMPI_MCA_osc_sm_backing_directory=$TEMP/full expect 75 unshare --mount -- bash -c \
        'mount -t tmpfs -o size=4m tmpfs full && exec "$@"' full timeout -k 5 60 "$SOURCE/tests/mpirun.sh" -n 2 "$SELECTRA" \
        "${arguments[@]}"
    said 'rank 1 on host .* no progress for [23] s: in start of step 0, waiting in its collective [0-9]+, MPI_Win_alloc'

    # None at all, or nearly so: the watchdog cannot do with less.
    export SHM=512k
    train none "${settings[@]}" train.steps=2
    expect 1 in_small 2 "${arguments[@]}"
    said 'the watchdog: .* MiB of shared memory are needed, /dev/shm has .*; dist.watchdog_seconds: 0 does without'
    expect 0 in_small 2 "${arguments[@]}" dist.watchdog_seconds=0
    said 'ranks of a host reduce by MPI, which is slower'
fi

# ---- refused, with what would work
refused() { train refused "${settings[@]}" "${@:3}"; expect 2 ranks "$1" "${arguments[@]}"; said "$2"; }
refused 3 'dist.virtual_ranks: 8 leaves cannot be shared out to 3' dist.virtual_ranks=8 train.batch=24
refused 1 'dist.virtual_ranks: 6 is not a power of two' dist.virtual_ranks=6
refused 1 'train.batch: 12 sequences cannot be cut into the 8 leaves' dist.virtual_ranks=8 train.batch=12
refused 2 'dist.wire: bfloat16' dist.virtual_ranks=8 dist.wire=bfloat16
verdict
