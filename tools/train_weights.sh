#!/usr/bin/env bash
# Trains the weights that ship, as two processes of one thread, and puts them into the package. Stopped, the same command goes on.
#
#     tools/train_weights.sh tiny imagenette128 RUNS     the folder has train.parquet and val.parquet
set -euo pipefail
cd "$(dirname "$0")/.."
which=$1 data=$2 runs=$3
export OMP_NUM_THREADS=1

train() { # NAME RECIPE KEY=VALUE...
    .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 -m dynamixer train "$2" \
        --data "$data/train.parquet" --out "$runs/$1" batch_size=64 holdout=0.05 kernel=auto track=none "${@:3}"
}

case $which in
tiny)
    train tiny-64 imagenette_tiny size=64 epochs=24 warmup_epochs=2 lr=2e-3 ema=0.998 scale=0.25 drop_path=0.05 checkpoint_every=50
    train tiny-128 finetune weights="$runs/tiny-64" size=128 'sizes=[96,112,128]' epochs=6 warmup_epochs=0.5 lr=8e-4 \
        ema=0.998 scale=0.25 drop_path=0.05 layer_decay=none checkpoint_every=20
    train teacher imagenette_tiny model=resnet18 size=96 epochs=20 warmup_epochs=1 lr=2e-3 drop_path=0 precision=bf16 kernel=off \
        checkpoint_every=100
    distilled=(teacher="$runs/teacher" distill=0.8 temperature=2 mixup=0.2 ema=0.998 scale=0.25 drop_path=0.05 layer_decay=none
        precision=bf16 checkpoint_every=50)
    train tiny-96-distilled finetune weights="$runs/tiny-128" size=96 epochs=28 warmup_epochs=1 lr=1.5e-3 "${distilled[@]}"
    train tiny-128-distilled finetune weights="$runs/tiny-96-distilled" size=128 epochs=8 warmup_epochs=0.5 lr=5e-4 "${distilled[@]}"
    .venv/bin/python tools/ship.py "$runs"/{tiny-64,tiny-128,teacher,tiny-96-distilled,tiny-128-distilled} \
        --test "$data/val.parquet" --data "Imagenette (fast.ai, 128 px)"
    ;;
*)
    echo "error: $which is none of: tiny" >&2
    exit 2
    ;;
esac
