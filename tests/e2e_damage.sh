#!/usr/bin/env bash
# A damaged checkpoint is refused by name and the one before it is used; when all are damaged, nothing is done.
. "$(dirname "$0")/e2e.sh"
prepare

train straight checkpoint.every=10 checkpoint.keep=9 train.steps=40 train.batch=4 train.log_every=10
expect 0 selectra "${arguments[@]}"
train broken checkpoint.every=10 checkpoint.keep=9 train.steps=40 train.batch=4 train.log_every=10
SELECTRA_FAULT=0:forward:30:term expect 85 selectra "${arguments[@]}"
check "stopped at step 30" test -d "$(state broken 30)"
cp -r broken whole

flip() {   # FILE: one bit in its middle
    local at=$(($(stat -c %s "$1") / 2)) byte
    byte=$(od -An -tu1 -j $at -N 1 "$1")
    printf "\\x$(printf %02x $((byte ^ 4)))" | dd of="$1" bs=1 seek=$at conv=notrunc status=none
}
cut_short() { truncate -s -1 "$1"; }
cut_empty() { truncate -s 0 "$1"; }
lose() { rm "$1"; }

for file in model.safetensors optimizer.safetensors tokenizer.model manifest.json; do
    for harm in flip cut_short cut_empty lose; do
        rm -rf broken
        cp -r whole broken
        $harm "$(state broken 30)/$file"
        expect 0 selectra "${arguments[@]}"
        said "step-00000030.*$file|$file.*step-00000030"
        check "$harm $file: the checkpoint before was used" grep -q 'resuming from step 20' out
        same_state straight broken 40
    done
done
same_metrics straight broken

# Other commands do as training does.
rm -rf broken
cp -r whole broken
flip "$(state broken 30)/model.safetensors"
expect 0 selectra eval broken --data valid --json
said "step-00000030"
expect 1 selectra eval "$(state broken 30)" --data valid
said "model.safetensors"

# A dangling or misleading `latest` misleads nobody.
rm -rf broken
cp -r whole broken
ln -sfn step-00000099 broken/checkpoints/latest
expect 0 selectra "${arguments[@]}"
check "the newest intact one was found" grep -q 'resuming from step 30' out
same_state straight broken 40

# All damaged: refused, with two ranks too, and every byte stays as it is.
rm -rf broken
cp -r whole broken
for folder in broken/checkpoints/step-*; do flip "$folder/model.safetensors"; done
print_tree() { find broken ! -name lock -type f -exec cksum {} + | sort; find broken -type l -printf '%p %l\n'; }
print_tree >before
expect 1 selectra "${arguments[@]}"
said "none .*intact|no intact"
expect 1 ranks 2 "${arguments[@]}"
print_tree >after
check "nothing was overwritten" cmp before after
verdict
