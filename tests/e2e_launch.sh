#!/usr/bin/env bash
# selectra launch: a failed job is started again and goes on from its last checkpoint, as often as the configuration says;
# asked to end, it saves.
. "$(dirname "$0")/e2e.sh"
prepare
mpirun="$SOURCE/tests/mpirun.sh"

train straight
expect 0 ranks 2 "${arguments[@]}"

# Faults of the first start only: what the words do once they are gone.
cat >first_time <<'END'
#!/bin/bash
if [ -e started ]; then unset SELECTRA_FAULT; fi
touch started
exec "$@"
END
chmod +x first_time
for fault in 0:reduce:30:stop 1:save:40:enospc; do
    run=again-${fault//:/-}
    rm -f started
    train "$run" dist.watchdog_seconds=2
    SELECTRA_FAULT=$fault expect 0 selectra launch ./first_time "$mpirun" -n 2 "$SELECTRA" "${arguments[@]}"
    said 'selectra launch: the job ended with status (75|1)( .*)? after [0-9]+s; restart 1 of 3 from step-000000[24]0'
    same_state straight "$run" 60
done

# As often as it may, and no more.
train never run.restarts=2
SELECTRA_FAULT=1:forward:25:kill expect 137 selectra launch "$mpirun" -n 2 "$SELECTRA" "${arguments[@]}"
check "two restarts" test "$(grep -c 'restart [12] of 2 from step-00000020' err)" -eq 2
check "three starts" test "$(grep -c '"resumed_from"' never/provenance.json)" -eq 3
said 'is not started again'

# A mistake is not repeated; one in the configuration is seen before anything is started.
train mistake train.batch=13
expect 2 selectra launch "$mpirun" -n 2 "$SELECTRA" "${arguments[@]}"
check "one start" test "$(grep -c 'train.batch' err)" -eq 1
train mistake train.bach=13
expect 2 selectra launch /no/such/mpirun "$SELECTRA" "${arguments[@]}"
said 'did you mean train.batch'
expect 2 selectra launch --restarts 1 -- /no/such/mpirun
said '/no/such/mpirun: cannot be started: No such file'
expect 2 selectra launch --restarts -1 -- true
expect 2 selectra launch
expect 2 selectra launch true
said 'restarts'
expect 3 selectra launch --restarts 1 -- sh -c 'exit 3'

# mpirun is told to keep connections alive, unless the user has told it already.
OMPI_MCA_oob_tcp_keepalive_probes=9 expect 0 selectra launch --restarts 0 -- env
check "keepalive" test "$(grep -cE '^OMPI_MCA_oob_tcp_keepalive_(time=2|intvl=4|probes=9)$' out)" -eq 3

# TERM: the ranks save, status 85, and the same command goes on.
train asked train.steps=1000000 checkpoint.every=0
"$SELECTRA" launch "$mpirun" -n 2 "$SELECTRA" "${arguments[@]}" >out 2>err &
job=$!
if wait_step asked 10; then pass; else fail "the run did not reach step 10"; tail -n 3 err; fi
kill -TERM "$job"
ended 85 20
said 'asking the job to save and end'
check "it was saved where it ended" test -f "$(state asked "$(last_step asked)")/manifest.json"
check "nobody is left" test -z "$(grep -lsa 'run[.]dir=asked' /proc/[0-9]*/cmdline)"
verdict
