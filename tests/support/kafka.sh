#!/usr/bin/env bash
# A real Apache Kafka (KRaft) for tests, on loopback.
#
#   kafka.sh fetch            fetches Kafka's published jars into .cache/kafka
#   kafka.sh run DIR PORT     runs a broker with its data in DIR on PORT, and PORT+1 for its
#                             controller, until standard input closes: a broker never outlives
#                             the test that holds the other end. Its process id is in DIR/pid
#   kafka.sh tool CLASS …     runs one of Kafka's tools, such as org.apache.kafka.tools.AclCommand
#
# CREATE_TOPICS=true: topics are created on first use, which is the broker's default.
# TOOL_HEAP=512m: a tool may use more memory than 128 MiB.
# FILE_KIB=20000: no file may grow larger, which the broker takes for a full disk.
# PROPERTIES: more lines of server.properties, which win over those below. FORMAT_ARGUMENTS: one argument of Kafka's
# StorageTool on each line. JAVA_OPTIONS: the broker's own.
# REMOVE=true: DIR is removed when the broker has ended, and the folder that holds it if that is then empty.
# One of several brokers: NODE=2 VOTERS=1@127.0.0.1:9093,2@… REPLICAS=3, each with a DIR of its own.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
libs=${KANDLE_KAFKA_LIBS:-$here/../../.cache/kafka/4.1.0}

# shellcheck source=tests/support/service.sh
. "$here/service.sh"

fetch() {
  [ -e "$libs/.complete" ] && return
  need java default-jre-headless
  need mvn maven
  mkdir -p "$libs"
  mvn -q -B -f "$here/pom.xml" dependency:copy-dependencies -DoutputDirectory="$libs" >&2
  touch "$libs/.complete"
}

stop() {
  end $broker
  if [ "${REMOVE:-}" = true ]; then
    rm -rf "$dir"
    rmdir --ignore-fail-on-non-empty "$(dirname "$dir")"
  fi
}

run() {
  dir=$1
  local port=$2 replicas=${REPLICAS:-1}
  local in_sync=$((replicas > 1 ? replicas - 1 : 1))
  need java default-jre-headless
  mkdir -p "$dir"
  cat > "$dir/server.properties" <<EOF
process.roles=broker,controller
node.id=${NODE:-1}
controller.quorum.voters=${VOTERS:-1@127.0.0.1:$((port + 1))}
listeners=PLAINTEXT://127.0.0.1:$port,CONTROLLER://127.0.0.1:$((port + 1))
advertised.listeners=PLAINTEXT://127.0.0.1:$port
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs=$dir/data
default.replication.factor=$replicas
min.insync.replicas=$in_sync
offsets.topic.replication.factor=$replicas
transaction.state.log.replication.factor=$replicas
transaction.state.log.min.isr=$in_sync
share.coordinator.state.topic.replication.factor=$replicas
share.coordinator.state.topic.min.isr=$in_sync
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
# Short sessions of the new group protocol: a coordinator that has just started grants every member another one.
group.consumer.min.session.timeout.ms=6000
group.consumer.session.timeout.ms=6000
group.consumer.min.heartbeat.interval.ms=1000
group.consumer.heartbeat.interval.ms=1000
offsets.topic.num.partitions=4
transaction.state.log.num.partitions=4
group.initial.rebalance.delay.ms=0
auto.create.topics.enable=${CREATE_TOPICS:-false}
message.max.bytes=20000000
# Tests produce records with old timestamps, which retention would delete: 30 s after the start, then every 5 minutes.
log.retention.ms=-1
EOF
  # For a single broker: several would wait for each other's ACLs before they let each other connect.
  [ "$replicas" -gt 1 ] || cat >> "$dir/server.properties" <<EOF
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
allow.everyone.if.no.acl.found=true
EOF
  [ -z "${PROPERTIES:-}" ] || printf '%s\n' "$PROPERTIES" >> "$dir/server.properties"
  local format=()
  [ -z "${FORMAT_ARGUMENTS:-}" ] || mapfile -t format <<<"$FORMAT_ARGUMENTS"
  cat > "$dir/log4j2.properties" <<EOF
rootLogger.level=warn
rootLogger.appenderRef.out.ref=out
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d %p %c: %m%n
EOF
  local java=(java -Xmx512m -XX:+UseSerialGC "-Dlog4j2.configurationFile=$dir/log4j2.properties" -cp "$libs/*")
  [ -e "$dir/data/meta.properties" ] || "${java[@]}" kafka.tools.StorageTool format -t kandle-tests-0000000000 -c "$dir/server.properties" "${format[@]}" >"$dir/format.log" 2>&1 </dev/null \
    || { cat "$dir/format.log" >&2; exit 1; }
  [ -z "${FILE_KIB:-}" ] || ulimit -f "$FILE_KIB"
  # shellcheck disable=SC2086 # Several options are several words.
  "${java[@]}" ${JAVA_OPTIONS:-} kafka.Kafka "$dir/server.properties" >>"$dir/server.log" 2>&1 </dev/null &
  broker=$!
  echo $broker > "$dir/pid"
  trap stop EXIT
  hold $broker
}

case ${1:-} in
  fetch) fetch ;;
  run) run "$2" "$3" ;;
  tool) shift; exec java "-Xmx${TOOL_HEAP:-128m}" -cp "$libs/*" "$@" ;;
  *) sed -n '2,16p' "$0"; exit 2 ;;
esac
