#!/usr/bin/env bash
# Trains dynamixer_nano on the pictures that ship, evaluates it, and classifies a handful of pictures.
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-runs/demo}
run=${run%/}
if [ -e "$run" ]; then
    kept=$run.$(date +%Y%m%d-%H%M%S)
    echo "the earlier $run is kept as $kept"
    mv "$run" "$kept"
fi
dynamixer=.venv/bin/dynamixer
echo "== train: dynamixer train fashion_nano --out $run"
$dynamixer train fashion_nano --out "$run"
echo "== evaluate: dynamixer eval $run --data fashion-mnist-mini --out $run/test-confusion.png"
$dynamixer eval "$run" --data fashion-mnist-mini --out "$run/test-confusion.png"
echo "== predict: dynamixer predict examples/pictures --model $run --top 2 --sheet $run/predictions.png"
$dynamixer predict examples/pictures --model "$run" --top 2 --sheet "$run/predictions.png"
echo "== pictures to look at:"
ls -1 "$run"/*.png
