#!/usr/bin/env bash
# A real schema registry (Apicurio, in memory) for tests, on loopback.
#
#   registry.sh fetch            fetches the published program into .cache/registry
#   registry.sh run DIR PORT     runs a registry on PORT until standard input closes: it never outlives the test that
#                                holds the other end. Its log and its process id are in DIR
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
version=2.6.13.Final
home=${KANDLE_REGISTRY_HOME:-$here/../../.cache/registry/$version}

# shellcheck source=tests/support/service.sh
. "$here/service.sh"

fetch() {
  [ -e "$home/.complete" ] && return
  need java default-jre-headless
  need mvn maven
  mkdir -p "$home"
  # One test process fetches, the others wait for it.
  exec 8>"$home/.lock"
  flock 8
  [ -e "$home/.complete" ] && return
  mvn -q -B dependency:copy "-Dartifact=io.apicurio:apicurio-registry-app:$version:tar.gz:all" \
    -DoutputDirectory="$home" >&2
  tar xzf "$home"/apicurio-registry-app-*.tar.gz -C "$home"
  rm "$home"/apicurio-registry-app-*.tar.gz
  touch "$home/.complete"
}

run() {
  local dir=$1 port=$2
  need java default-jre-headless
  mkdir -p "$dir"
  QUARKUS_HTTP_HOST=127.0.0.1 QUARKUS_HTTP_PORT=$port \
    java -Xmx300m -XX:+UseSerialGC -jar "$home"/*runner*.jar >>"$dir/registry.log" 2>&1 </dev/null &
  registry=$!
  echo $registry > "$dir/pid"
  trap 'end $registry' EXIT
  hold $registry
}

case ${1:-} in
  fetch) fetch ;;
  run) run "$2" "$3" ;;
  *) sed -n '2,6p' "$0"; exit 2 ;;
esac
