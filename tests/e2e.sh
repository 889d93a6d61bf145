# e2e.sh: what the end-to-end tests share.  A test sources it, runs in a temporary folder of its own, and ends with
# `verdict`.  SELECTRA is the program, SOURCE the checkout (CTest sets both).
set -u -o pipefail
SOURCE=$(cd "${SOURCE:-$(dirname "${BASH_SOURCE[0]}")/..}" && pwd)
SELECTRA=$(realpath "${SELECTRA:-$SOURCE/build/selectra}")
[ -x "$SELECTRA" ] || { echo "$SELECTRA: no such program" >&2; exit 1; }

TEMP=$(mktemp -d "${TMPDIR:-/tmp}/selectra-test.XXXXXX")
cd "$TEMP" || exit 1
job=
trap '[ -z "$job" ] || kill -9 "$job" 2>/dev/null; cd /; rm -rf "$TEMP"' EXIT
export OMP_WAIT_POLICY=passive   # cores may be shared with other tests
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

# all_or_some N WORD...: all the words, or with SEL_TEST_QUICK (run.sh sets it under the sanitizers) the first N.
all_or_some() {
    if [ "${SEL_TEST_QUICK:-}" ]; then printf '%s\n' "${@:2:$1}"; else printf '%s\n' "${@:2}"; fi
}

# ---- verdicts

checks=0 failures=0
pass() { checks=$((checks + 1)); }
fail() { checks=$((checks + 1)) failures=$((failures + 1)); echo "FAILED: $*"; }

# check WHAT COMMAND...: the command must succeed.
check() { if "${@:2}" >check.out 2>&1; then pass; else fail "$1"; tail -n 5 check.out; fi }

verdict() {
    echo "$checks checks, $failures failed"
    [ $checks -gt 0 ] && [ $failures -eq 0 ]
    exit
}

# ---- the program

# Under the address sanitizer run.sh asks for whole stacks, by which MPI's leaks are told from ours; they are slow, and
# not needed where there is no MPI.
selectra() {
    local asan=${ASAN_OPTIONS:-}
    case $1 in tokenizer|data) asan=$asan:fast_unwind_on_malloc=1 ;; esac
    ASAN_OPTIONS=$asan timeout -k 5 "${LIMIT:-120}" "$SELECTRA" "$@"
}

# ranks R ARGS...: the program under mpirun.
ranks() { timeout -k 5 "${LIMIT:-120}" "$SOURCE/tests/mpirun.sh" -n "$1" "$SELECTRA" "${@:2}"; }

# expect STATUS COMMAND...: its exit status must be that; stdout and stderr go to the files out and err.
expect() {
    local got=0
    "${@:2}" >out 2>err || got=$?
    if [ $got -eq "$1" ]; then pass; return 0; fi
    fail "status $got, expected $1: ${*:2}"
    tail -n 20 out err
    return 1
}

# said PATTERN [FILE]: stderr of the last `expect`, or the file, has a line like it (extended regular expression).
said() { if grep -qE -- "$1" "${2:-err}"; then pass; else fail "not said in ${2:-err}: $1"; tail -n 5 "${2:-err}"; fi }

# ---- a corpus that can be learnt: sentences of a small grammar, in which a noun brings its own adjectives and verbs

# sentences SEED DOCUMENTS: JSON lines, on stdout.
sentences() {
    awk -v x="$1" -v documents="$2" '
        function random(n) { x = (x * 16807) % 2147483647; return int(n * (x / 2147483647)) }
        function often_small(n) { return int(random(n) * (random(1000) / 1000) ^ 2) }
        function word(i, ending,    k, w) {
            k = (i * 263) % 6400
            while (w == "" || k > 0) {
                w = w substr("bdfghklmnprstvwz", k % 16 + 1, 1) substr("aeiou", int(k / 16) % 5 + 1, 1)
                k = int(k / 80)
            }
            return w ending
        }
        function thing(noun) {
            if (random(2)) return "the " word(noun, "n")
            return "the " word(200 + (noun * 3 + random(3)) % 80, "y") " " word(noun, "n")
        }
        BEGIN {
            for (d = 0; d < documents; d++) {
                text = ""
                for (s = 0; s < 6; s++) {
                    noun = often_small(150)
                    text = text thing(noun) " " word(300 + (noun * 2 + random(2)) % 60, "s") " " thing(often_small(150))
                    if (random(4) == 0) text = text " " word(370 + noun % 20, "ly")
                    text = text (random(5) ? ". " : ", and ")
                }
                print "{\"text\": \"" text "\"}"
            }
        }'
}

# prepare: train.jsonl, valid.jsonl, tokenizer.model (400 pieces) and the folders train and valid, packed.
prepare() {
    sentences 1 2500 >train.jsonl
    sentences 2 100 >valid.jsonl
    expect 0 selectra tokenizer train --vocab 400 --output tokenizer.model train.jsonl || verdict
    expect 0 selectra data pack --tokenizer tokenizer.model --output train train.jsonl || verdict
    expect 0 selectra data pack --tokenizer tokenizer.model --output valid valid.jsonl || verdict
}

# train RUN [key=value...]: makes the arguments of a training run on it, to be put after `selectra` or `ranks R`.
train() {
    arguments=(train "$SOURCE/configs/tiny.yaml" run.dir="$1" data.train=train data.validation=valid
               compute.threads=1 "${@:2}")
}

# ---- jobs in the background, to be hurt

# start R ARGS...: as `ranks`, in the background; its process is $job, its output goes to the files out and err.
start() {
    "$SOURCE/tests/mpirun.sh" -n "$1" "$SELECTRA" "${@:2}" >out 2>err &
    job=$!
}

# rank_pids: the processes of the job's ranks.
rank_pids() { grep -lsE "^PPid:[[:space:]]*$job\$" /proc/[0-9]*/status | cut -d/ -f3 | sort -n; }

# one_rank K: the K-th of them, from 0.
one_rank() { rank_pids | sed -n "$(($1 + 1))p"; }

# last_step RUN: of the metrics' last row; -1 before there is one.
last_step() {
    local step
    step=$(tail -n 1 "$1/metrics.jsonl" 2>/dev/null | sed -n 's/^{"step":\([0-9]*\),.*/\1/p')
    echo "${step:--1}"
}

# wait_step RUN STEP: until the metrics have the step; fails when the job ends first, or after a minute.
wait_step() {
    local tries
    for ((tries = 0; tries < 3000; tries++)); do
        [ "$(last_step "$1")" -ge "$2" ] && return 0
        kill -0 "$job" 2>/dev/null || return 1
        sleep 0.02
    done
    return 1
}

# ended STATUS [SECONDS]: the job ends by itself within so many seconds, with that status ("fail": any but 0).
ended() {
    local tries status=0 limit=${2:-60}
    for ((tries = 0; tries < limit * 20; tries++)); do
        kill -0 "$job" 2>/dev/null || break
        sleep 0.05
    done
    if kill -0 "$job" 2>/dev/null; then
        fail "the job still runs after $limit s"
        who_is_left
        kill -9 $(rank_pids) "$job"
        wait "$job" 2>/dev/null
        job=
        return 1
    fi
    wait "$job" 2>/dev/null || status=$?
    job= ended_with=$status
    if [ "$1" = fail ] && [ $status -ne 0 ] || [ "$1" = "$status" ]; then pass; return 0; fi
    fail "the job ended with status $status, expected $1"
    tail -n 20 out err
    return 1
}

# who_is_left: of a job that should be over: its processes, what each waits for, and its stacks where gdb is there.
who_is_left() {
    local pid
    tail -n 20 out err
    for pid in "$job" $(rank_pids); do
        echo "process $pid: $(tr '\0' ' ' <"/proc/$pid/cmdline" | cut -c1-100), $(grep State "/proc/$pid/status")," \
            "in $(cat "/proc/$pid/wchan" 2>/dev/null)"
        ! command -v gdb >/dev/null || timeout 20 gdb -p "$pid" -batch -ex 'thread apply all bt' 2>/dev/null | grep '^[#T]'
    done
}

# seconds_since T: T as bash's EPOCHREALTIME has it.
seconds_since() { awk -v a="$1" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }'; }

# ---- comparing runs

# state RUN STEP: the folder of a checkpoint.
state() { printf '%s/checkpoints/step-%08d' "$1" "$2"; }

# same_state RUN RUN STEP: weights and moments are equal to the bit.
same_state() {
    local file
    for file in model.safetensors optimizer.safetensors; do
        check "$1 and $2 have the same $file at step $3" cmp "$(state "$1" "$3")/$file" "$(state "$2" "$3")/$file"
    done
}

# untimed RUN: its metrics without what depends on the clock.
untimed() { sed -E 's/,"(tokens_per_second|mfu|seconds|wire_wait_seconds|wire_hidden)":[^,}]*//g' "$1/metrics.jsonl"; }

# same_metrics RUN RUN
same_metrics() {
    untimed "$1" >metrics.1
    untimed "$2" >metrics.2
    if cmp -s metrics.1 metrics.2; then pass; else fail "metrics of $1 and $2 differ"; diff metrics.1 metrics.2 | head -5; fi
}

# losses RUN: "step loss" lines.
losses() { sed -nE 's/^\{"step":([0-9]+),"loss":([^,]+),.*/\1 \2/p' "$1/metrics.jsonl"; }
