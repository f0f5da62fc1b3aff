#!/usr/bin/env bash
# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
#
# The tests of tests/gpu on a device, then the speed table, within a time limit.
#
#   bash benchmarks/gpu.sh [--device cuda|cpu] [--minutes 8] [--output FOLDER] [--readme FILE] [--quick] [--force]
#
# Needs what `pip install -e ".[test,benchmark]"` installs, in .venv, in the environment that is active, or as PYTHON.
# Ends with 0 where all tests passed and the table was written.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

device=cuda minutes=8 output=benchmarks/results/gpu further=()
while (($#)); do
    case $1 in
        --device | --minutes | --output | --readme)
            [[ $# -ge 2 ]] || { echo "$1 needs a value." >&2; exit 2; }
            case $1 in
                --device) device=$2 ;;
                --minutes) minutes=$2 ;;
                --output) output=$2 ;;
                --readme) further+=("$1" "$2") ;;
            esac
            shift 2 ;;
        --quick | --force) further+=("$1"); shift ;;
        *) echo "Unknown option '$1'. The options: --device, --minutes, --output, --readme, --quick, --force." >&2; exit 2 ;;
    esac
done
[[ $minutes =~ ^[0-9]*\.?[0-9]+$ ]] || { echo "--minutes must be a number, got '$minutes'." >&2; exit 2; }

python=${PYTHON:-}
[[ -n $python ]] || { [[ -z ${VIRTUAL_ENV:-} && -x .venv/bin/python ]] && python=.venv/bin/python || python=python3; }
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if ! missing=$("$python" - "$device" <<'PY'
import importlib.util, sys
needed = ("torch", "monai", "ignite", "pytest", "hypothesis", "mpmath", "matplotlib", "scipy", "pandas", "tqdm")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if not missing and sys.argv[1].startswith("cuda"):
    import torch
    missing = [] if torch.cuda.is_available() else ["a GPU that torch sees (or --device cpu --quick)"]
print(", ".join(missing))
sys.exit(bool(missing))
PY
); then
    echo "$python lacks: $missing. Install with: pip install -e \".[test,benchmark]\"" >&2
    exit 2
fi
mkdir -p "$output"

# At most a third of the time for the tests; the table has the rest, less what its last cell may take too long.
started=$SECONDS seconds=$(awk "BEGIN {print int(60 * $minutes)}") tests=0
echo "Tests on $device:"
MONAI_IFIM_TEST_DEVICE=$device timeout --kill-after=10 $((seconds / 3 + 1)) "$python" -m pytest -q -p no:cacheprovider \
    --junitxml="$output/tests.xml" tests/gpu >"$output/tests.log" 2>&1 || tests=$?
tail -n 12 "$output/tests.log"

left=$((seconds - (SECONDS - started))) table=0
command=("$python" -m benchmarks.gpu --device "$device" --output "$output" --tests "$output/tests.xml" "${further[@]}")
timeout --kill-after=5 $((left - 15 > 1 ? left - 15 : 1)) "${command[@]}" \
    --minutes "$(awk "BEGIN {print ($left - 20) / 60}")" || table=$?
if ((table == 124 || table == 137)); then # stopped in a cell: the finished ones are on file
    table=0
    "${command[@]}" --tables-only || table=$?
fi
echo "$((SECONDS - started)) s; records, tables and picture are in $output."
exit $((tests ? tests : table))
