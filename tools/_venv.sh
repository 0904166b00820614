# Sourced by the other scripts: make .venv once, install the package and the extras in $1, again only when
# pyproject.toml or the constraints have changed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
extras=${1:-}
python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
want="$(cat pyproject.toml tools/constraints.txt | cksum) $extras"
stamp=.venv/installed${extras:+-$extras}
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
  # Both in one call: a constraint would not reach the dependencies of a package installed later.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -c tools/constraints.txt -r <(grep '^torch' tools/constraints.txt) -e ".${extras:+[$extras]}"
  echo "$want" > "$stamp"
fi
export PATH="$root/.venv/bin:$PATH"
