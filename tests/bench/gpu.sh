#!/usr/bin/env bash
# The GPU tests and the benchmarks of extraction and of training on a fresh machine that has torch 2.11, torchaudio,
# triton, numpy, scikit-learn and typer, and no network:
#
#   OUT=results bash tests/bench/gpu.sh [tests] [bench] [train]          all unless some are named
#
# What else is needed lies as wheels in WHEELS: wheels/ in the checkout, or beside it. They are
# fetched where there is a network, for the Python version of that machine (here 3.11):
#
#   pip download -d wheels --no-deps --only-binary :all: --python-version 3.11 \
#       --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
#       --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
#       'setuptools>=77,<82' 'torchvision>=0.26,<0.27' \
#       alembic annotated-types anyio beartype certifi cffi click cloudpickle colorlog dask distributed donfig filelock fsspec \
#       google-crc32c greenlet h11 h5py hf-xet httpcore2 httpx2 huggingface-hub hypothesis idna \
#       importlib-metadata iniconfig jaxtyping jinja2 lazy-importer locket mako markupsafe msgpack \
#       numcodecs optuna packaging partd pillow pluggy psutil pyarrow pycparser pydantic \
#       pydantic-core pygments pytest pyyaml safetensors sortedcontainers soundfile sqlalchemy tblib \
#       timm tomli-w toolz tornado tqdm truststore typing-extensions typing-inspection \
#       wadler-lindig zarr zict zipp
#
# These are about 100 MB, half of them pyarrow.
#
# SECONDS_EACH and ROUNDS fit the benchmark into the time there is: 20 and 3 take about ten minutes.
# Banks are written below TMPDIR, 768 KiB a clip. After MOST_S the
# benchmark of extraction prints what it has measured; that of training takes about five minutes and
# is ended after TRAIN_MOST_S. Leaves 1 where anything failed, after all of it.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-out}
mkdir -p "$out"
python=${PYTHON:-python3}
failed=0

wheels=${WHEELS:-}
for folder in wheels ../wheels; do
  if [ -z "$wheels" ] && [ -d "$folder" ]; then wheels=$folder; fi
done
if [ -n "$wheels" ]; then
  # What is there already stays: torch and torchaudio belong together.
  "$python" -m pip install -q --no-index --no-deps "$wheels"/*.whl || failed=1
  "$python" -m pip install -q --no-index --find-links "$wheels" --no-deps -e . || failed=1
else
  echo "no folder of wheels: what is installed is used"
fi
"$python" -m pip list 2>/dev/null >"$out/packages.txt"

is_asked() { [ "$asked" = "" ] || [[ " $asked " == *" $1 "* ]]; }
asked="$*"

if is_asked tests; then
  tests=()
  for name in loader_gpu frontends lanes extract_gpu best_match_triton; do
    if [ -f "tests/test_$name.py" ]; then
      tests+=("tests/test_$name.py")
    else
      echo "there is no tests/test_$name.py: left out"
    fi
  done
  "$python" -m pytest -q -m gpu -p no:cacheprovider "${tests[@]}" 2>&1 | tee "$out/tests.txt" || failed=1
fi

if is_asked bench; then
  timeout "${MOST_S:-840}" "$python" tests/bench/extract.py --device cuda --rounds "${ROUNDS:-3}" \
    --seconds "${SECONDS_EACH:-20}" --files 256 --json "$out/extract.json" \
    2> >(tee "$out/extract.log" >&2) | tee "$out/extract.md" || failed=1
fi

if is_asked train; then
  timeout "${TRAIN_MOST_S:-600}" "$python" tests/bench/train.py --device cuda \
    --rounds "${ROUNDS:-3}" --classes 10 50 --json "$out/train.json" \
    2> >(tee "$out/train.log" >&2) | tee "$out/train.md" || failed=1
fi
exit "$failed"
