#!/usr/bin/env bash
# Builds the documentation as web pages. Needs MkDocs, from the Python in the PATH or that of .venv; where
# it is missing, installs it into .venv.
#
#   scripts/docs.sh                  into site/
#   scripts/docs.sh DIR
#
# The pages open from the folder; their search needs a server: python3 -m http.server -d site
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
out=$(realpath -m "${1:-site}")
has_mkdocs() { "$1" -c 'import material, mkdocs, mkdocstrings_handlers.python' > /dev/null 2>&1; }
for python in python3 .venv/bin/python ''; do
  if [ -n "$python" ] && has_mkdocs "$python"; then break; fi
done
if [ -z "$python" ]; then
  scripts/setup.sh
  python=.venv/bin/python
  "$python" -m pip install -qq --editable '.[docs]'
fi
# Not --quiet, which would hide the warnings from --strict too. The variable hides the theme's advertisement.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
NO_MKDOCS_2_WARNING=1 "$python" -m mkdocs build --strict --site-dir "$out" > "$log" 2>&1 || {
  cat "$log" >&2
  exit 1
}
echo "$out/index.html"
