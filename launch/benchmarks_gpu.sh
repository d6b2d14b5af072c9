#!/usr/bin/env bash
# The benchmarks on one NVIDIA GPU, in a quarter of an hour and without a network: each part is timed and bounded.
# Usage: bash launch/benchmarks_gpu.sh [--dry_run] DATA TOKENIZER OUT [PART ...]
# DATA is the folder of a published data set (Office_Products), TOKENIZER a Hugging Face folder whose tokens the
# random weights get. Numbers and logs go into OUT. Parts, by default all in this order:
#   wide_beams  beams 256 over semantic ids, Qwen3-1.7B       train_step  Llama-3.2-1B with LoRA, beside PyTorch
#   decoding    beside transformers' generate, SmolLM2        epoch       Llama-3.2-3B: 10,000 rows, then 5,000 users
#   first       the quickstart's first evaluation, compiling included (MovieLens in TCA4REC_CACHE)
# PYTHON (python3) has JAX for CUDA, PyTorch, transformers and PEFT. LIMIT is the seconds a part may take (240).
# DEBUG=1: SmolLM2's architecture and little of everything, to try it on a CPU.
# --dry_run prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/dry_run.sh
source launch/dry_run.sh
[ -z "$dry_run" ] || shift
[ $# -ge 3 ] || usage
data="$1" tokenizer="$2" out="$3" python="${PYTHON:-python3}" limit="${LIMIT:-240}" debug="${DEBUG:-}" failed=0
shift 3
[ $# -gt 0 ] || set -- wide_beams train_step decoding epoch first
do_it mkdir -p "$out"
do_it export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD" PYTHONUNBUFFERED=1
part=""

timed() { # a command of the part, whose output goes into a log of its own
  local name="$part.$1" began=$SECONDS status=0
  shift
  if [ -n "$dry_run" ]; then
    do_it "$@"
    return
  fi
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  tail -n 40 "$out/$name.log"
  echo "== $name: $((SECONDS - began)) s, status $status" | tee -a "$out/seconds.txt"
  return "$status"
}

wide_beams() {
  local sizes="--attention=cudnn,xla"
  [ -z "$debug" ] || sizes="--architecture=smollm2-135m --layers=2 --cases=1x32x8,2x64x8 --items=2000 --repeats=2"
  # shellcheck disable=SC2086 # several flags
  timed all "$python" launch/benchmarks/wide_beams.py $sizes --output="$out/wide_beams.json"
}

train_step() {
  local sizes="--architecture=llama-3.2-1b --batch=32 --variants=cudnn/none,cudnn/products,xla/products"
  [ -z "$debug" ] || sizes="--architecture=smollm2-135m --batch=1 --steps=1 --warm_up=1 --only=ours"
  # shellcheck disable=SC2086
  timed all "$python" launch/benchmarks/train_step.py --data="$data" --weights="$tokenizer" --dtypes=bfloat16 \
    $sizes --output="$out/train_step.json"
}

decoding() {
  local sizes=(--users=64)
  [ -z "$debug" ] || sizes=(--users=2 --batch=2 --beams=4 '--only="ours, before_softmax"')
  timed all "$python" launch/benchmarks/decoding.py --part=generate --data="$data" --weights="$tokenizer" \
    --architecture=smollm2-135m "${sizes[@]}" --output="$out/decoding.json"
}

launched() { # a launch script: SCRIPT CONFIG, of the part's work directory
  timed "$1${3:+_$3}" "$python" "launch/$1.py" --config="$2" --workdir="$out/$part"
}

weights() { # random ones of an architecture, for the part
  timed weights "$python" launch/benchmarks/random_llm.py --architecture="$1" --tokenizer="$tokenizer" \
    --folder="$out/$part/weights"
}

epoch() {
  local architecture=llama-3.2-3b config="chips=1,data.path=$data,llm.weights=$out/epoch/weights"
  config+=",decoding.mask=before_softmax,decoding.rules=exact,decoding.length_penalty=0.0"
  if [ -z "$debug" ]; then
    config+=",training.batch_size=32,training.steps=313,inference.batch_size=128,llm.attention=cudnn,llm.remat=none"
  else
    architecture=smollm2-135m
    config+=",training.batch_size=2,training.steps=2,evaluation.rows=4,llm.num_layers=2,cf.max_epochs=1"
  fi
  weights "$architecture" || return
  for step in prepare_data train_cf train evaluate; do
    launched "$step" "configs/llama_3_2_3b.py:$config" || return
  done
}

first() {
  local config="configs/quickstart.py:${debug:+debug,}llm.weights=$out/first/weights,llm.dtype=bfloat16"
  config+=",training.steps=4,training.checkpoint_every=4"
  weights smollm2-135m && launched prepare_data "$config" && launched train_cf "$config" &&
    launched train "$config,alpha=0,run=plain" plain && launched train "$config,run=aligned" aligned &&
    launched evaluate "$config"
}

for part; do
  case "$part" in
    wide_beams) wide_beams || failed=1 ;;
    train_step) train_step || failed=1 ;;
    decoding) decoding || failed=1 ;;
    epoch) epoch || failed=1 ;;
    first) first || failed=1 ;;
    *) usage ;;
  esac
done
exit "$failed"
