#!/bin/sh
# Installs c2al and what it needs into a Python environment.
#   scripts/install.sh PYTHON cpu|cuda [base|dev]
# PYTHON is the interpreter of that environment. The Makefile and both Docker images call this.
set -eu
python=$1
device=$2
requirements=${3:-base}
cd "$(dirname "$0")/.."
pip="$python -m pip --disable-pip-version-check"
# pip's find-links notices on mirrors without an index page are noise, not errors.
$pip install --quiet -r "requirements/$requirements.txt"
$pip install --quiet --no-deps -r "requirements/torchrec-$device.txt"
$pip install --quiet --no-deps --no-build-isolation -e .
"$python" -c 'import torch, fbgemm_gpu, torchrec; print(f"torch {torch.__version__}, torchrec {torchrec.__version__}")'
