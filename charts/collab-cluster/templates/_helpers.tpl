{{- define "collab-cluster.name" -}}
{{- $name := default .Release.Name .Values.name }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$" $name) }}
{{- fail (printf "name: %q must be at most 40 lower-case letters, digits and dashes, beginning with a letter; it is the release's name unless you set `name`" $name) }}
{{- end }}
{{- $name }}
{{- end }}

{{- define "collab-cluster.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: collabcluster
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}
