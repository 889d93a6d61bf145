#!/usr/bin/env bash
# The arrows between the folders point one way, and foreign headers have one home each:
#   launcher -> core -> ops, dist -> core/base
# usage: layers.sh SOURCE_DIR [LIBRARY.a ...]   the libraries' exported names must begin with sel_
set -u
cd "$1" || exit 1
shift
bad=0

# breach FILES-GLOB PATTERN WHY
breach() {
    local hits
    # shellcheck disable=SC2086
    hits=$(grep -nE "$2" $1 /dev/null 2>/dev/null)
    [ -z "$hits" ] && return
    echo "$3:"
    echo "$hits" | sed 's/^/  /'
    bad=1
}

breach "core/base/*" '#include "(core/[^b]|ops/|dist/|launcher/)' "core/base includes another room"
breach "ops/*.c ops/*.h" '#include "(core/[^b]|dist/|launcher/)' "ops includes more than core/base"
breach "dist/*.c dist/*.h" '#include "(core/[^b]|ops/|launcher/)' "dist includes more than core/base"
breach "core/*/*" '#include "launcher/' "core includes launcher"
breach "core/config/* core/data/*" '#include "(ops/|dist/)' "config or data includes ops or dist"

elsewhere() {   # HEADER HOME-REGEX
    local hits
    hits=$(grep -rnE "#include <$1>" core ops dist launcher --include='*.c' --include='*.h' --include='*.cc' | grep -vE "^($2)")
    [ -z "$hits" ] && return
    echo "<$1> outside its home ($2):"
    echo "$hits" | sed 's/^/  /'
    bad=1
}
elsewhere 'mpi\.h' 'dist/[a-z]+\.c'
elsewhere 'dnnl\.h' 'ops/onednn_api\.h'
elsewhere 'cblas\.h' 'ops/linear_openblas\.c'
elsewhere 'immintrin\.h' 'ops/[a-z0-9_]+_(avx[0-9a-z]+\.[ch]|words\.h)'
elsewhere 'yaml\.h' 'core/config/yaml\.c'
elsewhere 'sentencepiece.*' 'core/data/spm\.cc'

# Printing and ending the process are the launcher's; comm.c and the watchdog may end the job, error.c may fail an assertion.
hits=$(grep -nE '(^|[^a-z_])(printf|puts|perror|exit|abort)\(|(stdout|stderr)' core/*/*.c ops/*.c dist/*.c | grep -vE '^(dist/comm\.c|dist/watchdog\.c|core/base/error\.c):')
if [ -n "$hits" ]; then
    echo "a library prints or ends the process:"
    echo "$hits" | sed 's/^/  /'
    bad=1
fi

for library; do
    names=$(nm -g --defined-only "$library" 2>/dev/null | awk 'NF == 3 && $2 ~ /[TDBRC]/ && $3 !~ /^(sel_|_Z|\.|__odr|__asan|__ubsan|__local)/ { print "  " $3 }')
    if [ -n "$names" ]; then
        echo "$library exports names without the prefix:"
        echo "$names"
        bad=1
    fi
done
exit $bad
