{{- define "collab-operator.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if contains $name .Release.Name }}{{ .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "collab-operator.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "collab-operator.labels" -}}
{{ include "collab-operator.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: collabcluster
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "collab-operator.serviceAccount" -}}
{{- default (include "collab-operator.fullname" .) .Values.serviceAccount.name }}
{{- end }}

{{- /* The reference of an image: (list $ "node"). */}}
{{- define "collab-operator.image" -}}
{{- $root := index . 0 }}{{ $part := index . 1 }}{{ $images := $root.Values.images }}
{{- index $images $part | default (printf "%s/collab-%s:%s" $images.registry $part (default $root.Chart.AppVersion $images.tag)) }}
{{- end }}

{{- /* What every container of ours may not do: the restricted Pod Security Standard. */}}
{{- define "collab-operator.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "collab-operator.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- /* Names without a namespace carry it, so that two releases of one name do not meet. */}}
{{- define "collab-operator.clusterName" -}}
{{- printf "%s-%s" .Release.Namespace (include "collab-operator.fullname" .) | trunc 253 }}
{{- end }}

{{- define "collab-operator.subjects" -}}
- kind: ServiceAccount
  name: {{ include "collab-operator.serviceAccount" . }}
  namespace: {{ .Release.Namespace }}
{{- end }}

{{- /* What the operator may do where it serves CollabClusters. */}}
{{- define "collab-operator.rules" -}}
- apiGroups: [collabcluster.io]
  resources: [collabclusters]
  verbs: [get, list, watch]
- apiGroups: [collabcluster.io]
  resources: [collabclusters/status]
  verbs: [get, patch]
# Its objects are children of a CollabCluster that waits for them. Some API servers want this right for it, and that
# whoever makes an object a child may delete it.
- apiGroups: [collabcluster.io]
  resources: [collabclusters/finalizers]
  verbs: [update]
- apiGroups: [apps]
  resources: [statefulsets]
  verbs: [create, delete, get, list, patch, watch]
- apiGroups: [""]
  resources: [configmaps, secrets, serviceaccounts, services]
  verbs: [create, delete, get, patch]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [create, delete, get, patch]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [create, delete, get, patch]
- apiGroups: [monitoring.coreos.com]
  resources: [podmonitors]
  verbs: [create, delete, get, patch]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [delete, get, list, patch, update, watch]
# To forget what a Postgres remembered of volumes that are gone.
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get]
# Nobody may grant what he does not hold. This, with pods above and the creation of services, is what the Patroni of
# each managed Postgres gets in its own namespace.
- apiGroups: [""]
  resources: [endpoints]
  verbs: [create, delete, deletecollection, get, list, patch, update, watch]
{{- end }}

{{- /* Kube nodes have no namespace. */}}
{{- define "collab-operator.kubeNodeRules" -}}
# To tell a pod that is slow from one whose machine is lost.
- apiGroups: [""]
  resources: [nodes]
  verbs: [get]
{{- end }}
