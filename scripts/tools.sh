#!/usr/bin/env bash
# Puts external tools into .cache/tools, unless they are on the PATH already, and prints the folder. Installs nothing
# outside of it.
#
#   tools.sh prometheus promtool etcd   from the distribution's packages (apt-get), else built from their sources (Go)
#   tools.sh helm helm-docs             built from their sources (Go)
#   tools.sh kube-apiserver             built from source too; takes minutes
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bin=$root/.cache/tools
mkdir -p "$bin"
export PATH=$bin:$PATH

KUBERNETES=1.34.2

# Extracts the programs of one of the distribution's packages, without installing it.
package() {
  command -v apt-get >/dev/null || return 1
  local work
  work=$(mktemp -d)
  chmod 755 "$work"
  (cd "$work" && { apt-get download -q "$1" || { apt-get update -q && apt-get download -q "$1"; }; } && dpkg -x ./*.deb x && cp x/usr/bin/* "$bin/") >&2
  local result=$?
  rm -rf "$work"
  return $result
}

with_go() {
  command -v go >/dev/null || PATH=$PATH:/usr/local/go/bin
  command -v go >/dev/null || { echo "tools: Go is needed to build $1; install it from https://go.dev/dl" >&2; exit 1; }
}

api_server() {
  with_go kube-apiserver
  local work
  work=$(mktemp -d)
  cat > "$work/main.go" <<'GO'
package main

import (
	"os"

	"k8s.io/component-base/cli"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
)

func main() { os.Exit(cli.Run(app.NewAPIServerCommand())) }
GO
  (
    cd "$work"
    # k8s.io/kubernetes replaces its staging modules by folders of its repository; use their published versions instead.
    mod=$(go mod download -json "k8s.io/kubernetes@v$KUBERNETES" | sed -n 's/.*"GoMod": "\(.*\)",*/\1/p')
    {
      printf 'module apiserver\n\ngo 1.24\n\nrequire k8s.io/kubernetes v%s\n\n' "$KUBERNETES"
      sed -n "s|^\s*\(k8s.io/[a-z-]*\) => ./staging.*|replace \1 => \1 v0.${KUBERNETES#1.}|p" "$mod"
    } > go.mod
    go mod tidy >&2
    # Sets the version that the server reports, which charts check.
    version=k8s.io/component-base/version
    go build -ldflags "-X $version.gitVersion=v$KUBERNETES" -o "$bin/kube-apiserver" .
  )
  rm -rf "$work"
}

for tool in "$@"; do
  command -v "$tool" >/dev/null && continue
  echo "tools: getting $tool" >&2
  case $tool in
    # If built from source, Prometheus comes without its web UI, which nothing here needs.
    prometheus | promtool) package prometheus || { with_go "$tool"; GOBIN=$bin go install "github.com/prometheus/prometheus/cmd/$tool@v0.307.3" >&2; } ;;
    etcd) package etcd-server || { with_go etcd; GOBIN=$bin go install go.etcd.io/etcd/server/v3@v3.6.5 >&2 && mv "$bin/server" "$bin/etcd"; } ;;
    helm) with_go helm; GOBIN=$bin go install helm.sh/helm/v3/cmd/helm@v3.22.0 >&2 ;;
    helm-docs) with_go helm-docs; GOBIN=$bin go install github.com/norwoodj/helm-docs/cmd/helm-docs@v1.14.2 >&2 ;;
    kube-apiserver) api_server ;;
    *) echo "tools: unknown tool $tool" >&2; exit 1 ;;
  esac
done
echo "$bin"
