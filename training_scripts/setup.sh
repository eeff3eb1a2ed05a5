#!/usr/bin/env bash
# Make .venv with everything the given extras need; does nothing when that was done before.
#   usage   bash training_scripts/setup.sh [extra ...]      extras of pyproject.toml: train embed aug demo flash test
#   PYTHON  the interpreter the environment is made from (default python3, 3.10 or newer)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $python is older than 3.10. Fix: set PYTHON to a newer interpreter" >&2
    exit 2
}
extras=$(printf '%s\n' "$@" | sort -u | paste -sd, -)
stamp=.venv/.installed # line 1: what it was made from; then the extras that are in
want=$(cat pyproject.toml constraints.txt <(echo "$PWD") | cksum)
if [[ -f $stamp && "$(head -n 1 $stamp)" == "$want" ]]; then
    installed=$(tail -n +2 $stamp)
    if [[ -z "$(comm -23 <(tr , '\n' <<<"$extras") <(sort -u <<<"$installed"))" ]]; then exit 0; fi
    extras=$(printf '%s\n%s\n' "$installed" "$(tr , '\n' <<<"$extras")" | sed '/^$/d' | sort -u | paste -sd, -)
fi
echo "installing into .venv (once; two to five minutes)"
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
# torch first: a later package must not choose another build of it
.venv/bin/python -m pip install -qq torch -c constraints.txt
.venv/bin/python -m pip install -qq -e ".${extras:+[$extras]}" -c constraints.txt
{ echo "$want"; tr , '\n' <<<"$extras"; } >$stamp.tmp
mv $stamp.tmp $stamp
