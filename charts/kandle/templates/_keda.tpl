{{/*
How KEDA's Kafka scaler logs in to the brokers: as the consumer does. As JSON:
  metadata: fields of the trigger; reference: name of the TriggerAuthentication that the chart makes, or empty;
  secrets: its secretTargetRef; variables: its env; literals: what the chart's own Secret holds; aws: pod identity.
Refuses a login that KEDA cannot do or whose secrets it cannot find.
*/}}
{{- define "kandle.kedaLogin" -}}
{{- $result := dict "metadata" dict "reference" "" "secrets" list "variables" list "literals" dict "aws" false }}
{{- if and (eq .Values.keda.trigger "kafka") (not .Values.keda.authenticationRef) }}
{{- $config := include "kandle.effectiveConfig" . | fromJson }}
{{- $properties := merge (dict) ($config.input.properties | default dict) ($config.kafka.properties | default dict) }}
{{- $mechanism := get $properties "sasl.mechanism" | default (get $properties "sasl.mechanisms") | default "GSSAPI" | toString | upper }}
{{- $protocol := get $properties "security.protocol" | default (eq $mechanism "AWS_MSK_IAM" | ternary "SASL_SSL" "PLAINTEXT") | toString | upper }}
{{- if not (has $protocol (list "PLAINTEXT" "SSL" "SASL_PLAINTEXT" "SASL_SSL")) }}
{{- fail (printf "keda.trigger kafka cannot read security.protocol %s: write it as plain text, or set keda.authenticationRef" $protocol) }}
{{- end }}
{{- $tls := hasSuffix "SSL" $protocol }}
{{- $sasl := hasPrefix "SASL_" $protocol }}
{{- $wanted := list }}
{{- if $tls }}
{{- if get $properties "ssl.keystore.location" }}
{{- fail "keda.trigger kafka cannot read ssl.keystore.location: use ssl.certificate.location and ssl.key.location, or set keda.authenticationRef" }}
{{- end }}
{{- $_ := set $result.metadata "tls" "enable" }}
{{- $wanted = concat $wanted (list (list "ca" "ssl.ca.location" "ssl.ca.pem") (list "cert" "ssl.certificate.location" "ssl.certificate.pem") (list "key" "ssl.key.location" "ssl.key.pem") (list "keyPassword" "" "ssl.key.password")) }}
{{- end }}
{{- if $sasl }}
{{- $names := dict "PLAIN" "plaintext" "SCRAM-SHA-256" "scram_sha256" "SCRAM-SHA-512" "scram_sha512" "OAUTHBEARER" "oauthbearer" "AWS_MSK_IAM" "aws_msk_iam" }}
{{- if not (hasKey $names $mechanism) }}
{{- fail (printf "keda.trigger kafka has no counterpart of sasl.mechanism %s: set keda.authenticationRef, or keda.trigger prometheus" $mechanism) }}
{{- end }}
{{- $_ := set $result.metadata "sasl" (get $names $mechanism) }}
{{- if eq $mechanism "OAUTHBEARER" }}
{{- $wanted = concat $wanted (list (list "username" "" "sasl.oauthbearer.client.id") (list "password" "" "sasl.oauthbearer.client.secret") (list "oauthTokenEndpointUri" "" "sasl.oauthbearer.token.endpoint.url") (list "scopes" "" "sasl.oauthbearer.scope") (list "oauthExtensions" "" "sasl.oauthbearer.extensions")) }}
{{- else if eq $mechanism "AWS_MSK_IAM" }}
{{- $region := regexFind "[a-z0-9-]+\\.amazonaws\\.com" $config.kafka.brokers | trimSuffix ".amazonaws.com" }}
{{- if not $region }}
{{- fail "keda.trigger kafka: the AWS region is not in config.kafka.brokers: set keda.authenticationRef, or keda.trigger prometheus" }}
{{- end }}
{{- $_ := set $result.metadata "awsRegion" $region }}
{{- $_ := set $result "aws" true }}
{{- else }}
{{- $wanted = concat $wanted (list (list "username" "" "sasl.username") (list "password" "" "sasl.password")) }}
{{- end }}
{{- end }}
{{- $root := . }}
{{- range $wanted }}
{{- $parameter := index . 0 }}
{{- $file := get $properties (index . 1) | default "" | toString }}
{{- $value := get $properties (index . 2) | default "" | toString }}
{{- $path := $file }}
{{- if regexMatch "^\\$\\{file:[^}]+\\}$" $value }}
{{- $path = $value | trimPrefix "${file:" | trimSuffix "}" }}
{{- end }}
{{- if $path }}
{{- $found := dict }}
{{- range include "kandle.secretFiles" $root | fromJsonArray }}
{{- $folder := printf "%s/" (trimSuffix "/" .mountPath) }}
{{- if and (hasPrefix $folder $path) (not (contains "/" (trimPrefix $folder $path))) }}
{{- $found = dict "parameter" $parameter "name" .secret "key" (trimPrefix $folder $path) }}
{{- end }}
{{- end }}
{{- if not $found }}
{{- fail (printf "keda.trigger kafka cannot read %s: mount it with secretFiles, or set keda.authenticationRef" $path) }}
{{- end }}
{{- $_ := set $result "secrets" (append $result.secrets $found) }}
{{- else if regexMatch "^\\$\\{env:[^}]+\\}$" $value }}
{{- $name := $value | trimPrefix "${env:" | trimSuffix "}" }}
{{- $found := dict }}
{{- range $root.Values.secretEnv }}
{{- if eq .name $name }}
{{- $found = dict "parameter" $parameter "name" .secret "key" .key }}
{{- end }}
{{- end }}
{{- if $found }}
{{- $_ := set $result "secrets" (append $result.secrets $found) }}
{{- else }}
{{- $_ := set $result "variables" (append $result.variables (dict "parameter" $parameter "name" $name "containerName" "kandle")) }}
{{- end }}
{{- else if regexMatch "\\$\\{(env|file):" ($value | replace "$$" "") }}
{{- fail (printf "keda.trigger kafka cannot read %s: use a plain value or exactly one ${env:NAME} or ${file:/path}, or set keda.authenticationRef" (index . 2)) }}
{{- else if $value }}
{{- $_ := set $result.literals $parameter ($value | replace "$$" "$") }}
{{- end }}
{{- end }}
{{- if $result.literals }}
{{- $secret := printf "%s-keda" (include "kandle.fullname" .) }}
{{- range $parameter := keys $result.literals | sortAlpha }}
{{- $_ := set $result "secrets" (append $result.secrets (dict "parameter" $parameter "name" $secret "key" $parameter)) }}
{{- end }}
{{- end }}
{{- if or $result.secrets $result.variables $result.aws }}
{{- $_ := set $result "reference" (printf "%s-kafka" (include "kandle.fullname" .)) }}
{{- end }}
{{- end }}
{{- toJson $result }}
{{- end }}
