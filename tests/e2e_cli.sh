#!/usr/bin/env bash
# What a trained model is used by: eval, generate, inspect, data, tokenizer: their forms, and that their numbers agree.
. "$(dirname "$0")/e2e.sh"
prepare

# list KEY FILE: the elements of "KEY": [...] of every line, one a line.
list() { sed -E "s/.*\"$1\": ?\[([^]]*)\].*/\1/; s/, ?/\n/g" "$2"; }

# number KEY FILE: the number of "KEY": ...
number() { tr -d '\n' <"$2" | sed -E "s/.*\"$1\": ?([-+.0-9eE]+).*/\1/"; }

# near A B TOLERANCE
near() { awk -v a="$1" -v b="$2" -v t="$3" 'BEGIN { d = a - b; if (d < 0) d = -d; print a, b; exit !(d <= t) }'; }

# --- help everywhere, and the version
for command in '' train eval generate inspect tokenizer 'tokenizer train' 'tokenizer encode' 'tokenizer decode' \
               data 'data pack' 'data info' 'data batch' version; do
    # shellcheck disable=SC2086
    expect 0 selectra $command --help
    check "selectra $command --help tells its usage" grep -q '^usage: selectra' out
done
expect 0 selectra train --help
check "train --help lists the keys" grep -q 'attention.selection.shift' out
expect 0 selectra version
check "the version names the libraries" grep -qi 'onednn' out

# --- a model: context 256, so that 200 tokens fit after a prompt
train run model.context=256 train.batch=4 train.steps=40 train.log_every=10
expect 0 selectra "${arguments[@]}"

# --- tokenizer: decode(encode(x)) = x for any text
printf '%s\n' 'the bafon lidus the goken.' '  two  spaces, a trailing one ' 'Grüße, Ωmega, 漢字, 🙂' '' '	tab' '<s> </s> <unk> ▁' >text
expect 0 selectra tokenizer encode --model tokenizer.model text
cp out ids
expect 0 selectra tokenizer decode --model tokenizer.model ids
check "decode(encode(text)) is the text" cmp out text
expect 0 selectra tokenizer decode --model tokenizer.model <ids
check "the same from standard input" cmp out text

# --- where the time goes; who makes the products

train timed model.context=64 train.batch=4 train.steps=4 compute.linear_backend=auto
expect 0 selectra "${arguments[@]}" --profile
check "train --profile shows the parts" grep -qE '^  gate_up +backward_weight .*% of peak' out
grep '"event":"profile"' timed/metrics.jsonl >event
check "its parts are an event of the metrics" grep -q '"steps":4,"parts":\[{"name":"data"' event
for part in qkv o_proj gate_up down_proj lm_head; do
    flops=$(grep -oE "\"name\":\"$part\",\"pass\":\"[a-z_]+\",\"seconds\":[^,]+,\"flops\":[0-9.e+]+" event |
            sed 's/.*://' | sort | uniq -c | tr -s ' ')
    check "the three products of $part do the same work: $flops" grep -qE '^ 3 [1-9]' <(printf '%s\n' "$flops")
done
choice=$(grep linear_choice: timed/config.yaml)
check "what auto measured is kept: $choice" grep -qE 'qkv=[mb]{2}[mib],.*lm_head=[mb]{2}[mib]' timed/config.yaml
expect 0 selectra "${arguments[@]}" train.steps=8
check "and stays when the run goes on" test "$(grep linear_choice: timed/config.yaml)" = "$choice"
train other model.context=64 train.batch=4 train.steps=4 compute.linear_backend=auto compute.linear_choice=qkv=mix
expect 2 selectra "${arguments[@]}"
check "a wrong choice is the user's mistake" grep -q 'compute.linear_choice: ' err
check "and leaves no run folder" test ! -e other

# --- the packed corpus, and what a step trains on
expect 0 selectra data info valid --json
tokens=$(number tokens out)
check "the shards hold the tokens" test "$(stat -c %s valid/shard-*.bin | awk '{ n += $1 } END { print n / 2 }')" -eq "$tokens"
check "the bytes of text are the input's" \
    test "$(number bytes out)" -eq "$(sed -E 's/^\{"text": "(.*)"\}$/\1/' valid.jsonl | tr -d '\n' | wc -c)"
check "documents" test "$(number documents out)" -eq 100
expect 0 selectra data info valid --verify

train run model.context=256 train.batch=4
expect 0 selectra data batch "${arguments[@]:1}" --step 3 --json
check "the step is told" test "$(number step out)" -eq 3
sed -E 's/.*"windows": ?\[([0-9, ]*)\].*/\1/; s/, ?/\n/g' out >windows
sed -E 's/.*"tokens": ?\[\[(.*)\]\].*/\1/; s/\], ?\[/\n/g' out >samples
check "a batch is 4 windows" test "$(wc -l <windows)" -eq 4 -a "$(wc -l <samples)" -eq 4
paste -d' ' windows samples | tr ',' ' ' | while read -r window bos ids; do
    od -An -v -tu2 -w2 -j $((window * 512)) -N 512 train/shard-00000.bin | tr -d ' ' >expected
    tr -s ' ' '\n' <<<"$ids" >got
    [ "$bos" -eq 1 ] && cmp expected got || touch differs
done
check "the windows are the stream's, after BOS" test ! -e differs

# --- inspect
expect 0 selectra inspect run --json
check "2 layers have 22 tensors, 26 in all" test "$(grep -c '"name"' out)" -eq 26
for name in tok_embed.weight pos_embed.weight final_norm.weight lm_head.weight layers.1.attn.q_norm.weight \
            layers.0.attn.k_proj.weight layers.1.ffn.down_proj.weight; do
    check "inspect lists $name" grep -q "\"$name\"" out
done
check "the step" test "$(number step out)" -eq 40
expect 0 selectra inspect run
check "as a table too" grep -q 'layers.0.attn.v_proj.weight' out

# --- eval: a run folder, a step folder; its numbers follow from its log-probabilities
expect 0 selectra eval run --data valid --json --logprobs scores.jsonl
cp out eval.json
loss=$(number loss eval.json)
check "every token was scored" test "$(number tokens eval.json)" -eq "$tokens"
check "so says the file of scores" test "$(list logprobs scores.jsonl | wc -l)" -eq "$tokens"
check "the loss is their mean" near "$loss" "$(list logprobs scores.jsonl | awk '{ s -= $1 } END { printf "%.9g", s / NR }')" 1e-6
check "perplexity is exp(loss)" near "$(number perplexity eval.json)" "$(awk -v l="$loss" 'BEGIN { printf "%.9g", exp(l) }')" 1e-3
bytes=$(number bytes eval.json)
check "bits a byte" near "$(number bits_per_byte eval.json)" \
    "$(awk -v l="$loss" -v n="$tokens" -v b="$bytes" 'BEGIN { printf "%.9g", l * n / log(2) / b }')" 1e-6
accuracy=$(number accuracy eval.json)
check "accuracy is between chance and certainty" awk -v a="$accuracy" 'BEGIN { exit !(a > 0.01 && a < 1) }'
list target_ids scores.jsonl >targets
check "the targets are the corpus" cmp <(od -An -v -tu2 -w2 valid/shard-00000.bin | tr -d ' ') targets
check "each window begins with BOS" test "$(grep -cE '"input_ids": ?\[1,' scores.jsonl)" -eq "$(wc -l <scores.jsonl)"
check "the windows are in order" awk -F'[:,]' '$2 + 0 != NR - 1 { exit 1 }' scores.jsonl
validated=$(sed -nE 's/.*"val_loss":([^,]+),.*/\1/p' run/metrics.jsonl | tail -1)
check "the training run saw nearly this loss on its first 8,192 tokens" near "$loss" "$validated" 0.2
expect 0 selectra eval "$(state run 40)" --json
check "data.validation of the run is the default" cmp out eval.json
expect 0 ranks 2 eval run --data valid --json
check "two ranks find the same loss" near "$loss" "$(number loss out)" 1e-6
expect 0 selectra eval run --data valid
check "and a line for people" grep -q 'perplexity' out

sed -nE '1,5s/^\{"text": "(.*)"\}$/\1/p' valid.jsonl | tr -d '\n' >document.txt
expect 0 selectra eval run --text document.txt --json --logprobs text.jsonl
check "a text's bytes" test "$(number bytes out)" -eq "$(wc -c <document.txt)"
check "its last target is EOS" test "$(list target_ids text.jsonl | tail -1)" -eq 2
check "the text is what was scored" test "$(list target_ids text.jsonl | sed '$d' | tr '\n' ' ' |
    "$SELECTRA" tokenizer decode --model tokenizer.model)" = "$(cat document.txt)"
check "its loss is the mean" near "$(number loss out)" "$(list logprobs text.jsonl | awk '{ s -= $1 } END { printf "%.9g", s / NR }')" 1e-6

# --- generate: 200 tokens; the cache changes nothing but the time
prompt="the bafon "
say=(generate run --prompt "$prompt" --tokens 200)
expect 0 selectra "${say[@]}" --greedy --json --logprobs cached.jsonl
cp out greedy.json
expect 0 selectra "${say[@]}" --greedy --json
check "greedy is the same every time" test "$(list ids out | cksum)" = "$(list ids greedy.json | cksum)"
expect 0 selectra "${say[@]}" --temperature 0 --json
check "greedy is temperature 0" test "$(list ids out | cksum)" = "$(list ids greedy.json | cksum)"

# agree FILE FILE LEAST: log-probabilities of the same ids, LEAST or more of them, within 1e-4
agree() {
    list target_ids "$1" >ids.1
    list target_ids "$2" >ids.2
    cmp ids.1 ids.2 || return 1
    paste -d' ' <(list logprobs "$1") <(list logprobs "$2") |
        awk -v least="$3" '{ d = $1 - $2; if (!(d * d <= 1e-8)) { print NR, $0; bad = 1 } } END { exit bad || NR < least }'
}
for ((seed = 7; seed < 27; seed++)); do   # one that is not ended early by an EOS
    sampled=("${say[@]}" --temperature 1 --top-p 1 --seed $seed)
    expect 0 selectra "${sampled[@]}" --json --logprobs cached.jsonl || break
    [ "$(number tokens out)" -eq 200 ] && break
done
check "200 tokens were sampled" grep -qE '"tokens": ?200,' out
cp out sampled.json
expect 0 selectra "${sampled[@]}" --json --logprobs plain.jsonl --no-cache
check "with and without the cache: the same 200 tokens, log-probabilities within 1e-4" agree cached.jsonl plain.jsonl 200
expect 0 selectra "${sampled[@]}" --json
check "a seed is a text" test "$(list ids out | cksum)" = "$(list ids sampled.json | cksum)"
expect 0 selectra "${say[@]}" --temperature 1 --top-p 1 --seed 1234 --json
check "another seed is another text" test "$(list ids out | cksum)" != "$(list ids sampled.json | cksum)"
expect 0 selectra "${say[@]}" --temperature 1 --top-k 1 --json
check "top-k 1 is greedy" test "$(list ids out | cksum)" = "$(list ids greedy.json | cksum)"
expect 0 selectra "${say[@]}" --temperature 1 --top-p 1e-9 --json
check "a tiny top-p is greedy" test "$(list ids out | cksum)" = "$(list ids greedy.json | cksum)"

# The text read back by eval gets the log-probabilities it was made with, where it tokenizes as it was made.
expect 0 selectra "${say[@]}" --greedy
head -c -1 out >generated.txt
check "the prompt comes first" test "$(head -c ${#prompt} generated.txt)" = "$prompt"
expect 0 selectra "${say[@]}" --greedy --json --logprobs cached.jsonl
expect 0 selectra eval run --text generated.txt --logprobs read.jsonl
list target_ids cached.jsonl >made
n=$(wc -l <made)
list target_ids read.jsonl | sed '$d' | tail -n "$n" >read
if cmp -s made read; then
    paste -d' ' <(list logprobs cached.jsonl) <(list logprobs read.jsonl | sed '$d' | tail -n "$n") >both
    check "eval of the generated text agrees within 1e-4" awk '{ d = $1 - $2; if (!(d * d <= 1e-8)) exit 1 }' both
fi

# --- JSON stays JSON, the program's own `data pack` reads it: text cut within a character (at this temperature most tokens
# are single bytes), and a loss whose exponential is no number.
expect 0 selectra "${say[@]}" --temperature 1000 --top-p 1 --seed 5 --json
cp out bytes.jsonl
check "the text is UTF-8" iconv -f UTF-8 -t UTF-8 bytes.jsonl
check "it has bytes that make no character" grep -q "$(printf '\357\277\275')" bytes.jsonl
expect 0 selectra data pack --tokenizer tokenizer.model --output bytes bytes.jsonl
expect 0 selectra "${say[@]}" --temperature 1000 --top-p 1 --seed 5
check "so is the text for people" iconv -f UTF-8 -t UTF-8 out

train wild train.lr=1000 train.warmup=0 train.batch=4
SELECTRA_FAULT=0:forward:1:term expect 85 selectra "${arguments[@]}"
expect 0 selectra eval wild --data valid --json
check "the loss is a number, its exponential is null" grep -qE '"loss": ?[0-9]+(\.[0-9]+)?,.*"perplexity": ?null' out
check "nothing is infinite or no number" awk '/inf|nan/ { exit 1 }' out
sed 's/^{/{"text": "a", /' out >wild.jsonl
expect 0 selectra data pack --tokenizer tokenizer.model --output wild.packed wild.jsonl

# --- what was printed must have arrived
# full COMMAND...: with a full disk behind its output it fails, and says so.
full() {
    local got=0
    selectra "$@" >/dev/full 2>err || got=$?
    if [ $got -eq 1 ]; then pass; else fail "status $got with a full disk: $*"; fi
    said 'standard output.*No space left'
}
for form in --help --version version 'train --help' 'eval --help' 'tokenizer --help' \
            'tokenizer encode --model tokenizer.model text' 'tokenizer decode --model tokenizer.model ids' \
            'data info valid' 'data info valid --json' 'inspect run' 'inspect run --json' \
            'eval run --data valid' 'eval run --data valid --json' \
            'generate run --prompt x --tokens 5' 'generate run --prompt x --tokens 5 --json' \
            'bench gemm --runs 1 --threads 1' 'bench gemm --runs 1 --threads 1 --json'; do
    # shellcheck disable=SC2086
    full $form
done
train run model.context=256 train.batch=4
full data batch "${arguments[@]:1}" --step 3
full data batch "${arguments[@]:1}" --step 3 --json
train unseen train.batch=4 train.steps=2
full "${arguments[@]}"
check "a run that nobody sees is saved all the same" test -f "$(state unseen 2)/manifest.json"
expect 1 selectra eval run --data valid --logprobs /dev/full
said '/dev/full: writing failed'
expect 1 selectra generate run --prompt x --tokens 5 --logprobs /dev/full
said '/dev/full: writing failed'

# Standard attention, and few kv-heads and odd sizes, decode alike too.
for variant in 'attention.kind=standard' 'model.kv_heads=1 model.context=100 model.head_width=24' \
               'attention.selection.shift=false attention.selection.protect_self=false' \
               'attention.selection.relu=false attention.selection.protect_bos=false' \
               'attention.selection.source=bilinear model.kv_heads=1'; do
    rm -rf variant
    # shellcheck disable=SC2086
    train variant model.context=210 train.batch=4 train.steps=10 train.log_every=10 $variant
    expect 0 selectra "${arguments[@]}"
    expect 0 selectra generate variant --prompt "" --tokens 99 --temperature 1 --seed 3 --logprobs cached.jsonl
    expect 0 selectra generate variant --prompt "" --tokens 99 --temperature 1 --seed 3 --logprobs plain.jsonl --no-cache
    check "cache and no cache agree: $variant" agree cached.jsonl plain.jsonl 1
done

# The last of them has two tensors more a layer, and stays what it is.
expect 0 selectra inspect variant --json
for name in layers.0.attn.sel_q.weight layers.1.attn.sel_k.weight; do
    check "inspect lists $name" grep -q "\"$name\"" out
done
with=$(number parameters out)
expect 2 selectra "${arguments[@]}" attention.selection.source=head0
said 'attention.selection.source: bilinear -> head0'
train plain model.context=210 train.steps=0 model.kv_heads=1
expect 0 selectra "${arguments[@]}"
expect 0 selectra inspect plain --json
check "2 dh D parameters more a layer" test "$with" -eq $(($(number parameters out) + 2 * 2 * 16 * 64))
expect 2 selectra "${arguments[@]}" run.dir=other train.init_from=variant
said 'train.init_from: not of this model: .*sel_[qk]'
verdict
