#!/usr/bin/env bash
# The mistakes of a new user's first ten minutes: each is answered by one line that names the thing, from one rank, with
# the right status, and leaves no run folder behind.
. "$(dirname "$0")/e2e.sh"
export OMPI_MCA_odls_base_sigkill_timeout=0   # mpirun would wait a second after each rank that fails
prepare

# one_message PATTERN: of the last `expect`.  mpirun's own banners, between lines of dashes, do not count.
one_message() {
    awk '/^-----/ { banner = !banner; next } !banner && NF' err >messages
    if [ "$(wc -l <messages)" -ne 1 ]; then
        fail "expected one line on stderr that matches: $1"
        head -5 messages
    elif grep -qE -- "$1" messages; then
        pass
    else
        fail "expected: $1"
        cat messages
    fi
    check "nothing on stdout" test ! -s out
}

# mistake STATUS PATTERN ARGS...: alone, and where ranks are possible under mpirun (with SEL_TEST_QUICK each fourth).
mistakes=0
mistake() {
    mistakes=$((mistakes + 1))
    expect "$1" selectra "${@:3}"
    one_message "$2"
    case $3:${SEL_TEST_QUICK:+$((mistakes % 4))} in train:|eval:|train:0|eval:0)
        expect "$1" ranks 2 "${@:3}"
        one_message "$2" ;;
    esac
    if [ -e new ]; then
        fail "a run folder was left behind: ${*:3}"
        rm -rf new
    else
        pass
    fi
}

# wrong STATUS PATTERN KEY=VALUE...: a training run with these settings.
wrong() {
    train new "${@:3}"
    mistake "$1" "$2" "${arguments[@]}"
}

# wrong_yaml PATTERN: a training run with the configuration on stdin; file and line must be said.
wrong_yaml() {
    cat >wrong.yaml
    mistake 2 "wrong.yaml:$1" train wrong.yaml run.dir=new data.train=train
}

# --- the command line
mistake 2 'trian.*train'                      trian
mistake 2 'CONFIG'                            train
mistake 2 'nowhere.yaml'                      train nowhere.yaml
mkdir folder
mistake 2 'folder'                            train folder
wrong   2 'train.stepz.*train.steps'          train.stepz=10
wrong   2 'key=value|key.path=value|='        train.steps
wrong   2 'train.steps'                       train.steps=
mistake 2 '--promt.*--prompt'                 generate somewhere --promt hello
mistake 2 'prompt'                            generate somewhere
mistake 2 'CKPT|checkpoint'                   eval
mistake 2 'somewhere'                         eval somewhere --data valid
mistake 2 'somewhere'                         inspect somewhere
mistake 2 'pakc.*pack'                        data pakc
mistake 2 'tokenizer'                         data pack --output packed train.jsonl
mistake 2 'output'                            data pack --tokenizer tokenizer.model train.jsonl
mistake 2 'step'                              data batch "$SOURCE/configs/tiny.yaml" data.train=train

# --- the configuration file
wrong_yaml '2:.*train.step.*train.steps' <<'END'
train:
  step: 10
END
wrong_yaml '1:.*trian.*train' <<'END'
trian:
  steps: 10
END
wrong_yaml '2:.*train.steps.*(integer|number)' <<'END'
train:
  steps: many
END
wrong_yaml '2:.*train.steps' <<'END'
train:
  steps: 1.5
END
printf 'train:\n\tsteps: 10\n' | wrong_yaml '2:.*tab'
wrong_yaml '[23]:' <<'END'
train:
  steps: "10
END
wrong_yaml '2:.*data.validation' <<'END'
data:
  validation: [a, b]
END
wrong_yaml '3:.*train.steps' <<'END'
train:
  steps: 10
  steps: 20
END
mistake 2 '/bin/ls' train /bin/ls

# --- sizes that cannot be
wrong 2 'model.context'                            model.context=0
wrong 2 'model.heads.*4.*3|kv_heads.*3.*4|heads 4' model.kv_heads=3
wrong 2 'train.batch.*-1|train.batch'              train.batch=-1
wrong 2 'train.micro_batch.*5'                     train.micro_batch=5
wrong 2 'train.lr'                                 train.lr=fast
wrong 2 'train.beta2'                              train.beta2=1.5
wrong 2 'attention.kind.*selectve'                 attention.kind=selectve
wrong 2 'dist.mesh.sequence.*groups of 3'          dist.mesh.sequence=3
wrong 2 'dist.mesh.data.*7|mesh.*7'                dist.mesh.data=7
wrong 2 'model.vocab: 399 .*400 pieces'            model.vocab=399
wrong 2 'too few'                                  train.batch=50000
train new train.batch=13
expect 2 ranks 2 "${arguments[@]}"
one_message 'train.batch.*13.*2'
check "no run folder" test ! -e new

# --- threads: what OpenMP would not give is refused, since work is dealt to the number that was asked for
wrong 2 'compute.threads.*4096'                    compute.threads=4097
wrong 2 'compute.threads'                          compute.threads=99999999999999999999
OMP_THREAD_LIMIT=1 wrong 2 'OpenMP gives 1 of 2 threads.*OMP_THREAD_LIMIT=1' compute.threads=2

# --- ranks that are not given the same
# apart PATTERN KEY=VALUE KEY=VALUE: two ranks in folders of their own, the first with the one setting, the second with
# the other.
apart() {
    train new data.validation=
    expect 2 timeout -k 5 120 "$SOURCE/tests/mpirun.sh" -n 1 -wdir "$TEMP/first" "$SELECTRA" "${arguments[@]}" "$2" : \
        -n 1 -wdir "$TEMP/second" "$SELECTRA" "${arguments[@]}" "$3"
    one_message "$1"
    check "no run folder" test ! -e first/new -a ! -e second/new
}
mkdir first second
cp -r train first/train
cp -r train second/train
cp -r valid second/valid
sentences 5 100 >others.jsonl
expect 0 selectra data pack --tokenizer tokenizer.model --output first/valid others.jsonl
apart 'data.validation: the ranks read different data'      data.validation=valid data.validation=valid
apart 'different settings: train.lr: 0.001 -> 0.002'        train.lr=0.001 train.lr=0.002
apart 'different settings: train.steps: 60 -> 61'           train.steps=60 train.steps=61
rm -r first/train
expect 0 selectra data pack --tokenizer tokenizer.model --output first/train train.jsonl others.jsonl
apart 'data.train: the ranks read different data'           train.steps=60 train.steps=60

# --- the processor
SELECTRA_CPU=foo wrong 2 'SELECTRA_CPU.*foo|foo'
wrong 2 'compute.cpu.*foo'                         compute.cpu=foo

# --- data
wrong 2 'nowhere'                                  data.train=nowhere
wrong 2 'folder'                                   data.train=folder
wrong 2 'train.jsonl'                              data.train=train.jsonl
wrong 2 'data.train'                               data.train=
wrong 2 'nowhere'                                  data.validation=nowhere
wrong 2 'nowhere.model'                            data.tokenizer=nowhere.model
expect 0 selectra tokenizer train --vocab 380 --output other.model train.jsonl
expect 0 selectra data pack --tokenizer other.model --output other train.jsonl
wrong 2 'other.model'                              data.tokenizer=other.model
wrong 2 'other.*tokenizer'                         data.validation=other
cp -r train damaged
truncate -s -2 damaged/shard-00000.bin
wrong 1 'damaged/shard-00000.bin'                  data.train=damaged
cp -r train spoilt   # every id is 65535: found when a step reads it
tr '\000-\377' '\377' <train/shard-00000.bin >spoilt/shard-00000.bin
train spoilt.run data.train=spoilt
expect 1 ranks 2 "${arguments[@]}"
said 'step 1: spoilt/shard-00000.bin: token [0-9]+ is 65535, the vocabulary has 400'
mistake 1 'spoilt/shard-00000.bin: token [0-9]+ is 65535' data batch "${arguments[@]:1}" --step 3

mistake 2 'nowhere.txt'           data pack --tokenizer tokenizer.model --output packed nowhere.txt
mistake 2 'nowhere.model'         data pack --tokenizer nowhere.model --output packed train.jsonl
mistake 1 'train.jsonl'           data pack --tokenizer train.jsonl --output packed train.jsonl
mistake 2 'train'                 data pack --tokenizer tokenizer.model --output train train.jsonl
: >empty.txt
mistake 2 'empty|no document|no text' data pack --tokenizer tokenizer.model --output packed empty.txt
head -c 100000 "$SELECTRA" >ls.txt
mistake 1 'ls.txt.*UTF-8'         data pack --tokenizer tokenizer.model --output packed ls.txt
mistake 1 'train.jsonl:1.*body'   data pack --tokenizer tokenizer.model --output packed --field body train.jsonl
gzip -c train.jsonl | head -c 5000 >cut.jsonl.gz
mistake 1 'cut.jsonl.gz'          data pack --tokenizer tokenizer.model --output packed cut.jsonl.gz
printf '{"text": "fine"}\n{"text": \n' >bad.jsonl
mistake 1 'bad.jsonl:2'           data pack --tokenizer tokenizer.model --output packed bad.jsonl
printf 'two words' >short.txt
mistake 2 '20000'                 tokenizer train --vocab 20000 --output big.model short.txt
check "no model was left behind" test ! -e big.model
mistake 2 'vocab'                 tokenizer train --vocab 0 --output big.model train.jsonl
mistake 2 'folder'                data info folder
mistake 2 'nowhere'               tokenizer encode --model nowhere.model train.jsonl
check "no packed corpus was left behind" test ! -e packed/index.json

# --- the run folder
touch file
train file
mistake 2 'file'                  "${arguments[@]}"
train file/below
mistake 2 'file'                  "${arguments[@]}"
mkdir locked
chmod 500 locked
chmod 755 .
cp "$SELECTRA" program
cp "$SOURCE/configs/tiny.yaml" "$SOURCE/tests/lsan.supp" .   # the checkout may be out of another user's reach
train locked/run
arguments[1]=tiny.yaml
if [ "$(id -u)" -eq 0 ]; then   # root may write anywhere
    expect 2 env LSAN_OPTIONS="suppressions=$TEMP/lsan.supp:print_suppressions=0" \
        setpriv --reuid 65534 --regid 65534 --clear-groups ./program "${arguments[@]}"
else
    expect 2 ./program "${arguments[@]}"
fi
one_message 'locked.*Permission denied'

# --- a run that is there already
train done train.steps=4
expect 0 selectra "${arguments[@]}"
expect 0 selectra "${arguments[@]}"
check "a run that is complete says so" grep -qiE 'complete|done' out
train done train.steps=2
mistake 2 'done.*4.*train.steps 2'                 "${arguments[@]}"
train done train.steps=8 model.width=128
mistake 2 'model.width.*64.*128'                   "${arguments[@]}"
train done train.steps=8 attention.kind=standard
mistake 2 'attention.kind.*selective.*standard'    "${arguments[@]}"
train done train.steps=8 data.train=valid
mistake 2 'corpus'                                 "${arguments[@]}"
train done train.steps=8 data.train=other data.validation=
mistake 2 'corpus|tokenizer|vocab'                 "${arguments[@]}"
check "the run was left alone" test "$(last_step done)" -eq 4

# --- a run that another job is training: refused before anything of it is read, so that the other's model is no matter
picture() { find busy -type f -exec cksum {} + | sort; find busy -type l -printf '%p %l\n'; }
train busy train.steps=40
SELECTRA_FAULT=0:forward:30:stop start 1 "${arguments[@]}"
if wait_step busy 29; then pass; else fail "the run to be met did not reach step 29"; fi
first=$(one_rank 0)
for ((tries = 0; tries < 500; tries++)); do
    grep -q '^State:.*stopped' "/proc/$first/status" && break
    sleep 0.02
done
picture >before
mistake 2 'busy: another job is using this run folder: process [0-9]+' "${arguments[@]}"
train busy train.steps=40 model.width=128
mistake 2 'busy: another job is using this run folder: process [0-9]+' "${arguments[@]}"
picture >after
check "the run that is being trained was left alone" cmp before after
kill -CONT "$first"
ended 0
check "it went on to its end" test "$(last_step busy)" -eq 40

# --- using a model
mistake 2 'other.*tokenizer'      eval done --data other
mistake 2 'folder'                eval folder --data valid
mistake 2 'nowhere.txt'           eval done --text nowhere.txt
mistake 2 'empty.txt'             eval done --text empty.txt
mistake 2 '--data.*--text'        eval done --data valid --text short.txt
train blind data.validation= train.steps=2
expect 0 selectra "${arguments[@]}"
mistake 2 '--data|--text'         eval blind
mistake 1 'spoilt/shard-00000.bin: token 0 is 65535' eval done --data spoilt
mistake 2 'tokens'                generate done --prompt x --tokens many
mistake 2 'tokens.*99999999999999999999' generate done --prompt x --tokens 99999999999999999999
expect 0 selectra generate done --prompt "" --tokens 9223372036854775807 --greedy --json
check "no more tokens than the context has" grep -qE '"tokens": ?([0-9]|[1-5][0-9]|6[0-4]),.*"stop": ?"(context|eos)"' out
for threads in 4097 4294967298 9223372036854775807; do   # the second is 2, if cut to 32 bits
    mistake 2 "$threads threads: expected 1 to 4096"     eval done --data valid --threads $threads
    mistake 2 "$threads threads: expected 1 to 4096"     generate done --prompt x --threads $threads
    mistake 2 "$threads threads: expected 1 to 4096"     bench ops --threads $threads
done
mistake 2 'threads.*99999999999999999999'                eval done --data valid --threads 99999999999999999999
OMP_THREAD_LIMIT=1 mistake 2 'OpenMP gives 1 of 2 threads' eval done --data valid --threads 2
OMP_THREAD_LIMIT=1 mistake 2 'OpenMP gives 1 of 2 threads' generate done --prompt x --threads 2
OMP_THREAD_LIMIT=1 mistake 2 'OpenMP gives 1 of 2 threads' bench ops --threads 2
mistake 2 'top-p'                 generate done --prompt x --top-p 1.5
mistake 2 'context|64'            generate done --prompt "$(sentences 3 3 | tr -d '{}"')"
mistake 2 'UTF-8'                 generate done --json --prompt "$(printf '\377')"
verdict
