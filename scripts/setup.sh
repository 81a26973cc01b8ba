#!/usr/bin/env bash
# Installs what a build and the tests need besides Rust, if that is possible without asking (root, apt-get); otherwise
# prints the command to run.
#
#   setup.sh build      C and C++ compilers, make, perl (librdkafka and OpenSSL are built from source)
#   setup.sh test       the same, plus Java and Maven (for a real Kafka and a real schema registry), Node.js (for a real identity
#                       provider), openssl, their packages and Prometheus
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

if ! command -v cargo >/dev/null; then
  echo "setup: Rust is missing; install it with rustup: https://rustup.rs" >&2
  exit 1
fi

packages=()
want() { command -v "$1" >/dev/null || packages+=("$2"); }
want cc build-essential
want c++ build-essential
want make build-essential
want perl perl
if [ "${1:-build}" = test ]; then
  want java default-jre-headless
  want mvn maven
  want python3 python3
  want openssl openssl
  want node nodejs
  want npm npm
fi

if [ ${#packages[@]} -gt 0 ]; then
  mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sort -u)
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "setup: installing ${packages[*]}"
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${packages[@]}"
  else
    echo "setup: packages are missing; run: sudo apt-get install -y ${packages[*]}" >&2
    exit 1
  fi
fi

if [ "${1:-build}" = test ]; then
  "$here/../tests/support/kafka.sh" fetch
  "$here/../tests/support/registry.sh" fetch
  "$here/tools.sh" prometheus promtool >/dev/null
fi
exit 0
