#!/usr/bin/env bash
# Checks that dependencies are used, allowed and properly licensed, and have no advisories. Installs the tools into
# .cache/tools once. If the advisory database cannot be reached, only the other checks run, with a message.
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
    echo "deps: the advisory database cannot be reached: advisories were not checked"
  else
    cat .cache/advisories.log >&2
    exit 1
  fi
fi
