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

need() {
  command -v "$1" >/dev/null && return
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "registry.sh: installing $2" >&2
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$2"; } >&2
  else
    echo "registry.sh: $1 is missing; type: sudo apt-get install -y $2" >&2
    exit 1
  fi
}

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

stop() {
  kill -9 $registry 2>/dev/null || true
  wait $registry 2>/dev/null || true
}

run() {
  local dir=$1 port=$2
  need java default-jre-headless
  mkdir -p "$dir"
  QUARKUS_HTTP_HOST=127.0.0.1 QUARKUS_HTTP_PORT=$port \
    java -Xmx300m -XX:+UseSerialGC -jar "$home"/*runner*.jar >>"$dir/registry.log" 2>&1 </dev/null &
  registry=$!
  echo $registry > "$dir/pid"
  trap stop EXIT
  # Ends when the other end of standard input is closed, or the registry dies.
  while kill -0 $registry 2>/dev/null; do
    if read -r -t 1; then continue; elif [ $? -le 128 ]; then break; fi
  done
}

case ${1:-} in
  fetch) fetch ;;
  run) run "$2" "$3" ;;
  *) sed -n '2,6p' "$0"; exit 2 ;;
esac
