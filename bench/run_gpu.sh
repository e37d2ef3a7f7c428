#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under ten minutes without a network: builds the C++ kernels, runs the
# tests marked gpu and a memory checker, calibrates dispatch, measures, and writes CSV, JSON and plots.
#
#     bench/run_gpu.sh [--smoke | --dry-run | --questions] [--tests PATH] [OUT_DIR]
#
# --smoke      the same steps on tiny shapes on the CPU, in a minute: shows that the code works, measures nothing
# --dry-run    a rehearsal where there is no GPU, in minutes: --smoke, and the build, every test collected, every kernel
#              compiled for compute capability 9.0 and launched onto a driver that computes nothing, every case listed,
#              the questions asked of tiny shapes; ends at the first thing that fails
# --questions  instead of all that: what docs/notes/gpu.md leaves open, measured in a run of its own
# --tests      where the tests marked gpu are (default: tests/gpu)
# OUT_DIR      default: peftkernels-bench-gpu
#
# PYTHON (default python3) is the interpreter whose torch is used; the package is used from this checkout.
# RUN_GPU_SECONDS (default 580, of a rehearsal 1200) is what all of it may take; in a copy without a repository,
# PEFTKERNELS_COMMIT is the commit that results are labelled with. Exit codes: 0 done, 1 something was wrong or could
# not be shown to be right, 2 wrong input or no GPU. A missed goal is no failure.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

usage() { sed -n '5,19s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

smoke=''
rehearsal=''
questions=''
tests=tests/gpu
out=''
while [ $# -gt 0 ]; do
    case $1 in
        --smoke) smoke=yes ;;
        --dry-run) smoke=yes rehearsal=yes ;;
        --questions) questions=yes ;;
        --tests)
            [ $# -gt 1 ] || { echo "run_gpu: error: --tests: expected a path" >&2; exit 2; }
            tests=$2
            shift
            ;;
        -h | --help) usage; exit 0 ;;
        -*) echo "run_gpu: error: found option $1, expected --smoke, --dry-run, --questions, --tests or --help" >&2; exit 2 ;;
        *)
            [ -z "$out" ] || { echo "run_gpu: error: found a second folder $1, expected one" >&2; exit 2; }
            out=$1
            ;;
    esac
    shift
done
if [ -n "$smoke" ] && [ -n "$questions" ]; then
    echo "run_gpu: error: --questions: found it beside --smoke or --dry-run, expected it by itself" >&2
    exit 2
fi
out=${out:-peftkernels-bench-gpu}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
limit=${RUN_GPU_SECONDS:-$([ -n "$rehearsal" ] && echo 1200 || echo 580)}
device=cuda
[ -z "$smoke" ] || device=cpu
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
# The table that this run measures is the one that its benchmark uses.
export PEFTKERNELS_TRITON_TABLES="$out"
exec > >(tee "$out/run.log") 2>&1
tee_pid=$!

failures=()
# What each step may take at most; the benchmark gets what the others leave.
build_limit=90 doctor_limit=60 tests_limit=180 checker_limit=80 tune_limit=150 closing=15
[ -z "$rehearsal" ] || build_limit=300

left() { echo $((limit - SECONDS)); }

least() { echo $(($1 < $2 ? $1 : $2)); }

# step NAME LIMIT COMMAND...: run a command for LIMIT seconds at most, say how long it took; its exit code is kept.
step() {
    local name=$1 most=$2 began=$SECONDS code
    shift 2
    # A limit of 0 would be none.
    if [ "$most" -lt 5 ]; then
        echo "== $name: left out, $(left) s are left of $limit"
        return 124
    fi
    echo "== $name (at most $most s)"
    timeout --signal=INT --kill-after=10 "$most" "$@"
    code=$?
    [ $code -ne 124 ] && [ $code -ne 137 ] || echo "run_gpu: $name was stopped after $most s"
    echo "== $name: exit code $code, $((SECONDS - began)) s, $(left) s left"
    return $code
}

# fail WHAT: remember what went wrong; in a rehearsal it is the end.
fail() {
    failures+=("$1")
    [ -z "$rehearsal" ] || finish
}

finish() {
    if [ ${#failures[@]} -eq 0 ]; then
        echo "run_gpu: passed in $SECONDS s; results in $out"
        [ -z "$smoke" ] || echo "run_gpu: a ${rehearsal:+rehearsal and a }smoke run: no figure in it says anything about a GPU"
    else
        printf 'run_gpu: FAILED: %s\n' "${failures[@]}"
    fi
    close_log
    [ ${#failures[@]} -eq 0 ]
    exit
}

# Let the log be written to its end, which something that a stopped step left behind may hold open.
close_log() {
    exec >&- 2>&-
    for _ in {1..50}; do
        kill -0 "$tee_pid" 2> /dev/null || break
        sleep 0.1
    done
}

find_device='
import platform, sys
try:
    import torch
except ImportError as error:
    sys.exit(f"run_gpu: error: torch cannot be imported: {error}")
try:
    import triton
    compiler = triton.__version__
except ImportError as error:
    compiler = f"none ({error})"
print(f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {compiler}")
if sys.argv[1] == "cuda":
    if not torch.cuda.is_available():
        sys.exit("run_gpu: error: torch finds no CUDA device; --smoke runs the same steps on the CPU")
    facts = torch.cuda.get_device_properties(0)
    print(f"{facts.name}, compute capability {facts.major}.{facts.minor}, {facts.total_memory >> 20} MiB")
'
"$python" -c "$find_device" "$device" || {
    close_log
    exit 2
}
if [ -z "$smoke" ]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu --format=csv ||
        echo "nvidia-smi: not here, driver and clocks are not shown"
fi

ask() { step questions "$1" "$python" -m bench.gpu.questions --out "$out" --device "$device" "${@:2}"; }

if [ -n "$questions" ]; then
    # Its last product comes on top of its own limit.
    ask $(($(left) - 5)) --limit $(($(left) - 30)) || fail "questions: exit code $?"
    finish
fi

# 1. Build. The Triton kernels are compiled as they are first called; only the C++ kernels are built beforehand.
if [ -n "$rehearsal" ]; then
    # Beside the checkout, whose kernels another process may be using.
    built=$(mktemp -d)
    step build "$build_limit" env PEFTKERNELS_BUILD=required \
        "$python" setup.py --quiet build --build-base "$built"
    code=$?
    rm -rf "$built"
    [ $code -eq 0 ] || fail "the C++ kernels were not built"
    step kernels "$(left)" env PYTHONPATH="tests:$PYTHONPATH" \
        "$python" -m compile_only.resources --capability 9.0 --processes "$(nproc)" ||
        fail "kernels that do not compile for compute capability 9.0, or badly"
    step launches "$(left)" "$python" -m pytest -q -p no:cacheprovider tests/backends/test_triton_driver.py ||
        fail "launches that a driver would not take, or that bring a kernel something else"
    step cases 60 "$python" -m bench.gpu --list --device cpu || fail "cases: exit code $?"
elif [ -n "$smoke" ]; then
    echo "build: left out, a smoke run takes the C++ kernels as they lie"
elif ! command -v "${CXX:-c++}" > /dev/null; then
    echo "build: left out, there is no C++ compiler (${CXX:-c++}); CPU tensors run on the eager backend"
else
    step build "$(least $build_limit "$(left)")" "$python" setup.py --quiet build_ext --inplace ||
        fail "the C++ kernels were not built"
fi
step doctor "$(least $doctor_limit "$(left)")" "$python" -m peftkernels doctor || fail "doctor"

# 2. Tests, and a memory checker on a few odd shapes.
pytest=("$python" -m pytest -m gpu -q -p no:cacheprovider "$tests")
# Kernels are compiled as tests first call them, each on one core: several processes share that.
if [ -n "$rehearsal" ]; then
    pytest+=(--collect-only)
elif [ -z "$smoke" ] && "$python" -c 'import xdist' 2> /dev/null; then
    pytest+=(-n "$(least 8 "$(nproc)")")
fi
if ! "$python" -c 'import pytest' 2> /dev/null; then
    echo "gpu tests: pytest is not installed, nothing was tested"
    fail "gpu tests: pytest is not installed"
else
    step "gpu tests" "$(least $tests_limit "$(left)")" "${pytest[@]}"
    code=$?
    if [ $code -eq 5 ] && [ -n "$smoke" ] && [ -z "$rehearsal" ]; then
        echo "gpu tests: none were collected in $tests; nothing was tested"
    elif [ $code -ne 0 ]; then
        fail "gpu tests: exit code $code"
    fi
fi
if [ -n "$smoke" ]; then
    # The Triton kernels themselves, interpreted on the CPU.
    TRITON_INTERPRET=1 step "odd shapes" "$(least $checker_limit "$(left)")" \
        "$python" -m bench.gpu --check --device cpu --impl triton || fail "odd shapes: exit code $?"
elif ! command -v compute-sanitizer > /dev/null; then
    echo "memory checker: compute-sanitizer is not installed, memory accesses were not checked"
else
    checked=$out/compute-sanitizer.log
    # Without the allocator's cache every tensor has bounds of its own.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "memory checker" "$(least $checker_limit "$(left)")" \
        compute-sanitizer --tool memcheck --error-exitcode 99 --log-file "$checked" \
        "$python" -m bench.gpu --check bf16
    code=$?
    [ ! -f "$checked" ] || tail -n 15 "$checked"
    if [ $code -eq 124 ] || [ $code -eq 137 ]; then
        echo "memory checker: it took too long, memory accesses were not checked to the end"
    elif [ $code -ne 0 ] && grep -qi 'not supported' "$checked" 2> /dev/null; then
        echo "memory checker: compute-sanitizer does not support this machine, memory accesses were not checked"
    elif [ $code -ne 0 ]; then
        fail "memory checker: exit code $code"
    fi
    rm -f "$checked"
fi

# 3. Calibrate dispatch: what follows uses the table that this writes.
tune_for=$(least $tune_limit $(($(left) / 2)))
tune=("$python" -m bench.tune --out "$out" --device "$device" --limit "$tune_for")
[ -z "$smoke" ] || tune+=(--smoke)
# Its last product, and starting, come on top of its own limit.
step calibration "$(least $((tune_for + 30)) "$(left)")" "${tune[@]}"
code=$?
[ $code -eq 0 ] || fail "calibration: exit code $code"
[ -n "$smoke" ] ||
    echo "calibration: to keep the table, copy it from $out to peftkernels/backends/triton/configs/"

[ -z "$rehearsal" ] || ask 120 --smoke || fail "questions: exit code $?"

# 4. and 5. Measure and write; its tables are the last to be printed.
bench_for=$(($(left) - closing))
bench=("$python" -m bench.gpu --out "$out" --device "$device" --limit "$bench_for")
[ -z "$smoke" ] || bench+=(--smoke --impl eager)
if [ $bench_for -lt 30 ]; then
    echo "benchmark: left out, only $(left) s are left"
    fail "benchmark: no time was left for it"
else
    step benchmark $((bench_for + closing - 5)) "${bench[@]}"
    code=$?
    [ $code -eq 0 ] || fail "benchmark: exit code $code"
fi
finish
