{{/* The pod of a worker: metadata and spec. Takes root, name and pool. */}}
{{- define "baton.workerPod" -}}
{{- $root := .root }}
{{- $pool := .pool }}
{{- $id := dict "root" $root "component" "worker" "pool" .name }}
metadata:
  labels:
    {{- include "baton.selector" $id | nindent 4 }}
    baton/role: {{ $pool.role }}
    {{- with $pool.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  annotations:
    kubectl.kubernetes.io/default-container: worker
    {{- with $pool.podAnnotations }}{{ toYaml . | nindent 4 }}{{ end }}
spec:
  {{- if $root.Values.discovery.etcd }}
  automountServiceAccountToken: false
  {{- else }}
  serviceAccountName: {{ include "baton.fullname" $root }}-worker
  automountServiceAccountToken: true
  {{- end }}
  enableServiceLinks: false
  # After the drain: tiers are written out, coordinators read the last word.
  terminationGracePeriodSeconds: {{ add $pool.drainTimeoutSeconds 30 }}
  {{- with $pool.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- include "baton.pullSecrets" $root | nindent 2 }}
  {{- include "baton.podSecurity" $root | nindent 2 }}
  {{- include "baton.placement" $pool | nindent 2 }}
  {{- if or $pool.affinity $pool.topologyKey }}
  affinity:
    {{- with $pool.affinity }}{{ toYaml . | nindent 4 }}
    {{- else }}
    # KV goes from prefill to decode: near each other, where there is room.
    podAffinity:
      preferredDuringSchedulingIgnoredDuringExecution:
        - weight: 100
          podAffinityTerm:
            topologyKey: {{ $pool.topologyKey }}
            labelSelector:
              matchLabels: {{- include "baton.selector" (dict "root" $root "component" "worker") | nindent 16 }}
    {{- end }}
  {{- end }}
  {{- include "baton.fetch" (dict "root" $root "own" $pool "what" (list "*.json" "*.jinja" "*.safetensors")) | nindent 2 }}
  containers:
    - name: worker
      image: {{ include "baton.image" (dict "root" $root "own" $pool.image) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      args:
        - {{ $pool.role }}
        - --worker-id=$(POD_NAME)
        - --host=$(POD_IP)
        - --monitor-port=9090
        {{- if $root.Values.discovery.etcd }}
        {{- include "baton.etcdFlags" $root | nindent 8 }}
        {{- else }}
        - --discovery=kubernetes://{{ include "baton.fullname" $root }}-coordinator
        {{- end }}
        # Coordinators may come later; what was loaded is not given up for that.
        - --connect-timeout-s=600
        - --drain-timeout-s={{ $pool.drainTimeoutSeconds }}
        {{- include "baton.modelFlags" $root | nindent 8 }}
        {{- with $root.Values.model.version }}
        - --model-version={{ . }}
        {{- end }}
        - --lanes={{ $pool.lanes }}
        {{- if $pool.gpus }}
        - --device=cuda
        {{- if not (hasKey $pool.flags "gpu-share") }}
        - --gpu-share=0.9
        {{- end }}
        {{- else if not (hasKey $pool.flags "threads") }}
        # As many as it was given: a container sees all cores of its node.
        - --threads=$(CPUS)
        {{- end }}
        {{- if $pool.kvDisk.gib }}
        - --disk-kv-folder=/kv/blocks
        - --disk-kv-memory={{ $pool.kvDisk.gib }}GiB
        {{- end }}
        {{- include "baton.tlsFlags" $root.Values.tls.workerSecret | nindent 8 }}
        {{- include "baton.flags" $pool.flags | nindent 8 }}
      env:
        {{- include "baton.env" $root | nindent 8 }}
        {{- if not $pool.gpus }}
        - name: CPUS
          valueFrom: {resourceFieldRef: {containerName: worker, resource: requests.cpu, divisor: "1"}}
        {{- end }}
        {{- with $pool.env }}{{ toYaml . | nindent 8 }}{{ end }}
      ports:
        - {name: monitor, containerPort: 9090}
      startupProbe:
        httpGet: {path: /health, port: monitor}
        periodSeconds: 5
        failureThreshold: {{ div (add $pool.startupSeconds 4) 5 }}
      livenessProbe:
        httpGet: {path: /health, port: monitor}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      readinessProbe:
        httpGet: {path: /ready, port: monitor}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 2
      resources:
        {{- $more := dict }}
        {{- if $pool.gpus }}{{ $_ := set $more $pool.gpuResource (toString $pool.gpus) }}{{ end }}
        {{- with $pool.rdmaResource }}{{ $_ := set $more . "1" }}{{ end }}
        {{- range $kind := list "requests" "limits" }}
        {{ $kind }}: {{- toYaml (merge (dict) (index $pool.resources $kind | default dict) $more) | nindent 10 }}
        {{- end }}
      {{- include "baton.security" $root | nindent 6 }}
      volumeMounts:
        {{- include "baton.mounts" $root | nindent 8 }}
        {{- include "baton.secretMounts" (dict "root" $root "tls" $root.Values.tls.workerSecret) | nindent 8 }}
        {{- if $pool.sharedMemory }}
        - {name: shared-memory, mountPath: /dev/shm}
        {{- end }}
        {{- if $pool.kvDisk.gib }}
        - {name: kv, mountPath: /kv}
        {{- end }}
  volumes:
    {{- include "baton.volumes" (dict "root" $root "size" $root.Values.model.volume.size) | nindent 4 }}
    {{- include "baton.secretVolumes" (dict "root" $root "tls" $root.Values.tls.workerSecret) | nindent 4 }}
    {{- with $pool.sharedMemory }}
    - name: shared-memory
      emptyDir: {medium: Memory, sizeLimit: {{ . }}}
    {{- end }}
    {{- with $pool.kvDisk }}
    {{- if .gib }}
    {{- $size := printf "%dGi" (add .gib (div .gib 10) 1) }}
    - name: kv
      {{- if .storageClassName }}
      ephemeral:
        volumeClaimTemplate:
          spec:
            accessModes: [ReadWriteOnce]
            storageClassName: {{ .storageClassName }}
            resources: {requests: {storage: {{ $size }}}}
      {{- else }}
      emptyDir: {sizeLimit: {{ $size }}}
      {{- end }}
    {{- end }}
    {{- end }}
{{- end -}}
