{{- define "galerne.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "galerne.selector" -}}
app.kubernetes.io/name: galerne
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "galerne.labels" -}}
{{ include "galerne.selector" . }}
app.kubernetes.io/part-of: galerne
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "galerne.serviceAccount" -}}
{{- default (include "galerne.name" .) .Values.serviceAccount.name -}}
{{- end -}}

{{- define "galerne.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ default $.Chart.AppVersion .tag }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Where Galerne's pods are: the namespaces watched, or the release's own. */ -}}
{{- define "galerne.namespaces" -}}
{{- toJson (default (list .Release.Namespace) .Values.watchNamespaces | uniq) -}}
{{- end -}}

{{- /* What the operator may do where clusters are. It cannot read secrets: pods name them. */ -}}
{{- define "galerne.rules" -}}
- apiGroups: [galerne.dev]
  resources: [galerneclusters]
  verbs: [get, list, watch, patch]
- apiGroups: [galerne.dev]
  resources: [galerneclusters/status, galerneclusters/finalizers]
  verbs: [patch, update]
- apiGroups: [apps]
  resources: [statefulsets, deployments]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
{{- if .Values.rbac.podGroups }}
- apiGroups: [scheduling.k8s.io]
  resources: [podgroups]
  verbs: [get, list, watch, create, patch, delete]
{{- end }}
{{- if .Values.rbac.certificates }}
- apiGroups: [cert-manager.io]
  resources: [certificates]
  verbs: [get, list, watch, create, patch, delete]
{{- end }}
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, delete]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
# What the controller of StatefulSets says when a quota or an admission controller lets it make no pods.
- apiGroups: [""]
  resources: [events]
  verbs: [list, watch]
{{- end -}}

{{- /* Where network policies stand besides the operator's namespace. */ -}}
{{- define "galerne.policyNamespaces" -}}
{{- $all := concat (default (list) .Values.watchNamespaces) .Values.networkPolicies.namespaces -}}
{{- toJson (default (list .Release.Namespace) $all | uniq) -}}
{{- end -}}

{{- define "galerne.etcdEgress" -}}
{{- with .Values.networkPolicies.etcd -}}
{{- if .cidrs -}}
- to:
    {{- range .cidrs }}
    - ipBlock: { cidr: {{ . | quote }} }
    {{- end }}
  ports:
    {{- range .ports }}
    - { port: {{ . }}, protocol: TCP }
    {{- end }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "galerne.hubEgress" -}}
{{- if .Values.networkPolicies.modelHub -}}
- to:
    - ipBlock: { cidr: "0.0.0.0/0" }
    - ipBlock: { cidr: "::/0" }
  ports:
    - { port: 443, protocol: TCP }
{{- end -}}
{{- end -}}
