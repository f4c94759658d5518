#!/usr/bin/env bash
# The main job from end to end on the embedded data set: train on two ranks with 4-bit gradients, search bit widths on
# the checkpoint, train on with the widths found. Takes minutes on two cores; writes to ${1:-runs/demo}.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-runs/demo}
rm -rf "$out"
TMPDIR=$(mktemp -d)  # torch's launcher leaves its logs in it
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
model="digits -a resnet18 --num-classes 10 --image-size 32 --crop-scale 0.6 --hflip 0 --data-backend pytorch -j 0 --seed 1"
# OMP_NUM_THREADS is what torchrun sets, too, but with a warning; the program sets its threads itself.
ranks="env OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc_per_node 2 main.py"
recipe="-b 32 --print-freq 11 --compression-type maxmin --error-feedback"

echo "== 1/3 train on two ranks, max-min at 4 bits with error feedback"
# shellcheck disable=SC2086  # the words of these lists are separate arguments
$ranks $model $recipe --epochs 6 --lr 0.02 --lr-schedule cosine --warmup 1 --workspace "$out/train"

echo "== 2/3 search a bit width for every layer on the checkpoint"
python main.py $model -b 64 --search --evaluate --pretrained-weights "$out/train/checkpoint.pth.tar" \
  --popsize 50 --search-iterations 5 --search-target-bits 4.2 --workspace "$out/search"

echo "== 3/3 train on with the widths found"
$ranks $model $recipe --epochs 1 --lr 0.002 --pretrained-weights "$out/train/checkpoint.pth.tar" \
  --compression-scheme "$out/search/adapt_logs/compress_scheme_calibration.json" --workspace "$out/scheme"

python benchmarks/summary.py "$out"
