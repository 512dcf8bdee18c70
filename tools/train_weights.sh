#!/usr/bin/env bash
# Trains the weights that ship, as two processes of one thread, and puts them into the package. Stopped, the same command goes on.
#
#     tools/train_weights.sh nano cifar10 RUNS           the folder has train.parquet and test.parquet
#     tools/train_weights.sh nano_plus cifar10 RUNS
#     tools/train_weights.sh tiny imagenette128 RUNS     the folder has train.parquet and val.parquet
set -euo pipefail
cd "$(dirname "$0")/.."
if (($# != 3)); then
    echo "error: say which weights, the folder of their data and one for the runs, such as: $0 nano cifar10 runs/weights" >&2
    exit 2
fi
which=$1 data=$2 runs=$3
export OMP_NUM_THREADS=1

train() { # NAME RECIPE KEY=VALUE...
    .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 tools/teacher.py train "$2" \
        --data "$data/train.parquet" --out "$runs/$1" kernel=auto track=none "${@:3}"
}

small=(warmup_epochs=1 drop_path=0 ema=0.999 ema_warmup=true holdout=0.02 precision=bf16 checkpoint_every=100)
case $which in
nano)
    train nano cifar10_nano epochs=32 lr=3e-3 "${small[@]}"
    train nano-2 cifar10_nano weights="$runs/nano" epochs=30 lr=2e-3 cutmix=1.0 auto_augment=rand-m5-n1-inc1 "${small[@]}"
    train teacher cifar10_nano model=teacher_cifar10 opt=sgd lr=0.5 batch_size=512 weight_decay=1.3e-3 clip_grad=none epochs=12 \
        warmup_epochs=1 drop_path=0 holdout=0.02 ema=0.99 ema_warmup=true checkpoint_every=50 kernel=off
    train nano-3 cifar10_nano weights="$runs/nano-2" teacher="$runs/teacher" distill=0.9 temperature=2 epochs=9 lr=1e-3 \
        cutmix=1.0 "${small[@]}" warmup_epochs=0.3 precision=fp32
    .venv/bin/python tools/ship.py "$runs"/nano{,-2,-3} --test "$data/test.parquet" --data CIFAR-10
    ;;
nano_plus)
    small+=(model=dynamixer_nano_plus)
    train nano-plus cifar10_nano epochs=18 lr=3e-3 cutmix=1.0 auto_augment=rand-m5-n1-inc1 "${small[@]}"
    train nano-plus-2 cifar10_nano weights="$runs/nano-plus" epochs=22 lr=3e-3 "${small[@]}"
    train nano-plus-3 cifar10_nano weights="$runs/nano-plus-2" epochs=30 lr=2e-3 cutmix=1.0 auto_augment=rand-m5-n1-inc1 "${small[@]}"
    .venv/bin/python tools/ship.py "$runs"/nano-plus{,-2,-3} --test "$data/test.parquet" --data CIFAR-10
    ;;
tiny)
    photographs=(batch_size=64 ema=0.998 ema_warmup=true holdout=0.05 scale=0.25 drop_path=0.05)
    train tiny-64 imagenette_tiny size=64 epochs=24 warmup_epochs=2 lr=2e-3 checkpoint_every=50 "${photographs[@]}"
    train tiny-128 finetune weights="$runs/tiny-64" size=128 'sizes=[96,112,128]' epochs=6 warmup_epochs=0.5 lr=8e-4 \
        layer_decay=none checkpoint_every=20 "${photographs[@]}"
    train tiny-64-2 imagenette_tiny weights="$runs/tiny-128" size=64 epochs=40 warmup_epochs=1 lr=1.5e-3 cutmix=1.0 precision=bf16 \
        checkpoint_every=50 "${photographs[@]}"
    train tiny-128-2 finetune weights="$runs/tiny-64-2" size=128 epochs=4 warmup_epochs=0.5 lr=8e-4 layer_decay=none precision=bf16 \
        checkpoint_every=20 "${photographs[@]}"
    train tiny-96 imagenette_tiny weights="$runs/tiny-128-2" size=96 epochs=30 warmup_epochs=0.5 lr=1e-3 cutmix=1.0 \
        auto_augment=rand-m5-n1-inc1 precision=bf16 checkpoint_every=100 "${photographs[@]}" batch_size=32 ema=0.999
    train tiny-128-3 finetune weights="$runs/tiny-96" size=128 epochs=3 warmup_epochs=0.3 lr=5e-4 layer_decay=none precision=bf16 \
        checkpoint_every=50 "${photographs[@]}" batch_size=32 scale=0.4
    train tiny-128-4 imagenette_tiny weights="$runs/tiny-128-3" size=128 epochs=15 warmup_epochs=0.3 lr=1e-3 cutmix=1.0 \
        auto_augment=rand-m5-n1-inc1 precision=bf16 checkpoint_every=50 "${photographs[@]}" batch_size=32 ema=0.999
    train tiny-128-5 finetune weights="$runs/tiny-128-4" size=128 epochs=3 warmup_epochs=0.2 lr=5e-4 layer_decay=none precision=bf16 \
        checkpoint_every=50 "${photographs[@]}" batch_size=32 ema=0.999 scale=0.4
    train teacher-tiny imagenette_tiny model=teacher_imagenette size=96 opt=sgd lr=0.2 batch_size=128 weight_decay=2e-3 clip_grad=none \
        epochs=24 warmup_epochs=1 drop_path=0 holdout=0.05 ema=0.99 ema_warmup=true checkpoint_every=20 kernel=off
    photographs=(batch_size=32 ema=0.999 ema_warmup=true holdout=0.05 drop_path=0 checkpoint_every=50)
    photographs+=(teacher="$runs/teacher-tiny" distill=0.9 temperature=2)
    train tiny-96-2 imagenette_tiny weights="$runs/tiny-128-5" size=96 epochs=14 warmup_epochs=0.3 lr=1e-3 cutmix=1.0 scale=0.25 \
        "${photographs[@]}"
    train tiny-128-6 imagenette_tiny weights="$runs/tiny-96-2" size=128 epochs=2 warmup_epochs=0.2 lr=5e-4 scale=0.4 "${photographs[@]}"
    .venv/bin/python tools/ship.py "$runs"/tiny-{64,128,64-2,128-2,96,128-3,128-4,128-5,96-2,128-6} --test "$data/val.parquet" \
        --data "Imagenette (fast.ai, 128 px)"
    ;;
*)
    echo "error: $which is none of: nano, nano_plus, tiny" >&2
    exit 2
    ;;
esac
