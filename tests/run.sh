#!/usr/bin/env bash
# All tests, on a bare Debian 12 as well: installs what they need, builds with gcc, with clang and with MPICH (warnings
# are errors), runs everything, then everything that makes sense there under the address and undefined-behaviour
# sanitizers, with fewer repetitions (SEL_TEST_QUICK).  The last line is the count; exit status 0
# means that all passed.
#
#   ./tests/run.sh [--fast | --whole]      --fast: one build, no sanitizers
#                                          --whole: with the sanitizers every test that is meant for them, 15 minutes more
set -u -o pipefail
cd "$(dirname "$0")/.."
. launcher/packages.sh

passed=0 failed=0 skipped=0
finish() {
    local skips=
    [ $skipped -eq 0 ] || skips=", $skipped skipped"
    printf '\n%d passed, %d failed%s\n' $passed $failed "$skips"
    [ $failed -eq 0 ] && [ $passed -gt 0 ]
    exit
}
say() { printf '\n== %s (at %d min %02d s)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

# build NAME FOLDER OPTIONS...: counts as a test of its own.
build() {
    local log=$2/build.log
    say "build: $1"
    mkdir -p "$2"
    if cmake -S . -B "$2" "${@:3}" >"$log" 2>&1 && cmake --build "$2" --parallel "$(nproc)" >>"$log" 2>&1; then
        passed=$((passed + 1))
        return 0
    fi
    failed=$((failed + 1))
    tail -n 40 "$log"
    echo "build failed: $1 ($log)"
    return 1
}

# run_tests NAME FOLDER OPTIONS-OF-CTEST...: runs them and adds to the counts.
run_tests() {
    say "tests: $1"
    local report=$2/tests.xml status=0 counts
    rm -f "$report"
    ctest --test-dir "$2" --output-on-failure --no-tests=error --output-junit "$PWD/$report" "${@:3}" || status=$?
    counts=$(awk '/<testcase / { if (/status="run"/) run++; else if (/status="fail"/) fail++; else other = 1; next }
                  /<skipped / && other { if (/SKIP_RETURN_CODE/) skip++; else fail++; other = 0 }
                  END { print run + 0, fail + 0, skip + 0 }' "$report" 2>/dev/null || echo 0 0 0)
    read -r run fail skip <<<"$counts"
    [ $status -eq 0 ] || [ "$fail" -gt 0 ] || fail=1    # CTest itself failed
    passed=$((passed + run)) failed=$((failed + fail)) skipped=$((skipped + skip))
}

fast='' whole=''
case ${1:-} in
--fast) fast=1 ;;
--whole) whole=1 ;;
?*) echo "usage: ./tests/run.sh [--fast | --whole]" >&2; exit 2 ;;
esac

say "packages"
wanted=("${selectra_packages[@]}")
[ "$fast" ] || wanted+=(clang libomp-dev mpich libmpich-dev)
if ! need_packages "${wanted[@]}"; then
    failed=$((failed + 1))
    finish
fi
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi

build "gcc, Release" build-test "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DSEL_WERROR=ON &&
    run_tests "all, Release" build-test --parallel "$(nproc)"
[ -z "$fast" ] || finish

build "clang, Release" build-test-clang "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DSEL_WERROR=ON \
    -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++

# Another MPI, beside Open MPI, which stays Debian's default.
if mpich=$(command -v mpicc.mpich); then
    build "gcc, MPICH" build-test-mpich "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DSEL_WERROR=ON \
        -DMPI_C_COMPILER="$mpich" &&
        MPIRUN=mpiexec.mpich run_tests "ranks, MPICH" build-test-mpich \
            -R '^mpi_(comm|host)|^mpi_(reduce|sequence)[.](np[24]|hosts2[+]2)$|^e2e_ranks$'
fi

# MPI's leaks are known by its name in their stacks, for which stacks must be whole: slow, so only where there is MPI.
export ASAN_OPTIONS=detect_leaks=1:exitcode=99 UBSAN_OPTIONS=print_stacktrace=1:exitcode=99
export LSAN_OPTIONS=suppressions=$PWD/tests/lsan.supp:print_suppressions=0
export SEL_TEST_QUICK=1   # every test, but thinner grids and fewer repetitions: all is ten times slower
if build "gcc, sanitizers" build-test-asan "${generator[@]}" -DCMAKE_BUILD_TYPE=Asan -DSEL_WERROR=ON; then
    # Not layers, which looks at symbols and runs nothing, nor ops_memory: it measures memory, and would measure theirs.
    run_tests "sanitizers, one process" build-test-asan --parallel "$(nproc)" -LE 'e2e|mpi' -E '^layers$|^ops_memory$'
    ASAN_OPTIONS=$ASAN_OPTIONS:fast_unwind_on_malloc=0
    # Left out but with --whole, for the time they take: other numbers of ranks, tests that wait for seconds to pass.
    later_ranks='^mpi_(reduce|sequence)[.](np[13]|hosts1)|^mpi_shared_model$'
    later_programs='^e2e_(watchdog|faults_sequence|launch|hosts|links|mesh|mesh_hosts|many|sequence|dead_keys)$'
    [ -z "$whole" ] || later_ranks='^$' later_programs='^$'
    run_tests "sanitizers, ranks" build-test-asan -L mpi -E "$later_ranks"
    run_tests "sanitizers, the program" build-test-asan -L e2e -E "$later_programs"
fi
finish
