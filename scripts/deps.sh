#!/usr/bin/env bash
# Keeps the dependencies few, used and licensed as they should be. The tools are installed into
# .cache/tools once. The advisory database is fetched from its own repository, where that can be
# reached; where it cannot, that is said and the other checks still count.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
tools=$root/.cache/tools
for tool in cargo-deny cargo-machete; do
  [ -x "$tools/bin/$tool" ] || cargo install --quiet --locked --root "$tools" "$tool"
done
"$tools/bin/cargo-machete" .
"$tools/bin/cargo-deny" --features cuda,metal check licenses bans sources
if ! "$tools/bin/cargo-deny" --features cuda,metal check advisories 2>.cache/advisories.log; then
  if grep -qiE 'failed to (fetch|clone)|unable to (fetch|clone)|could not resolve|failed to update' .cache/advisories.log; then
    echo "deps: the advisory database cannot be reached here: advisories were not checked"
  else
    cat .cache/advisories.log >&2
    exit 1
  fi
fi
