#!/usr/bin/env bash
# Tests the chart on a real Kubernetes API server. Every set of values in charts/kandle/ci is installed, upgraded, rolled
# back and uninstalled, hooks included. The namespace enforces the "restricted" Pod Security Standard, and the custom
# resources of KEDA and the Prometheus operator exist. There are no nodes, so nothing runs: a loop replaces the
# controllers and marks the hooks' Jobs and pods as succeeded.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
PATH=$("$root/scripts/tools.sh" helm etcd kube-apiserver):$PATH
export PATH
chart=$root/charts/kandle
work=$(mktemp -d)
pids=()
finish() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  rm -rf "$work"
}
trap finish EXIT

KEDA=github.com/kedacore/keda/v2@v2.18.0
OPERATOR=github.com/prometheus-operator/prometheus-operator@v0.85.0
command -v go >/dev/null || PATH=$PATH:/usr/local/go/bin
source_of() { (cd "$work" && go mod download -json "$1" | sed -n 's/.*"Dir": "\(.*\)",*/\1/p'); }

port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
await() { # await() WHAT COMMAND…
  local what=$1 try
  shift
  for try in $(seq 600); do
    "$@" >/dev/null 2>&1 && return
    read -rt 0.1 <> <(:) || true
  done
  echo "chart-check: timed out waiting for $what" >&2
  tail -n 20 "$work"/*.log >&2
  exit 1
}

etcd_port=$(port) peer_port=$(port) api_port=$(port)
etcd --data-dir "$work/etcd" --listen-client-urls "http://127.0.0.1:$etcd_port" --advertise-client-urls "http://127.0.0.1:$etcd_port" \
  --listen-peer-urls "http://127.0.0.1:$peer_port" --initial-advertise-peer-urls "http://127.0.0.1:$peer_port" \
  --initial-cluster "default=http://127.0.0.1:$peer_port" >"$work/etcd.log" 2>&1 &
pids+=($!)
openssl genrsa -out "$work/sa.key" 2048 2>/dev/null
token=$(openssl rand -hex 16)
echo "$token,admin,admin,system:masters" >"$work/tokens.csv"
kube-apiserver --etcd-servers "http://127.0.0.1:$etcd_port" --bind-address 127.0.0.1 --secure-port "$api_port" --cert-dir "$work/certs" \
  --service-account-issuer https://chart-check --service-account-key-file "$work/sa.key" --service-account-signing-key-file "$work/sa.key" \
  --service-cluster-ip-range 10.0.0.0/24 --token-auth-file "$work/tokens.csv" --authorization-mode RBAC >"$work/apiserver.log" 2>&1 &
pids+=($!)
api=https://127.0.0.1:$api_port
ask() { curl -sSk --fail-with-body -H "Authorization: Bearer $token" "$@"; }
await "the API server" ask "$api/readyz"

cat >"$work/kubeconfig" <<Y
apiVersion: v1
kind: Config
current-context: check
clusters: [{ name: check, cluster: { server: "$api", insecure-skip-tls-verify: true } }]
users: [{ name: check, user: { token: "$token" } }]
contexts: [{ name: check, context: { cluster: check, user: check, namespace: apps } }]
Y
export KUBECONFIG=$work/kubeconfig HELM_CACHE_HOME=$work/helm HELM_CONFIG_HOME=$work/helm HELM_DATA_HOME=$work/helm

post() { ask -o /dev/null -H 'Content-Type: application/yaml' --data-binary @- "$api$1"; }
post /api/v1/namespaces <<'Y'
apiVersion: v1
kind: Namespace
metadata:
  name: apps
  labels:
    pod-security.kubernetes.io/enforce: restricted
    pod-security.kubernetes.io/warn: restricted
Y
# As NVIDIA's operator creates it; the server rejects pods whose runtime class does not exist.
post /apis/node.k8s.io/v1/runtimeclasses <<'Y'
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: { name: nvidia }
handler: nvidia
Y
keda=$(source_of "$KEDA") operator=$(source_of "$OPERATOR")
for crd in "$keda"/config/crd/bases/keda.sh_{scaledobjects,triggerauthentications}.yaml \
  "$operator"/example/prometheus-operator-crd/monitoring.coreos.com_{podmonitors,servicemonitors,prometheusrules}.yaml; do
  post /apis/apiextensions.k8s.io/v1/customresourcedefinitions <"$crd"
done
for served in keda.sh/v1alpha1/namespaces/apps/scaledobjects monitoring.coreos.com/v1/namespaces/apps/prometheusrules; do
  await "$served" ask "$api/apis/$served"
done

fail() { echo "chart-check: $*" >&2; exit 1; }
quiet() { grep -v 'found symbolic link' || true; }
workloads() { ask "$api/apis/apps/v1/namespaces/apps/deployments" "$api/apis/apps/v1/namespaces/apps/statefulsets" "$api/apis/batch/v1/namespaces/apps/cronjobs" "$api/apis/batch/v1/namespaces/apps/jobs"; }
checksum() { workloads | grep -o '"checksum/config": *"[0-9a-f]*"' | head -n 1; }

# Checks the check: the server has to warn about a pod that violates the standard.
helm install loose "$chart" -n apps -f "$chart/ci/run-values.yaml" --set securityContext.allowPrivilegeEscalation=true --no-hooks >"$work/out" 2>&1 || { cat "$work/out" >&2; exit 1; }
grep -q 'would violate PodSecurity' "$work/out" || fail "the API server does not check the security of pods: $(cat "$work/out")"
helm uninstall loose -n apps >/dev/null

# Marks as succeeded what no node runs: the Jobs that pull models, and the pods of `helm test`.
controllers() {
  local now name
  while :; do
    now=$(date -u +%Y-%m-%dT%H:%M:%SZ)
    for name in $(ask "$api/apis/batch/v1/namespaces/apps/jobs" | sed -n 's/^ *"name": "\(.*-pull\)",$/\1/p' | sort -u); do
      ask -o /dev/null -X PATCH -H 'Content-Type: application/merge-patch+json' "$api/apis/batch/v1/namespaces/apps/jobs/$name/status" --data-binary @- <<J || true
{"status": {"startTime": "$now", "completionTime": "$now", "succeeded": 1, "uncountedTerminatedPods": {}, "conditions": [
  {"type": "SuccessCriteriaMet", "status": "True", "lastProbeTime": "$now", "lastTransitionTime": "$now"},
  {"type": "Complete", "status": "True", "lastProbeTime": "$now", "lastTransitionTime": "$now"}]}}
J
    done
    for name in $(ask "$api/api/v1/namespaces/apps/pods" | sed -n 's/^ *"name": "\(.*-check\)",$/\1/p' | sort -u); do
      ask -o /dev/null -X PATCH -H 'Content-Type: application/merge-patch+json' "$api/api/v1/namespaces/apps/pods/$name/status" --data '{"status": {"phase": "Succeeded"}}' || true
    done
    read -rt 0.2 <> <(:) || true
  done
}
controllers 2>/dev/null &
pids+=($!)
# Prints the uid of the claim for models; nothing if there is none or it is being deleted.
claim() { ask "$api/api/v1/namespaces/apps/persistentvolumeclaims" | CLAIM="$name-kandle-models" python3 -c 'import json, os, sys; print(*(i["metadata"]["uid"] for i in json.load(sys.stdin)["items"] if i["metadata"]["name"] == os.environ["CLAIM"] and "deletionTimestamp" not in i["metadata"]))'; }

count=0 claims=0
for values in "$chart"/ci/*-values.yaml; do
  name=$(basename "$values" -values.yaml)
  helm lint --strict "$chart" -f "$values" 2>&1 | quiet >"$work/out" || fail "$name: $(cat "$work/out")"
  helm_() { # helm_() WHAT ARGUMENTS…: fails also on warnings of the API server
    local what=$1
    shift
    helm "$@" -n apps >"$work/out" 2>&1 || fail "$name: $what: $(quiet <"$work/out")"
    grep -E 'would violate|unknown field|deprecated' "$work/out" && fail "$name: $what"
    true
  }
  helm_ install install "$name" "$chart" -f "$values"
  first=$(checksum) models=$(claim)
  helm_ upgrade upgrade "$name" "$chart" -f "$values" --set config.window.max_records=7
  [ "$(checksum)" != "$first" ] || fail "$name: the configuration changed, but the pods did not"
  helm_ rollback rollback "$name" 1
  helm_ test test "$name"
  checksums=$(checksum)
  # A Job with changed settings has another name: after the rollback the first one has to be back.
  [ "$checksums" = "$first" ] || fail "$name: the pods after the rollback differ from the first ones"
  # Validates the hooks' objects on the server too, as a dry run.
  helm get hooks "$name" -n apps 2>/dev/null >"$work/hooks.yaml"
  python3 - "$work" <<'PY'
import pathlib, re, sys
work = pathlib.Path(sys.argv[1])
for old in work.glob("hook-*"):
    old.unlink()
paths = {"Pod": "/api/v1/namespaces/apps/pods", "Job": "/apis/batch/v1/namespaces/apps/jobs", "ConfigMap": "/api/v1/namespaces/apps/configmaps", "PersistentVolumeClaim": "/api/v1/namespaces/apps/persistentvolumeclaims"}
for i, text in enumerate(re.split(r"^---$", (work / "hooks.yaml").read_text(), flags=re.M)):
    kind = re.search(r"^kind: (\w+)$", text, flags=re.M)
    if kind:
        # Another name, because objects with the original names exist.
        (work / f"hook-{i}").write_text(re.sub(r"^(  name: .*)$", r"\1-dry", text, count=1, flags=re.M))
        (work / f"hook-{i}.path").write_text(paths[kind[1]])
PY
  for hook in "$work"/hook-*.path; do
    ask -D "$work/headers" -o "$work/out" -H 'Content-Type: application/yaml' --data-binary @"${hook%.path}" "$api$(cat "$hook")?dryRun=All&fieldValidation=Strict" \
      || fail "$name: $(cat "$work/out")"
    grep -i 'would violate' "$work/headers" && fail "$name: $(cat "${hook%.path}")"
  done
  helm_ uninstall uninstall "$name"
  [ -z "$(checksum)" ] || fail "$name: workloads are left after uninstalling"
  if [ -n "$models" ]; then
    helm_ "install again" install "$name" "$chart" -f "$values"
    # A claim made by a hook and a claim of the release: switching between the two has to keep it.
    helm_ "no pull" upgrade "$name" "$chart" -f "$values" --set modelCache.pullJob=false
    helm_ "pull" upgrade "$name" "$chart" -f "$values" --set modelCache.pullJob=true
    helm_ uninstall uninstall "$name"
    [ "$(claim)" = "$models" ] || fail "$name: the claim for models was replaced"
    claims=$((claims + 1))
    echo "chart-check: $name: the claim for models survived upgrades and reinstalls"
  fi
  echo "chart-check: $name: installed, upgraded, rolled back, uninstalled"
  count=$((count + 1))
done
[ "$claims" -gt 0 ] || fail "no claim for models was tested"
echo "chart-check: $count sets of values passed on $(ask "$api/version" | sed -n 's/.*"gitVersion": "\(.*\)",/\1/p')"
