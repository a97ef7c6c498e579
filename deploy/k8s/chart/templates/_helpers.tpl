{{- define "baton.fullname" -}}
{{- if contains "baton" .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-baton{{ end -}}
{{- end -}}

{{/* What selects pods: never changes in the life of a release. Takes root and component. */}}
{{- define "baton.selector" -}}
app.kubernetes.io/name: baton
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- if .pool }}
baton/pool: {{ .pool }}
{{- end }}
{{- end -}}

{{- define "baton.labels" -}}
{{ include "baton.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end -}}

{{/* Ends the rendering where values make no sense together. */}}
{{- define "baton.check" -}}
{{- with .Values.model }}
{{- if and (eq .source "hub") (or (eq .name "demo") (hasPrefix "/" .name)) }}
{{- fail "model.name: a hub id, such as Qwen/Qwen3-0.6B, where model.source is hub" }}
{{- end }}
{{- if and (eq .source "volume") (not (hasPrefix "/models/" .name)) }}
{{- fail "model.name: a folder below /models, where the volume is, as model.source is volume" }}
{{- end }}
{{- end }}
{{- if and .Values.coordinator.clientCaSecret (not .Values.coordinator.publicTlsSecret) }}
{{- fail "coordinator.clientCaSecret needs coordinator.publicTlsSecret" }}
{{- end }}
{{- if ne (empty .Values.tls.coordinatorSecret) (empty .Values.tls.workerSecret) }}
{{- fail "tls.coordinatorSecret and tls.workerSecret: both or neither" }}
{{- end }}
{{- end -}}

{{/* The pools with their defaults, as JSON by name. What is nonsense ends the rendering here, too. */}}
{{- define "baton.pools" -}}
{{- $pools := dict -}}
{{- range $name, $own := .Values.pools -}}
{{- if $own -}}
{{- $pool := mustMergeOverwrite (deepCopy $.Values.poolDefaults) (deepCopy $own) -}}
{{- if and (eq (int $pool.autoscaling.min) 0) (ne $pool.autoscaling.kind "keda") -}}
{{- fail (printf "pools.%s.autoscaling.min is 0: only kind keda starts a pool again" $name) -}}
{{- end -}}
{{- if and (eq $pool.autoscaling.kind "keda") (not $.Values.autoscaling.prometheus) -}}
{{- fail (printf "pools.%s.autoscaling.kind is keda: set autoscaling.prometheus" $name) -}}
{{- end -}}
{{- if gt (int $pool.autoscaling.min) (int $pool.autoscaling.max) -}}
{{- fail (printf "pools.%s.autoscaling.min is more than max" $name) -}}
{{- end -}}
{{- if not (add $pool.maxUnavailable $pool.maxSurge) -}}
{{- fail (printf "pools.%s: with maxUnavailable and maxSurge 0 no pod could be replaced" $name) -}}
{{- end -}}
{{- if le (int $pool.drainTimeoutSeconds) (int $.Values.coordinator.drainTimeoutSeconds) -}}
{{- fail (printf "pools.%s.drainTimeoutSeconds must be more than coordinator.drainTimeoutSeconds" $name) -}}
{{- end -}}
{{- $_ := set $pools $name $pool -}}
{{- end -}}
{{- end -}}
{{- $decodes := false -}}
{{- range $pools }}{{- if has .role (list "decode" "mixed") }}{{ $decodes = true }}{{ end }}{{ end -}}
{{- if not $decodes -}}
{{- fail "no pool has the role decode or mixed: nothing would answer" -}}
{{- end -}}
{{- toJson $pools -}}
{{- end -}}

{{/* Takes root and own: an image that a part has for itself. */}}
{{- define "baton.image" -}}
{{- $image := mustMergeOverwrite (deepCopy .root.Values.image) (deepCopy .own) -}}
{{ $image.repository }}:{{ $image.tag | default (printf "%s-cpu" .root.Chart.AppVersion) }}
{{- end -}}

{{/* A map of flags as arguments. True is a switch. */}}
{{- define "baton.flags" -}}
{{- range $name, $value := . }}
{{- if kindIs "bool" $value }}
{{- if $value }}
- --{{ $name }}
{{- end }}
{{- else if kindIs "float64" $value }}
- {{ printf "--%s=%v" $name (ternary ($value | int64 | toString) ($value | toString) (eq (floor $value) $value)) | quote }}
{{- else }}
- {{ printf "--%s=%v" $name $value | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* What both kinds of process are told about the model. */}}
{{- define "baton.modelFlags" -}}
{{- $model := .Values.model }}
- --model={{ $model.name }}
{{- with $model.revision }}
- --revision={{ . }}
{{- end }}
{{- with $model.servedName }}
- --served-name={{ . }}
{{- end }}
{{- end -}}

{{/* Of pods: nobody is root, and the group may read secrets and write volumes. */}}
{{- define "baton.podSecurity" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* Of containers. */}}
{{- define "baton.security" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{/* Caches of compilers and of the hub's library go below HOME; the rest of the file system is read-only. */}}
{{- define "baton.env" -}}
- {name: HOME, value: /tmp}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- if ne .Values.model.source "image" }}
- {name: HF_HOME, value: /models}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- end -}}

{{/* Fetches the model. Takes root, own (the part) and what: globs of files. */}}
{{- define "baton.fetch" -}}
{{- if eq .root.Values.model.source "hub" }}
initContainers:
  - name: fetch
    image: {{ include "baton.image" (dict "root" .root "own" .own.image) }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    command: [hf, download, --quiet]
    args:
      - {{ .root.Values.model.name | quote }}
      {{- with .root.Values.model.revision }}
      - --revision={{ . }}
      {{- end }}
      {{- range .what }}
      - --include={{ . }}
      {{- end }}
      - --exclude=*/*
      - --exclude=consolidated*
    env:
      - {name: HOME, value: /tmp}
      - {name: HF_HOME, value: /models}
      {{- with .root.Values.model.tokenSecret }}
      - name: HF_TOKEN
        valueFrom: {secretKeyRef: {name: {{ . }}, key: token}}
      {{- end }}
    resources:
      requests: {cpu: "1", memory: 1Gi}
      limits: {memory: 2Gi}
    {{- include "baton.security" .root | nindent 4 }}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      - {name: models, mountPath: /models}
{{- end }}
{{- end -}}

{{- define "baton.mounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if ne .Values.model.source "image" }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end -}}

{{/* Takes root and size: of a volume of the pod's own. */}}
{{- define "baton.volumes" -}}
{{- $model := .root.Values.model }}
- name: tmp
  emptyDir: {sizeLimit: 2Gi}
{{- if ne $model.source "image" }}
- name: models
  {{- if eq $model.volume.kind "claim" }}
  persistentVolumeClaim:
    claimName: {{ $model.volume.claim | default (printf "%s-models" (include "baton.fullname" .root)) }}
  {{- else }}
  emptyDir: {sizeLimit: {{ .size }}}
  {{- end }}
{{- end }}
{{- end -}}

{{/* A Secret as files that its group alone may read. Takes name, secret and optional. */}}
{{- define "baton.secretVolume" -}}
- name: {{ .name }}
  secret:
    secretName: {{ .secret }}
    defaultMode: 0440
{{- end -}}

{{- define "baton.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "baton.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- end -}}

{{/* Flags of both kinds of process for TLS between them; takes the Secret. */}}
{{- define "baton.tlsFlags" -}}
{{- if . }}
- --tls-cert=/etc/baton/tls/tls.crt
- --tls-key=/etc/baton/tls/tls.key
- --tls-ca=/etc/baton/tls/ca.crt
{{- end }}
{{- end -}}

{{/* etcd, as coordinators and workers are told. */}}
{{- define "baton.etcdFlags" -}}
{{- with .Values.discovery }}
- --discovery={{ .etcd }}
{{- if .etcdTlsSecret }}
- --discovery-ca=/etc/baton/etcd-tls/ca.crt
{{- if .etcdClientCertificate }}
- --discovery-cert=/etc/baton/etcd-tls/tls.crt
- --discovery-key=/etc/baton/etcd-tls/tls.key
{{- end }}
{{- end }}
{{- if .etcdLoginSecret }}
- --discovery-login=/etc/baton/etcd-login/login
{{- end }}
{{- end }}
{{- end -}}

{{/* Secrets that both kinds of process may have, as [volume, Secret, path]. Takes root and tls: the Secret. */}}
{{- define "baton.secretMounts" -}}
{{- if .tls }}
- {name: tls, mountPath: /etc/baton/tls, readOnly: true}
{{- end }}
{{- if .root.Values.discovery.etcdTlsSecret }}
- {name: etcd-tls, mountPath: /etc/baton/etcd-tls, readOnly: true}
{{- end }}
{{- if .root.Values.discovery.etcdLoginSecret }}
- {name: etcd-login, mountPath: /etc/baton/etcd-login, readOnly: true}
{{- end }}
{{- end -}}

{{- define "baton.secretVolumes" -}}
{{- with .tls }}
{{ include "baton.secretVolume" (dict "name" "tls" "secret" .) }}
{{- end }}
{{- with .root.Values.discovery.etcdTlsSecret }}
{{ include "baton.secretVolume" (dict "name" "etcd-tls" "secret" .) }}
{{- end }}
{{- with .root.Values.discovery.etcdLoginSecret }}
{{ include "baton.secretVolume" (dict "name" "etcd-login" "secret" .) }}
{{- end }}
{{- end -}}
