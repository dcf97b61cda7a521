#!/usr/bin/env bash
# Make the environment: virtual environment, locked pins, mmcv with its ops, a sparse convolution, MLflow's tables.
# Safe to interrupt and run again.
set -euo pipefail
cd "$(dirname "$0")/.."
cache="${BEV_DISTILLERY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bev-distillery}"
started=$SECONDS
say() { printf 'setup: %s (%d s)\n' "$1" "$((SECONDS - started))"; }

if [ -z "${PYTHON:-}" ]; then
    echo "setup: no python3 found: install Python 3.11 or 3.12 (Debian/Ubuntu: apt-get install python3 python3-venv python3-dev)" >&2
    exit 1
fi
"$PYTHON" - <<'PY'
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 12):
    sys.exit(f"setup: Python {sys.version.split()[0]} found, 3.11 or 3.12 needed: run `make setup PYTHON=/path/to/python3.11`")
PY
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv || {
    echo "setup: no virtual environment could be made (Debian/Ubuntu: apt-get install python3-venv)" >&2
    exit 1
}
python=.venv/bin/python
# -qq: pip would otherwise warn of every folder of a local package index that lacks a package.
pip=("$python" -m pip --disable-pip-version-check -qq install)
# The lock is complete, so pip need not solve anything: --no-deps makes it install just these.
# (It also keeps open3d out, which mmdet3d asks for and does not need.)
"$python" -c "import sys; sys.path.insert(0, 'setup'); import build_mmcv; build_mmcv.require_toolchain()"

say "installing torch"
grep -E '^(torch|numpy|setuptools|wheel|ninja|psutil|packaging|typing_extensions|sympy|mpmath|networkx|Jinja2|MarkupSafe|filelock|fsspec)==' \
    setup/requirements.txt > .venv/first.txt
"${pip[@]}" -r .venv/first.txt # with its dependencies: on a GPU machine torch brings its CUDA packages

say "installing $(wc -l < setup/requirements.txt) locked packages, mmcv beside them"
"${pip[@]}" --no-deps -r setup/requirements.txt &
packages=$!
wheel=$("$python" setup/build_mmcv.py "$cache" | tail -n 1) || { kill "$packages" 2>/dev/null; exit 1; }
wait "$packages"
"${pip[@]}" --no-deps --force-reinstall "$wheel"
"$python" setup/sparse_convolution.py

say "checking the imports and the sparse convolution"
"$python" setup/check.py
[ -d .git ] && [ ! -d .dvc/tmp ] && mkdir -p .dvc/tmp
"$python" -m pipeline track init
say "done"
