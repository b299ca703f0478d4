#!/bin/sh
# Make .venv and install this package (editable) with its tools: `make setup` calls it. Usage: tools/setup.sh [PYTHON [CONSTRAINTS]]
# A .venv that works is kept and completed; one that does not is made anew. No environment has to be active.
# CONSTRAINTS, a file such as tools/oldest.txt, holds versions to keep to.
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3} constraints=${2:-} py=.venv/bin/python log=.venv/setup.log
unset VIRTUAL_ENV PYTHONHOME PYTHONPATH 2>/dev/null || true
rm -f .venv/.done

say() { printf 'setup: %s\n' "$*"; }
die() { say "$*" >&2; exit 1; }
[ -z "$constraints" ] || [ -f "$constraints" ] || die "there is no file $constraints"

make_venv() {
    command -v "$python" >/dev/null || die "there is no $python here: install Python (Debian: apt install python3 python3-venv) or name one, as in: make PYTHON=python3.12"
    least=$(sed -n 's/^min_python *= *//p' settings.ini)
    "$python" -c "import sys; sys.exit(sys.version_info[:2] < tuple(map(int, '$least'.split('.'))))" ||
        die "Python $least or newer is needed and $python is $("$python" --version 2>&1): name a newer one, as in: make PYTHON=python3.12"
    "$python" -c 'import venv, ensurepip' 2>/dev/null || die "this Python cannot make virtual environments: apt install python3-venv"
    say "making .venv with $("$python" --version 2>&1)"
    rm -rf .venv
    "$python" -m venv .venv || { rm -rf .venv; die "could not make .venv (see above)"; }
}

# --reinstall-package: uv would not notice a change in settings.ini by itself
uv_install() { "$py" -m uv pip install -q --python "$py" --reinstall-package libragrad_nb ${constraints:+-c "$constraints"} "$@" -e '.[dev]' 2>>"$log"; }

install() {
    : >"$log"
    say "upgrading pip, getting uv"
    "$py" -m pip install -q -U pip || say "pip stays as it is"
    if "$py" -m pip install -q 'uv>=0.7'; then
        say "installing the package and its tools (the first time: minutes, and gigabytes for PyTorch)"
        uv_install --torch-backend=auto && return
        say "that failed, as it does where PyTorch's own index is out of reach: trying without it"
        uv_install && return
    fi
    say "uv did not manage: installing with pip"
    "$py" -m pip install -q ${constraints:+-c "$constraints"} -e '.[dev]' || die "the installation failed (see above; what uv said is in $log)"
}

works() { "$py" -c 'import timm, nbdev' 2>>"$log"; }  # timm imports torch and torchvision, which must fit each other

if "$py" -m pip --version >/dev/null 2>&1; then new=; else make_venv; new=1; fi
install
if ! works && [ -z "$new" ]; then
    say "the packages in .venv do not work together: starting over"
    make_venv; install
fi
works || die "installed, but importing timm or nbdev fails (see $log)"
say "done"
