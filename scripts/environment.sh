# Sourced by test.sh and quickstart.sh: goes to the repository root, makes .venv with everything
# of constraints.txt (three frameworks), and sets the environment that both want.
#
#   PYTHON=python3.11   which Python makes .venv; it must be 3.10, 3.11 or 3.12 with pip and venv
#
# Does nothing when .venv already holds what constraints.txt and setup.py ask for.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
ROOT=$PWD
PY=$ROOT/.venv/bin/python
STAMP=$ROOT/.venv/.unillava-installed

# One process at a time works on small tensors: more threads only get in each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export MKL_NUM_THREADS=${MKL_NUM_THREADS:-$OMP_NUM_THREADS}
export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-$OMP_NUM_THREADS}
export TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1
unset UNILLAVA_BACKEND UNILLAVA_KERNELS GLOG_v

# The first Python among $PYTHON, python3 and the versioned names for which all wheels exist.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python 3.10, 3.11 or 3.12 found (MindSpore has wheels for these)" >&2
    echo "  what to do: install one, or name it: PYTHON=/path/to/python bash scripts/..." >&2
    return 1
}

# What an installation depends on: these files, and where the tree lies (it is editable).
fingerprint() {
    { cat constraints.txt setup.py; echo "$ROOT"; } | cksum
}

set_up() {
    local wanted python
    wanted=$(fingerprint) || return 1
    if [ "$(cat "$STAMP" 2>/dev/null)" = "$wanted" ] && "$PY" -c '' 2>/dev/null; then
        return 0
    fi
    if ! "$PY" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) || return 1
        echo "== making .venv with $("$python" --version 2>&1)"
        if ! "$python" -m venv "$ROOT/.venv"; then
            echo "  what to do: install Python's venv module (Debian, Ubuntu: python3-venv)" >&2
            return 1
        fi
    fi
    echo "== installing into .venv (three frameworks: some minutes and gigabytes at first)"
    PYTHONWARNINGS=ignore "$PY" -m pip install --disable-pip-version-check --progress-bar off --quiet \
        -c constraints.txt -e '.[all,dev]' || return 1
    echo "$wanted" >"$STAMP"
    echo "== installed"
}
