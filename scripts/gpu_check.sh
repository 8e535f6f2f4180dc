#!/bin/sh
# What there is to know of a GPU without TorchRec, in under ten minutes, into the folder OUT. With TorchRec, also run
# pytest -m gpu tests/training.
#   scripts/gpu_check.sh [--dry-run] [--only "PART PART"] OUT
# Needs Python 3.11 or newer, torch, triton, numpy and pytest; no torchrec, no fbgemm, no network. PYTHON names the
# interpreter. Every part has a time limit of its own and writes as it goes; a part that fails or runs out
# of time does not stop the next, and summary.txt says how each ended. --dry-run does the same on a CPU, with tiny
# shapes and Triton's interpreter. --only runs the parts it names: tests tuning fm_attention fm_attention_norm
# gpu_step. Exits with 1 when any part failed.
set -u
dry=
if [ "${1:-}" = --dry-run ]; then
    dry=1
    shift
fi
only=
if [ "${1:-}" = --only ] && [ $# -gt 1 ]; then
    only=" $2 "
    for name in $2; do
        case " tests tuning fm_attention fm_attention_norm gpu_step " in *" $name "*) ;; *)
            echo "scripts/gpu_check.sh: --only: no part is named '$name'" >&2
            exit 2
            ;;
        esac
    done
    shift 2
fi
if [ $# -ne 1 ]; then
    echo 'usage: scripts/gpu_check.sh [--dry-run] [--only "PART PART"] OUT' >&2
    exit 2
fi
python=${PYTHON:-python3}
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH PYTHONDONTWRITEBYTECODE
: >"$out/summary.txt"
failed=0

# part NAME SECONDS COMMAND...: runs it into OUT/NAME.txt and adds its end to the summary.
part() {
    name=$1 limit=$2
    shift 2
    case "${only:- $name }" in *" $name "*) ;; *) return ;; esac
    start=$(date +%s)
    timeout -k 10 "$limit" "$@" >"$out/$name.txt" 2>&1
    code=$?
    case $code in
    0) end=passed ;;
    124 | 137) end="out of time ($limit s)" failed=1 ;;
    *) end="failed ($code)" failed=1 ;;
    esac
    echo "$name: $end after $(($(date +%s) - start)) s" | tee -a "$out/summary.txt"
    grep -E '^(FAILED|ERROR) ' "$out/$name.txt" | tee -a "$out/summary.txt"
    tail -n 3 "$out/$name.txt"
}

workers=
"$python" -c 'import xdist' 2>/dev/null && workers="-n 8" # most of the time goes to Triton's compiler
tests="$python -m pytest -p no:cacheprovider -o addopts= -q --strict-markers --tb=short -rfE"
if [ -n "$dry" ]; then
    part tests 200 env TRITON_INTERPRET=1 $tests tests/ops/triton_interpreter_cases.py -k "strided or flops"
    part fm_attention 200 "$python" benchmarks/fm_attention.py --device cpu --rounds 1 --norm --shapes 4,8,2 \
        --batch 8 --without compiled --output "$out"
    part gpu_step 200 "$python" benchmarks/gpu_step.py --device cpu --shapes tiny --rounds 2 --steps 1 --modes eager \
        --output "$out"
    part tuning 200 env TRITON_INTERPRET=1 "$python" benchmarks/fm_tune.py --dry-run --output "$out"
else
    part tests 130 $tests $workers -m gpu tests/ops tests/nn
    part tuning 150 "$python" benchmarks/fm_tune.py --seconds 135 --output "$out"
    part fm_attention 75 "$python" benchmarks/fm_attention.py --device cuda --rounds 7 --seconds 60 --output "$out"
    part fm_attention_norm 40 "$python" benchmarks/fm_attention.py --device cuda --rounds 7 --seconds 25 --norm \
        --shapes 28,64,16 64,64,16 27,16,24 --output "$out"
    part gpu_step 160 "$python" benchmarks/gpu_step.py --device cuda --seconds 120 --output "$out"
fi
exit $failed
