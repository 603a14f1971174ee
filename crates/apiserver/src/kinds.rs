//! The kinds that there are: built in, or by a CustomResourceDefinition.

use std::sync::Arc;

use serde_json::Value;

use crate::schema::Schema;

/// One kind.
#[derive(Debug)]
pub(crate) struct Kind {
    /// API group; empty for the first one.
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) plural: String,
    pub(crate) kind: String,
    /// It is not a custom resource's.
    pub(crate) built_in: bool,
    pub(crate) namespaced: bool,
    /// It has a status that only its subresource writes.
    pub(crate) status: bool,
    pub(crate) scale: Option<Scale>,
    /// `openAPIV3Schema` of a custom resource.
    pub(crate) schema: Option<Schema>,
}

/// Where the numbers of a scale subresource are, as paths of fields.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Scale {
    pub(crate) spec: Vec<String>,
    pub(crate) status: Vec<String>,
    pub(crate) selector: Option<Vec<String>>,
}

impl Kind {
    pub(crate) fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// Its plural and group, as errors and quotas name it.
    pub(crate) fn resource(&self) -> String {
        if self.group.is_empty() { self.plural.clone() } else { format!("{}.{}", self.plural, self.group) }
    }
}

/// Group, version, plural, kind, whether it is namespaced, whether it has a status, whether it scales.
const BUILT_IN: [(&str, &str, &str, &str, bool, bool, bool); 12] = [
    ("", "v1", "pods", "Pod", true, true, false),
    ("", "v1", "services", "Service", true, true, false),
    ("", "v1", "events", "Event", true, false, false),
    ("", "v1", "nodes", "Node", false, true, false),
    ("", "v1", "configmaps", "ConfigMap", true, false, false),
    ("", "v1", "resourcequotas", "ResourceQuota", true, true, false),
    ("apps", "v1", "statefulsets", "StatefulSet", true, true, true),
    ("apps", "v1", "deployments", "Deployment", true, true, true),
    ("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", true, true, false),
    ("coordination.k8s.io", "v1", "leases", "Lease", true, false, false),
    ("events.k8s.io", "v1", "events", "Event", true, false, false),
    (
        "apiextensions.k8s.io",
        "v1",
        "customresourcedefinitions",
        "CustomResourceDefinition",
        false,
        true,
        false,
    ),
];

/// The kinds that are always there.
pub(crate) fn built_in() -> Vec<Arc<Kind>> {
    let kind = |(group, version, plural, kind, namespaced, status, scales): (
        &str,
        &str,
        &str,
        &str,
        bool,
        bool,
        bool,
    )| Kind {
        group: group.into(),
        version: version.into(),
        plural: plural.into(),
        kind: kind.into(),
        built_in: true,
        namespaced,
        status,
        scale: scales.then(|| Scale {
            spec: path(".spec.replicas"),
            status: path(".status.replicas"),
            selector: None,
        }),
        schema: None,
    };
    BUILT_IN.map(kind).map(Arc::new).into()
}

/// The kinds that a CustomResourceDefinition makes, one a version that is served.
pub(crate) fn defined(definition: &Value) -> Vec<Arc<Kind>> {
    let spec = &definition["spec"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let versions = spec["versions"].as_array().into_iter().flatten();
    let served = versions.filter(|version| version["served"].as_bool() == Some(true));
    let kinds = served.map(|version| {
        let subresources = &version["subresources"];
        let scale = subresources.get("scale").map(|scale| Scale {
            spec: path(&text(&scale["specReplicasPath"])),
            status: path(&text(&scale["statusReplicasPath"])),
            selector: scale["labelSelectorPath"].as_str().map(path),
        });
        Kind {
            group: text(&spec["group"]),
            version: text(&version["name"]),
            plural: text(&spec["names"]["plural"]),
            kind: text(&spec["names"]["kind"]),
            built_in: false,
            namespaced: spec["scope"] == "Namespaced",
            status: subresources.get("status").is_some(),
            scale,
            schema: version["schema"].get("openAPIV3Schema").cloned().map(Schema::new),
        }
    });
    kinds.map(Arc::new).collect()
}

/// The fields of a JSONPath such as `.spec.replicas`.
fn path(text: &str) -> Vec<String> {
    text.split('.').filter(|field| !field.is_empty()).map(str::to_owned).collect()
}

/// What is at `path`.
pub(crate) fn at<'a>(object: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(object, |value, field| value.get(field))
}

/// Puts `value` there, and makes what leads to it.
pub(crate) fn put(object: &mut Value, path: &[String], value: Value) {
    let place = path.iter().fold(object, |place, field| &mut place[field.as_str()]);
    *place = value;
}
