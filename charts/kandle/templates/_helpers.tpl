{{- define "kandle.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "kandle.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "kandle.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "kandle.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "kandle.selectorLabels" -}}
app.kubernetes.io/name: {{ include "kandle.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "kandle.labels" -}}
{{ include "kandle.selectorLabels" . }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | trunc 63 | quote }}
app.kubernetes.io/component: {{ .Values.mode }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 }}
{{- with .Values.commonLabels }}
{{ include "kandle.toYaml" . }}
{{- end }}
{{- end }}

{{- define "kandle.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "kandle.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "kandle.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{/* toYaml with whole numbers: Helm parses them as floats and would write 1000000 as 1e+06. */}}
{{- define "kandle.toYaml" -}}
{{- $holder := dict "value" . | deepCopy }}
{{- include "kandle.whole" $holder }}
{{- toYaml $holder.value }}
{{- end }}

{{/* Converts the whole-numbered floats of a dict to integers, in place. */}}
{{- define "kandle.whole" -}}
{{- $dict := . }}
{{- range $name, $value := $dict }}
{{- if kindIs "map" $value }}
{{- include "kandle.whole" $value }}
{{- else if kindIs "slice" $value }}
{{- $items := list }}
{{- range $value }}
{{- $item := dict "value" . }}
{{- include "kandle.whole" $item }}
{{- $items = append $items $item.value }}
{{- end }}
{{- $_ := set $dict $name $items }}
{{- else if and (kindIs "float64" $value) (lt $value 9e15) (eq (floor $value) $value) }}
{{- $_ := set $dict $name (int64 $value) }}
{{- end }}
{{- end }}
{{- end }}

{{/* An integer, or a string such as a percentage. */}}
{{- define "kandle.intOrString" -}}
{{- if kindIs "string" . }}{{ . }}{{ else }}{{ int64 . }}{{ end }}
{{- end }}

{{/* Secrets mounted as files, those of strimzi included, as JSON: [{"secret":…,"mountPath":…}]. */}}
{{- define "kandle.secretFiles" -}}
{{- $files := .Values.secretFiles }}
{{- with .Values.strimzi }}
{{- if .user }}
{{- $ca := required "strimzi.user needs strimzi.cluster: the name of the Kafka cluster, whose CA signs the brokers' certificates" .cluster }}
{{- $files = append $files (dict "secret" .user "mountPath" "/run/secrets/strimzi/user") }}
{{- $files = append $files (dict "secret" (printf "%s-cluster-ca-cert" $ca) "mountPath" "/run/secrets/strimzi/cluster-ca") }}
{{- end }}
{{- end }}
{{- toJson $files }}
{{- end }}

{{/* `config` with the properties that strimzi adds, as JSON. */}}
{{- define "kandle.effectiveConfig" -}}
{{- $config := deepCopy .Values.config }}
{{- with .Values.strimzi }}
{{- if .user }}
{{- $added := dict "ssl.ca.location" "/run/secrets/strimzi/cluster-ca/ca.crt" }}
{{- if eq .authentication "tls" }}
{{- $_ := set $added "security.protocol" "SSL" }}
{{- $_ := set $added "ssl.certificate.location" "/run/secrets/strimzi/user/user.crt" }}
{{- $_ := set $added "ssl.key.location" "/run/secrets/strimzi/user/user.key" }}
{{- else }}
{{- $_ := set $added "security.protocol" "SASL_SSL" }}
{{- $_ := set $added "sasl.mechanism" "SCRAM-SHA-512" }}
{{- $_ := set $added "sasl.username" .user }}
{{- $_ := set $added "sasl.password" "${file:/run/secrets/strimzi/user/password}" }}
{{- end }}
{{- $own := $config.kafka.properties | default dict }}
{{- range $name, $value := $added }}
{{- if hasKey $own $name }}
{{- fail (printf "config.kafka.properties.%s is set by strimzi.user: remove one of them" $name) }}
{{- end }}
{{- end }}
{{- $_ := set $config.kafka "properties" (merge (dict) $added $own) }}
{{- end }}
{{- end }}
{{- toJson $config }}
{{- end }}

{{/* The configuration file. Refuses a property that looks like a secret and is not ${env:…} or ${file:…}. */}}
{{- define "kandle.config" -}}
{{- $config := include "kandle.effectiveConfig" . | fromJson }}
{{- range list "kafka" "input" "output" }}
{{- $section := . }}
{{- range $name, $value := (get $config $section | default dict).properties | default dict }}
{{- if and (ne $name "sasl.oauthbearer.token.endpoint.url") (regexMatch "(?i)(password|passphrase|secret|token|credential|jaas|key\\.pem|sasl\\.oauthbearer\\.config)" $name) (not (regexMatch "\\$\\{(env|file):" (toString $value | replace "$$" ""))) }}
{{- fail (printf "config.%s.properties.%s would be stored in a ConfigMap: refer to it as ${env:NAME} or ${file:/path}, with secretEnv or secretFiles" $section $name) }}
{{- end }}
{{- if or (and (kindIs "float64" $value) (ne (floor $value) $value)) (and (kindIs "float64" $value) (ge $value 9e15)) }}
{{- fail (printf "config.%s.properties.%s: Helm would change the text of this number: quote it" $section $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- range $name, $value := dict "model.token" ($config.model | default dict).token "server.token" ($config.server | default dict).token "registry.password" ($config.registry | default dict).password "registry.token" ($config.registry | default dict).token }}
{{- if and $value (not (regexMatch "\\$\\{(env|file):" ($value | toString | replace "$$" ""))) }}
{{- fail (printf "config.%s would be stored in a ConfigMap: refer to it as ${env:NAME} or ${file:/path}, with secretEnv or secretFiles" $name) }}
{{- end }}
{{- end }}
{{- include "kandle.toYaml" $config }}
{{- end }}

{{/* The port of server.listen. */}}
{{- define "kandle.port" -}}
{{- $listen := (.Values.config.server | default dict).listen | default "0.0.0.0:9464" }}
{{- $port := regexFind "[0-9]+$" $listen }}
{{- if eq $port "0" }}
{{- fail "config.server.listen: port 0 is not possible: probes and scrapes need a fixed port" }}
{{- end }}
{{- $port }}
{{- end }}

{{/* A probe's request to the admin server. */}}
{{- define "kandle.probe" -}}
{ path: {{ .path }}, port: metrics{{ if (.root.Values.config.server | default dict).cert }}, scheme: HTTPS{{ end }} }
{{- end }}

{{/* How Prometheus scrapes: .monitor is the PodMonitor's or ServiceMonitor's values, .key their name. */}}
{{- define "kandle.endpoint" -}}
{{- $server := .root.Values.config.server | default dict }}
port: metrics
interval: {{ .monitor.interval }}
{{- if $server.cert }}
{{- if not .monitor.tlsConfig }}
{{- fail (printf "config.server.cert needs %s.tlsConfig: the CA that Prometheus trusts, such as { ca: { secret: { name: ca, key: ca.crt } }, serverName: kandle }" .key) }}
{{- end }}
scheme: https
tlsConfig: {{- include "kandle.toYaml" .monitor.tlsConfig | nindent 2 }}
{{- end }}
{{- if $server.token }}
{{- if not .monitor.tokenSecret }}
{{- fail (printf "config.server.token needs %s.tokenSecret: the Secret that has the token for Prometheus, such as { name: kandle-admin, key: token }" .key) }}
{{- end }}
authorization: { type: Bearer, credentials: { name: {{ .monitor.tokenSecret.name }}, key: {{ .monitor.tokenSecret.key }} } }
{{- end }}
{{- end }}

{{/* The ports of the brokers: those of config.kafka.brokers and networkPolicy.kafkaPorts. */}}
{{- define "kandle.kafkaPorts" -}}
{{- $ports := list }}
{{- range .Values.networkPolicy.kafkaPorts }}
{{- $ports = append $ports (int64 .) }}
{{- end }}
{{- $brokers := .Values.config.kafka.brokers }}
{{- if regexMatch "\\$\\{(env|file):" ($brokers | replace "$$" "") }}
{{- if not $ports }}
{{- fail "config.kafka.brokers is only known when kandle starts: list the brokers' ports in networkPolicy.kafkaPorts" }}
{{- end }}
{{- else }}
{{- range splitList "," $brokers | compact }}
{{- $ports = append $ports (regexFind "[0-9]+$" (regexFind ":[0-9]+$" (trim .)) | default "9092" | int64) }}
{{- end }}
{{- end }}
{{- range uniq $ports }}
- { port: {{ . }}, protocol: TCP }
{{- end }}
{{- end }}

{{/* The port of otel.endpoint; empty if it is not set. */}}
{{- define "kandle.otelPort" -}}
{{- with (.Values.config.otel | default dict).endpoint }}
{{- if regexMatch "\\$\\{(env|file):" . }}
{{- if not $.Values.networkPolicy.extraEgress }}
{{- fail "config.otel.endpoint is only known when kandle starts: allow it in networkPolicy.extraEgress" }}
{{- end }}
{{- else }}
{{- $url := urlParse . }}
{{- regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) | default (eq $url.scheme "https" | ternary "443" "80") }}
{{- end }}
{{- end }}
{{- end }}

{{/* A field of a KEDA trigger. KEDA can resolve a value that is one environment variable of the pods. */}}
{{- define "kandle.kedaField" -}}
{{- if regexMatch "^\\$\\{env:[^}]+\\}$" .value -}}
{{ .name }}FromEnv: {{ .value | trimPrefix "${env:" | trimSuffix "}" | quote }}
{{- else if regexMatch "\\$\\{(env|file):" (.value | replace "$$" "") }}
{{- fail (printf "keda.trigger kafka cannot read config.%s: %s. Use a plain value or exactly one ${env:NAME}, or keda.trigger prometheus" .key .value) }}
{{- else -}}
{{ .name }}: {{ .value | replace "$$" "$" | quote }}
{{- end }}
{{- end }}

{{/* Annotations of the workload (not of its pods). */}}
{{- define "kandle.workloadAnnotations" -}}
{{- with .Values.workloadAnnotations }}
annotations: {{- include "kandle.toYaml" . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Whole seconds of a duration such as 1m 30s, at least 1. */}}
{{- define "kandle.seconds" -}}
{{- $total := 0 }}
{{- range regexFindAll "[0-9]+ ?(ns|us|ms|s|m|h|d)" . -1 }}
{{- $number := regexFind "^[0-9]+" . | int }}
{{- $unit := regexFind "[a-z]+$" . }}
{{- $factor := dict "ns" 0 "us" 0 "ms" 0 "s" 1 "m" 60 "h" 3600 "d" 86400 }}
{{- $total = add $total (mul $number (get $factor $unit)) }}
{{- end }}
{{- max $total 1 }}
{{- end }}

{{/* Longest time to finish what is in flight: one forward pass, then its window. */}}
{{- define "kandle.grace" -}}
{{- if .Values.terminationGracePeriodSeconds }}
{{- .Values.terminationGracePeriodSeconds | int }}
{{- else }}
{{- $forward := include "kandle.seconds" ((.Values.config.batch | default dict).timeout | default "2m") | int }}
{{- $revoke := include "kandle.seconds" ((.Values.config.delivery | default dict).revoke_timeout | default "30s") | int }}
{{- add $forward $revoke 30 }}
{{- end }}
{{- end }}

{{- define "kandle.args" -}}
{{- if eq .Values.mode "run" -}}
- run
{{- else if eq .Values.mode "drain" -}}
- drain
{{- if .Values.drain.strict }}
- --strict
{{- end }}
{{- else -}}
- replay
{{- with .Values.replay }}
- --id={{ .id | default $.Release.Name }}
{{- if .deadLetters }}
- --dead-letters
{{- end }}
{{- with .from }}
- --from={{ . }}
{{- end }}
{{- with .to }}
- --to={{ . }}
{{- end }}
{{- if .force }}
- --force
{{- end }}
{{- if .strict }}
- --strict
{{- end }}
{{- end }}
{{- end }}
- --config=/etc/kandle/kandle.yaml
{{- with .Values.extraArgs }}
{{ include "kandle.toYaml" . }}
{{- end }}
{{- end }}

{{- define "kandle.env" -}}
# Models and calibration results go to the cache volume: the root filesystem is read-only.
- name: HF_HOME
  value: /var/cache/kandle/huggingface
- name: XDG_CACHE_HOME
  value: /var/cache/kandle
{{- if and (eq .Values.mode "run") (eq .Values.run.workload "StatefulSet") }}
- name: KANDLE__INPUT__PROPERTIES__GROUP_INSTANCE_ID
  valueFrom: { fieldRef: { fieldPath: metadata.name } }
{{- end }}
{{- range .Values.secretEnv }}
- name: {{ .name }}
  valueFrom: { secretKeyRef: { name: {{ .secret }}, key: {{ .key }} } }
{{- end }}
{{- with .Values.extraEnv }}
{{ include "kandle.toYaml" . }}
{{- end }}
{{- end }}

{{- define "kandle.volumes" -}}
- name: config
  configMap: { name: {{ include "kandle.fullname" . }} }
- name: tmp
  emptyDir: { sizeLimit: 64Mi }
{{- if eq .Values.modelCache.type "persistentVolumeClaim" }}
- name: cache
  persistentVolumeClaim: { claimName: {{ include "kandle.fullname" . }}-models }
{{- else if eq .Values.modelCache.type "existingClaim" }}
- name: cache
  persistentVolumeClaim: { claimName: {{ required "modelCache.existingClaim is empty: set the name of the claim" .Values.modelCache.existingClaim }} }
{{- else if eq .Values.modelCache.type "emptyDir" }}
- name: cache
  emptyDir: { sizeLimit: {{ .Values.modelCache.size }} }
{{- else }}
- name: cache
  emptyDir: { sizeLimit: 64Mi }
{{- end }}
{{- range $i, $file := include "kandle.secretFiles" . | fromJsonArray }}
- name: secret-{{ $i }}
  secret: { secretName: {{ $file.secret }} }
{{- end }}
{{- with .Values.extraVolumes }}
{{ include "kandle.toYaml" . }}
{{- end }}
{{- end }}

{{- define "kandle.mounts" -}}
- { name: config, mountPath: /etc/kandle, readOnly: true }
- { name: tmp, mountPath: /tmp }
- { name: cache, mountPath: /var/cache/kandle }
{{- range $i, $file := include "kandle.secretFiles" . | fromJsonArray }}
- { name: secret-{{ $i }}, mountPath: {{ $file.mountPath }}, readOnly: true }
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ include "kandle.toYaml" . }}
{{- end }}
{{- end }}

{{/* Fields that all containers running kandle share. */}}
{{- define "kandle.container" -}}
image: {{ include "kandle.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext: {{- include "kandle.toYaml" .Values.securityContext | nindent 2 }}
volumeMounts: {{- include "kandle.mounts" . | nindent 2 }}
{{- with .Values.extraEnvFrom }}
envFrom: {{- include "kandle.toYaml" . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "kandle.resources" -}}
{{- $resources := deepCopy .Values.resources }}
{{- if .Values.gpu.enabled }}
{{- $limits := merge (dict .Values.gpu.resource .Values.gpu.count) ($resources.limits | default dict) }}
{{- $_ := set $resources "limits" $limits }}
{{- end }}
{{- include "kandle.toYaml" $resources }}
{{- end }}

{{- define "kandle.podAnnotations" -}}
checksum/config: {{ include "kandle.config" . | sha256sum }}
{{- with .Values.podAnnotations }}
{{ include "kandle.toYaml" . }}
{{- end }}
{{- end }}

{{/* Without the chart's version, so that an upgrade that changes nothing for the pods does not restart them. */}}
{{- define "kandle.podLabels" -}}
{{ include "kandle.selectorLabels" . }}
app.kubernetes.io/component: {{ .Values.mode }}
{{- with .Values.commonLabels }}
{{ include "kandle.toYaml" . }}
{{- end }}
{{- with .Values.podLabels }}
{{ include "kandle.toYaml" . }}
{{- end }}
{{- end }}

{{/* Network and scheduling fields of all pods, including those of hooks. */}}
{{- define "kandle.placement" -}}
{{- with .Values.hostAliases }}
hostAliases: {{- include "kandle.toYaml" . | nindent 2 }}
{{- end }}
{{- with .Values.dnsPolicy }}
dnsPolicy: {{ . }}
{{- end }}
{{- with .Values.dnsConfig }}
dnsConfig: {{- include "kandle.toYaml" . | nindent 2 }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- include "kandle.toYaml" . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- include "kandle.toYaml" . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- include "kandle.toYaml" . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The pod's spec without restartPolicy. */}}
{{- define "kandle.pod" -}}
{{- if and .Values.sidecars (ne .Values.mode "run") }}
{{- fail "sidecars would keep a Job from completing: use initContainers with restartPolicy: Always" }}
{{- end }}
serviceAccountName: {{ include "kandle.serviceAccountName" . }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- include "kandle.toYaml" .Values.podSecurityContext | nindent 2 }}
terminationGracePeriodSeconds: {{ include "kandle.grace" . }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- include "kandle.toYaml" . | nindent 2 }}
{{- end }}
{{- include "kandle.placement" . }}
topologySpreadConstraints:
{{- with .Values.topologySpreadConstraints }}
{{- include "kandle.toYaml" . | nindent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "kandle.selectorLabels" . | nindent 8 }}
{{- end }}
{{- if or .Values.initContainers .Values.checkBeforeStart }}
initContainers:
{{- with .Values.initContainers }}
{{- include "kandle.toYaml" . | nindent 2 }}
{{- end }}
{{- end }}
{{- if .Values.checkBeforeStart }}
  - name: check
    args: [check, --config=/etc/kandle/kandle.yaml]
    {{- include "kandle.container" . | nindent 4 }}
    env: {{- include "kandle.env" . | nindent 6 }}
    resources: {{- include "kandle.resources" . | nindent 6 }}
{{- end }}
containers:
  - name: kandle
    args: {{- include "kandle.args" . | nindent 6 }}
    {{- include "kandle.container" . | nindent 4 }}
    env: {{- include "kandle.env" . | nindent 6 }}
{{- if .Values.modelCache.pullJob }}
      - { name: KANDLE__MODEL__OFFLINE, value: "true" }
{{- end }}
    ports:
      - { name: metrics, containerPort: {{ include "kandle.port" . }} }
    resources: {{- include "kandle.resources" . | nindent 6 }}
    {{- with .Values.lifecycle }}
    lifecycle: {{- include "kandle.toYaml" . | nindent 6 }}
    {{- end }}
    # No preStop hook: on SIGTERM kandle finishes what is in flight, commits and leaves the group.
    startupProbe:
      httpGet: {{ include "kandle.probe" (dict "path" "/livez" "root" .) }}
      {{- include "kandle.toYaml" .Values.probes.startup | nindent 6 }}
    livenessProbe:
      httpGet: {{ include "kandle.probe" (dict "path" "/livez" "root" .) }}
      {{- include "kandle.toYaml" .Values.probes.liveness | nindent 6 }}
{{- if eq .Values.mode "run" }}
    readinessProbe:
      httpGet: {{ include "kandle.probe" (dict "path" "/readyz" "root" .) }}
      {{- include "kandle.toYaml" .Values.probes.readiness | nindent 6 }}
{{- end }}
{{- with .Values.sidecars }}
{{- include "kandle.toYaml" . | nindent 2 }}
{{- end }}
volumes: {{- include "kandle.volumes" . | nindent 2 }}
{{- end }}

{{/* A Job fails at once, without retries, on a wrong configuration (exit code 2) or dead letters with strict (3). */}}
{{- define "kandle.podFailurePolicy" -}}
rules:
  - action: FailJob
    onExitCodes: { containerName: kandle, operator: In, values: [2, 3] }
  - action: Ignore
    onPodConditions: [{ type: DisruptionTarget, status: "True" }]
{{- end }}
