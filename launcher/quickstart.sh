#!/usr/bin/env bash
# From a bare Debian 12 machine to a trained model: packages, build, corpus, tokenizer, training, evaluation, a sample.
# Each part that is there already is left as it is, so that it may be run again: it goes on, or says that all is done.
#
#   ./launcher/quickstart.sh          as root or with sudo; without either, see README.md, "Building by hand, and without root"
#   GCIDE=FILE ./launcher/quickstart.sh    takes the dictionary's text (gzip) from FILE
set -eu -o pipefail
cd "$(dirname "$0")/.."
. launcher/packages.sh

part=start
say()  { part=$1; printf '\n== %s\n' "$1"; }
quit() { printf 'quickstart: %s\n' "$1" >&2; trap - EXIT; exit "${2:-1}"; }

# A part that fails has said why; this says which it was and what to do next.
ended() {
    local status=$?
    [ $status -eq 0 ] || printf 'quickstart: failed (status %d) in: %s\n' $status "$part" >&2
}
trap ended EXIT
trap 'quit "interrupted; run it again to go on from what is there" 130' INT

run=runs/quickstart
text=$run/text
packed=$run/packed
model=$run/tokenizer.model
gcide=${GCIDE:-/usr/share/dictd/gcide.dict.dz}
selectra=build/selectra

say "packages"
wanted=("${selectra_packages[@]}")
[ -e "$gcide" ] || wanted+=(dict-gcide)
need_packages "${wanted[@]}"
[ -e "$gcide" ] || quit "$gcide is missing (Debian package dict-gcide); GCIDE=FILE names a copy elsewhere"
for tool in cmake cc c++ mpirun; do
    command -v $tool >/dev/null || quit "$tool is missing"
done

say "build: $selectra"
generator=()
if [ ! -f build/CMakeCache.txt ] && command -v ninja >/dev/null; then generator=(-G Ninja); fi
cmake --preset release "${generator[@]}" -DSEL_TESTS=OFF >/dev/null
cmake --build --preset release --target selectra --parallel "$(nproc)" >/dev/null

# The dictionary is one text, an entry beginning at each line that is not indented.  An entry becomes a document of
# JSON lines, its wrapped lines joined; every 50th is held out, every 4th of the others trains the tokenizer.
# Left out: what stands before the first entry, marks of sources ([1913 Webster]) and of links ({...}).
make_text() {
    mkdir -p $text.part
    gzip -dc "$gcide" | { iconv -c -f UTF-8 -t UTF-8 || true; } |
        tr '\t' ' ' | tr -d '\000-\010\013-\037{}' |
        sed -E 's/\[[^][]*(Webster|WordNet|PJC)[^][]*\]//g; s/ +/ /g; s/ $//; s/\\/\\\\/g; s/"/\\"/g' |
        awk -v dir=$text.part '
            function end_entry(line) {
                if (!inside) return
                line = "{\"text\": \"" entry "\"}"
                if (++n % 50 == 0) print line > (dir "/validation.jsonl")
                else print line > (dir "/train.jsonl")
                if (n % 4 == 1) print line > (dir "/sample.jsonl")
            }
            /^[^ ]/ && (inside || /\\/) { end_entry(); inside = 1; entry = $0; gap = 0; next }
            /^ *$/ { gap = 1; next }
            { sub(/^ /, ""); entry = entry (gap || /^[0-9]+\. / ? "\\n" : " ") $0; gap = 0 }
            END { end_entry(); print n " entries"; exit n < 100 }'
    mv $text.part $text
}
say "text: $text"
rm -rf $text.part
[ -d $text ] || make_text

say "tokenizer: $model"
[ -f $model ] || $selectra tokenizer train --vocab 8192 --output $model $text/sample.jsonl

say "packed corpus: $packed"
for set in train validation; do
    [ -f $packed/$set/index.json ] ||
        $selectra data pack --tokenizer $model --output $packed/$set $text/$set.jsonl
done

# Two ranks, the cores shared between them; one rank where there is only one core.
cores=$(nproc)
ranks=$((cores > 1 ? 2 : 1))
threads=$((cores / ranks))
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_btl_vader_single_copy_mechanism=none    # containers forbid it, with a warning for each message

say "training: mpirun -n $ranks --bind-to none $selectra train configs/quickstart.yaml compute.threads=$threads"
status=0
mpirun -n $ranks --bind-to none $selectra train configs/quickstart.yaml compute.threads=$threads || status=$?
if [ $status -ne 0 ]; then
    quit "training ended with status $status; run this script again to go on from the last checkpoint in $run/run" $status
fi

say "evaluation: $selectra eval $run/run --data $packed/validation"
$selectra eval $run/run --data $packed/validation

say "samples: $selectra generate $run/run --prompt HEADWORD --tokens 100 --temperature 0.7 --seed 1"
for headword in 'Weaver \Weav"er\, n.' 'Seaward \Sea"ward\, a.' 'Brightly \Bright"ly\, adv.'; do
    printf -- '-- '
    $selectra generate $run/run --prompt "$headword" --tokens 100 --temperature 0.7 --seed 1
done

say "all done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
cat <<END
  program       $selectra (--help)
  text          $text
  tokenizer     $model
  corpus        $packed/train, $packed/validation
  run           $run/run: config.yaml, metrics.jsonl, provenance.json
  checkpoint    $run/run/checkpoints/latest
  settings      configs/quickstart.yaml
END
