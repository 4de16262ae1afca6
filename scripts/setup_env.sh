#!/usr/bin/env bash
# Make .venv and install megatron_ds into it, once. Sourced by quickstart.sh, test.sh and .ci/run; also runs on its own.
#
#   PYTHON=python3.12    interpreter to build on (default: the first of python3, python3.13 ... that is new enough)
#   VENV=DIR             where the environment lives (default: .venv)
#   TORCH='torch==2.11.0'  this torch, instead of the one pinned in constraints.txt
#   USE_ACTIVE_ENV=1     install nothing: use the Python that is first on PATH (containers, conda)
#
# On a machine with a GPU nothing is pinned, and a torch that the base interpreter already has is used as it is.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
CPU_WHEELS="https://download.pytorch.org/whl/cpu"

setup_say() { printf '[setup] %s\n' "$*"; }

setup_fail() {
    printf 'setup: %s\n    %-9s %s\n    %-9s %s\n    %-9s %s\n' "$1" found: "$2" expected: "$3" fix: "$4" >&2
    exit 2
}

# A Python that is new enough and can make virtual environments.
setup_find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            PYTHON="$(command -v "$candidate")"
            "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || setup_fail "$PYTHON" \
                "a Python without the venv module" "venv and ensurepip (Debian and Ubuntu ship them apart)" \
                "apt install python3-venv, or PYTHON=/path/to/another/python3"
            return
        fi
    done
    setup_fail "Python" "$(python3 --version 2>&1 || true)" "Python 3.10 or newer on PATH" \
        "install one (python.org, apt, brew, uv), or PYTHON=/path/to/python3"
}

setup_has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

# Changes whenever an install could come out differently.
setup_fingerprint() {
    "$PYTHON" - "$ROOT/pyproject.toml" "$ROOT/constraints.txt" "${TORCH:-}" "$1" "$ROOT" <<'PY'
import hashlib, pathlib, sys
parts = [pathlib.Path(name).read_bytes() for name in sys.argv[1:3]]
parts += [word.encode() for word in (*sys.argv[3:], sys.version)]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PY
}

# On Linux, PyPI's torch brings gigabytes of CUDA along; without a GPU the CPU wheels do. A mirror set up in pip's own
# configuration knows better than we do and is left alone.
setup_cpu_index() {
    local configured
    [[ "$(uname -s)" == Linux ]] || return 0
    configured="$("$VENV/bin/python" -m pip config list)"
    [[ ! "$configured" =~ index-url|find-links ]] || return 0
    if "$VENV/bin/python" -c "import urllib.request as u; u.urlopen('$CPU_WHEELS/torch/', timeout=10)" 2>/dev/null; then
        echo "--extra-index-url=$CPU_WHEELS"
    fi
}

# Lines worth seeing of pip's long tale: what is being downloaded and how much of it there is.
setup_show_downloads() {
    local line
    while IFS= read -r line; do
        [[ "$line" != *Downloading*[MG]B* ]] || setup_say "  downloading ${line#*Downloading }"
    done
}

setup_install() {
    local hardware="$1" fingerprint="$2" index
    local packages=(-e "${ROOT}[test,dev]") options=(--disable-pip-version-check --progress-bar off)
    if ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
        if [[ "$hardware" == gpu ]] && "$PYTHON" -c 'import torch' 2>/dev/null; then
            setup_say "making $VENV on $PYTHON, with the torch that it already has"
            "$PYTHON" -m venv --system-site-packages "$VENV"
        else
            setup_say "making $VENV on $PYTHON"
            "$PYTHON" -m venv "$VENV"
        fi
    fi
    if [[ -n "${TORCH:-}" ]]; then
        packages+=("$TORCH")
    elif [[ "$hardware" == cpu ]]; then
        options+=(-c "$ROOT/constraints.txt")
        index="$(setup_cpu_index)"
        [[ -z "$index" ]] || options+=("$index")
    fi
    setup_say "installing megatron_ds and what it needs (${TORCH:-torch for $hardware}); minutes the first time"
    # A mirror that lacks some package is not worth a line per package.
    "$VENV/bin/python" -m pip install "${options[@]}" "${packages[@]}" \
        2> >(grep -v 'is ignored: it is neither a file nor a directory' >&2) | setup_show_downloads
    echo "$fingerprint" >"$VENV/.megatron_ds_ready"
}

setup_env() {
    if [[ -n "${USE_ACTIVE_ENV:-}" ]]; then
        setup_say "using $(command -v python) as it is (USE_ACTIVE_ENV)"
        export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
        return
    fi
    local hardware=cpu fingerprint started=$SECONDS
    ! setup_has_gpu || hardware=gpu
    setup_find_python
    fingerprint="$(setup_fingerprint "$hardware")"
    if [[ -x "$VENV/bin/python" && "$(cat "$VENV/.megatron_ds_ready" 2>/dev/null)" == "$fingerprint" ]]; then
        setup_say "$VENV is ready"
    else
        setup_install "$hardware" "$fingerprint"
        setup_say "done in $((SECONDS - started)) s: $("$VENV/bin/python" -c \
            'import sys, torch; print("Python", sys.version.split()[0] + ", torch", torch.__version__)')"
    fi
    export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"
    unset PYTHONHOME
}

setup_env
