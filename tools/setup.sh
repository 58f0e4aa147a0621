#!/usr/bin/env bash
# Makes .venv, or brings it up to date. Called by `make setup` and `make setup-dev`.
#
#   tools/setup.sh runtime   what the mesh needs
#   tools/setup.sh dev       that, and what checks and tests need
#
# uv does the installing because it takes seconds where pip takes more than a minute;
# it is itself installed by pip, by hash, into .venv. Where uv cannot run, pip takes over.
# A stamp in .venv holds a hash of all that the result depends on: nothing is done twice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Two at once would undo each other's work; the second waits, then finds nothing to do.
if command -v flock >/dev/null; then
    exec 9<"tools/setup.sh"
    flock 9
fi

readonly wanted=${1:?runtime or dev}
readonly root=$PWD venv=$PWD/.venv
readonly python=$venv/bin/python
readonly interpreter=${PYTHON:-python3}

fail() {
    printf 'make setup: %s\n' "$*" >&2
    exit 1
}

# What a finished .venv depends on. The path is part of it because scripts in .venv
# name it: a checkout that was moved is set up anew.
fingerprint() {
    { printf '%s\n' "$root"; cat "$@" tools/setup.sh pyproject.toml requirements-uv.lock; } |
        sha256sum | cut -d' ' -f1
}

runtime_stamp=$(fingerprint requirements.lock)
dev_stamp=$(fingerprint requirements.lock requirements-dev.lock)
installed=$(cat "$venv/.installed" 2>/dev/null || true)

if [[ -x $python ]]; then
    # The dev lock holds all of the runtime lock.
    case "$wanted $installed" in
    "runtime runtime $runtime_stamp" | *" dev $dev_stamp") exit 0 ;;
    esac
fi

check_interpreter() {
    command -v "$interpreter" >/dev/null ||
        fail "there is no $interpreter. Python 3.11 or newer is needed (Debian: apt install python3)."
    "$interpreter" - <<'PY' || exit 1
import sys

if sys.version_info < (3, 11):
    sys.exit(
        f"make setup: {sys.executable} is Python {sys.version.split()[0]}; 3.11 or newer is needed."
        " Name another with `make setup PYTHON=python3.11`."
    )
PY
}

# Debian keeps ensurepip in a package of its own (python3-venv). Without it, the
# system's pip can fill an environment that has no pip.
make_venv() {
    rm -rf "$venv"
    if "$interpreter" -c 'import ensurepip, venv' 2>/dev/null && "$interpreter" -m venv "$venv"; then
        return
    elif "$interpreter" -c 'import pip, venv' 2>/dev/null; then
        "$interpreter" -m venv --clear --without-pip "$venv"
    else
        fail "$interpreter can make no virtual environment. Debian: apt install python3-venv (or python3-pip)."
    fi
}

# The environment's own pip, or the system's working on it.
pip() {
    if "$python" -c 'import pip' 2>/dev/null; then
        "$python" -m pip --disable-pip-version-check "$@"
    else
        "$interpreter" -m pip --disable-pip-version-check --python "$python" "$@"
    fi
}

pip_install() {
    pip install --quiet --no-input "$@"
}

install_uv() {
    "$venv/bin/uv" --version >/dev/null 2>&1 &&
        [[ $(cat "$venv/.uv" 2>/dev/null) == "$(sha256sum <requirements-uv.lock)" ]] && return
    pip_install --require-hashes --no-deps -r requirements-uv.lock || return
    "$venv/bin/uv" --version >/dev/null || return
    sha256sum <requirements-uv.lock >"$venv/.uv"
}

install_lock() {
    local lock=$1
    if install_uv && uv_install "$lock"; then
        return
    fi
    echo 'make setup: uv could not do it; pip does the same in a minute or two.' >&2
    pip_install --require-hashes -r "$lock"
    pip_install --no-deps --no-build-isolation --editable .
}

uv_install() {
    local lock=$1
    local -a uv=("$venv/bin/uv" --quiet)
    # uv reads neither the system's certificates nor pip's configuration unless it is told to;
    # behind a company's proxy or mirror pip would work and uv would not.
    [[ -e ${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt} ]] && uv+=(--system-certs)
    local index=${PIP_INDEX_URL:-$(pip config get global.index-url 2>/dev/null || true)}
    [[ -z $index ]] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}
    # Without a home to keep a cache in, do without the cache.
    mkdir -p "$(uv_cache)" 2>/dev/null || export UV_NO_CACHE=1
    export UV_LINK_MODE=${UV_LINK_MODE:-$(link_mode)}
    if [[ $wanted == runtime && $installed == dev* ]]; then
        # An environment that a developer filled keeps its tools when only the mesh is asked for.
        "${uv[@]}" pip install --python "$python" --require-hashes -r "$lock" || return
    else
        "${uv[@]}" pip sync --python "$python" --require-hashes "$lock" || return
    fi
    "${uv[@]}" pip install --python "$python" --no-deps --no-build-isolation --editable .
}

uv_cache() {
    echo "${UV_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/uv}"
}

# uv links from its cache where it can; across file systems it copies, and says so at length.
link_mode() {
    if [[ $(stat -c %d "$(uv_cache)" 2>/dev/null) == "$(stat -c %d "$venv")" ]]; then
        echo hardlink
    else
        echo copy
    fi
}

# An interrupted or moved environment is not repaired but made again.
if [[ ! -x $python || $installed == "" ]] || ! "$python" -c '' 2>/dev/null ||
    [[ $(cat "$venv/.root" 2>/dev/null) != "$root" ]]; then
    check_interpreter
    echo "Making .venv with $("$interpreter" --version)" >&2
    make_venv
    installed=
fi
rm -f "$venv/.installed"
if [[ $wanted == dev ]]; then
    echo 'Installing requirements-dev.lock' >&2
    install_lock requirements-dev.lock
    printf 'dev %s\n' "$dev_stamp" >"$venv/.installed"
else
    echo 'Installing requirements.lock' >&2
    install_lock requirements.lock
    printf 'runtime %s\n' "$runtime_stamp" >"$venv/.installed"
fi
printf '%s\n' "$root" >"$venv/.root"
