#!/usr/bin/env bash
# One step from step 0 without clipping: Python's safetensors reads the checkpoints, and PyTorch's automatic
# differentiation of the same model finds the same gradient (interchange.py).  Skipped where they are not installed.
. "$(dirname "$0")/e2e.sh"
python=${SEL_TEST_PYTHON:-python3}
$python -c 'import torch, safetensors, numpy' 2>/dev/null || { echo "skipped: $python has no torch and safetensors"; exit 77; }

prepare
# one_step RUN key=value...
one_step() {
    train "$1" train.steps=1 train.clip=0 train.batch=4 "${@:2}"
    expect 0 selectra "${arguments[@]}"
    expect 0 selectra data batch "$SOURCE/configs/tiny.yaml" --step 1 --json run.dir="$1" data.train=train train.batch=4 "${@:2}"
    cp out batch.json
    check "$1: the gradient" $python "$SOURCE/tests/interchange.py" "$1" batch.json
    tail -n 1 check.out
}
one_step selective
one_step memory attention.memory_loss.epsilon=0.1 train.micro_batch=2
one_step standard attention.kind=standard
one_step odd model.width=40 model.heads=5 model.kv_heads=1 model.head_width=8 model.ffn_width=107 model.context=77
one_step bilinear attention.selection.source=bilinear attention.memory_loss.epsilon=0.1 model.kv_heads=1
one_step openblas compute.linear_backend=openblas
verdict
