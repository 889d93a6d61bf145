#!/usr/bin/env bash
# Two hosts, and one of them is lost: its cable is pulled, or its packets vanish.  Both sides notice, say which host, and
# end: with `selectra launch` when mpirun has noticed too (its status is 205), without it when the watchdog kills mpirun.
. "$(dirname "$0")/e2e.sh"
. "$(dirname "$0")/hosts.sh"
hosts_up
prepare
export OMPI_MCA_oob_tcp_keepalive_time=1 OMPI_MCA_oob_tcp_keepalive_intvl=1 OMPI_MCA_oob_tcp_keepalive_probes=5

# emptied WHAT: within 15 s nobody is left on the second host.
emptied() {
    local i
    for ((i = 0; i < 150; i++)); do [ -z "$(hosts_left)" ] && break; sleep 0.1; done
    check "$1: nobody is left on the host" test -z "$(hosts_left)"
}

# lose HOW STATUS
lose() {
    local how=$1 begun
    train $how train.steps=1000000 dist.watchdog_seconds=3
    start_hosts "${arguments[@]}"
    if wait_step $how 20; then pass; else fail "$how: the run did not reach step 20"; cat err; fi
    sleep 1   # hosts that have not heard each other yet cannot miss each other
    begun=$EPOCHREALTIME
    $how
    ended "$2" 25
    echo "$how: the job ended after $(seconds_since $begun) s"
    said "rank 0.* watchdog: host $other \(rank 1\) has not been heard for [0-9]+ s"
    emptied "$how"
    echo "$how: the other host was empty after $(seconds_since $begun) s"
    said "rank 1.* watchdog: host $head \(rank 0\) has not been heard" err.1
    heal
}

starter=("$SELECTRA" launch --restarts 0 -- mpirun)
lose cut_off 205
train cut_off train.steps=$((($(last_step cut_off) / 20) * 20 + 20))
expect 0 ranks 2 "${arguments[@]}"
check "the run goes on" grep -q 'resuming from step' out

unset OMPI_MCA_oob_tcp_keepalive_time OMPI_MCA_oob_tcp_keepalive_intvl OMPI_MCA_oob_tcp_keepalive_probes
starter=(mpirun)
lose blackhole 137

# A rank of the other host hangs, or is stopped: host 0 ends the job, the stack comes from the other one.  Also where the
# two share sequences: the one on host 0 waits for keys then, and is no further.
for case in 1:forward:30:sleep/1 1:reduce:30:stop/1 1:forward:30:sleep/2; do
    fault=${case%/*} run=stuck-${case//[:\/]/-}
    train $run dist.watchdog_seconds=2 dist.mesh.sequence=${case#*/}
    SELECTRA_FAULT=$fault start_hosts -x SELECTRA_FAULT "${arguments[@]}"
    wait_step $run 29
    begun=$EPOCHREALTIME
    ended 75 20
    echo "$case on the other host: the job ended after $(seconds_since $begun) s"
    case $fault in
    *sleep)
        said "rank 0.* watchdog: rank 1 on host $other has made no progress for [0-9]+ s: in forward of step 30"
        said '^\[rank 1\]  .*nanosleep' err.1 ;;
    *stop) said "rank 0.* watchdog: host $other \(rank 1\) has not been heard for [0-9]+ s" ;;
    esac
    emptied "$case"
done
verdict
