#!/usr/bin/env bash
# training.sh PYTHON CIFAR10 RUNS: all tables that take trainings on CIFAR-10 images: what compression does to accuracy,
# what late averages do, and when compression and the search of bit widths pay. A finished run is kept in RUNS and serves
# every table that has it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$1 images=$2 runs=$3
accuracy() { "$python" benchmarks/accuracy.py "$images" --epochs 5 --runs "$runs" "$@"; }

echo "== 4 bits beside float32, three seeds"
accuracy --seeds 3 -- "none" "maxmin --error-feedback"

echo "== every compressor"
gently="--compressor-warmup-steps 156"  # two epochs; of DGC the ramp
accuracy --seeds 1 -- "none" "none --dense-dtype bfloat16" "maxmin --error-feedback" \
  "maxmin --error-feedback --search --search-target-bits 3" \
  "norm_uniform" "exponential" "quantile" "1bit" "1bit $gently" "terngrad" "svd --powersgd-rank 4" "--powersgd-rank 4" "sanity" \
  "topk --error-feedback" "topk --error-feedback $gently" "topk --error-feedback --topk-ratio 0.05 $gently" \
  "topk --error-feedback --topk-ratio 0.1 $gently" "topk_rmsprop --error-feedback $gently" \
  "--dgc $gently" "--dgc --topk-ratio 0.05 $gently" "--dgc --topk-ratio 0.1 $gently"

echo "== a broken barrier"
late="--bb-num-parallel-steps 1"
accuracy --seeds 1 -- "none" "none --bb-ratio 0.9 $late" "none --bb-ratio 0.5 $late" "none --bb-ratio 0.1 $late" \
  "maxmin --error-feedback" "maxmin --error-feedback --bb-ratio 0.9 $late" \
  "maxmin --error-feedback --bb-ratio 0.5 $late" "maxmin --error-feedback --bb-ratio 0.1 $late"

echo "== does the search pay, five seeds"
"$python" benchmarks/search_pays.py "$images" --runs "$runs" -o docs/search_pays.png

echo "== time to accuracy"
if [ "$(id -u)" = 0 ]; then
  "$python" benchmarks/time_to_accuracy.py "$images" --runs "$runs" -o docs/time_to_accuracy.png
else
  echo "training.sh: no table of time to accuracy: its links take root"
fi
