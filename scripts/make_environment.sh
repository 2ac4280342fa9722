#!/bin/sh
# Makes a virtual environment in the folder $1 and installs this project into it, with the versions that were tested.
# Further arguments go to pip. PYTHON names the Python to use; default: the first of the usual names that is new enough.
set -eu
folder=$1
shift
log=$folder/install.log
oldest='import sys; sys.exit(sys.version_info < (3, 11))'

say() { printf '%s\n' "$*" >&2; }

usable() { command -v "$1" >/dev/null 2>&1 && "$1" -c "$oldest" >/dev/null 2>&1; }

# A Python without `venv` or `ensurepip` (Debian ships them apart) is passed over if another has them.
make_venv() {
    tried=
    for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        usable "$python" || continue
        tried="$tried $python"
        rm -rf "$folder"
        if message=$("$python" -m venv "$folder" 2>&1); then
            say "Python: $("$folder/bin/python" --version) ($(command -v "$python"))"
            return 0
        fi
        rm -rf "$folder"
    done
    if [ -z "$tried" ]; then
        say "error: expected Python 3.11 or newer${PYTHON:+ as $PYTHON}, found $(python3 --version 2>&1 || echo none)"
        say "next: install it (Debian, Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3.12"
    else
        say "$message"
        say "error: these Pythons cannot make a virtual environment:$tried"
        say "next: Debian, Ubuntu: apt install python3-venv"
    fi
    return 1
}

install() {
    say "Installing into $folder (several minutes the first time; log: $log)"
    if ! "$folder/bin/pip" install --disable-pip-version-check --progress-bar off "$@" \
        -c constraints.txt -e '.[dev]' >"$log" 2>&1; then
        say "error: pip could not install; the end of $log:"
        tail -n 15 "$log" >&2
        say "next: check the network and the disk (4 GB are needed), then run make again"
        return 1
    fi
}

[ -x "$folder/bin/python" ] && "$folder/bin/python" -c "$oldest" 2>/dev/null || make_venv
install "$@"
