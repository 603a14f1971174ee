//! Kubernetes' Pod Security Standard "restricted" (the documentation's table, v1.37), and what we ask beyond it.

use serde_json::Value;

/// Kinds of volumes that the standard allows.
const VOLUMES: &[&str] = &[
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
];

/// What a pod's specification does that it must not.
pub(crate) fn violations(pod: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let mut must = |holds: bool, what: &str| {
        if !holds {
            found.push(what.to_owned());
        }
    };
    for shared in ["hostNetwork", "hostPID", "hostIPC"] {
        must(pod[shared] != true, shared);
    }
    for volume in list(&pod["volumes"]) {
        let kinds = volume.as_object().into_iter().flatten().map(|(kind, _)| kind.as_str());
        must(
            kinds.filter(|kind| *kind != "name").all(|kind| VOLUMES.contains(&kind)),
            "a volume of the host's",
        );
    }
    let of_pod = &pod["securityContext"];
    must(list(&of_pod["sysctls"]).is_empty(), "sysctls");
    must(pod["enableServiceLinks"] == false, "links to all services in its environment");
    let containers = ["initContainers", "containers", "ephemeralContainers"];
    for container in containers.into_iter().flat_map(|kind| list(&pod[kind])) {
        let own = &container["securityContext"];
        let either = |field: &str| if own[field].is_null() { &of_pod[field] } else { &own[field] };
        must(own["privileged"] != true, "privileged");
        must(own["allowPrivilegeEscalation"] == false, "allowPrivilegeEscalation");
        must(either("runAsNonRoot") == true, "runAsNonRoot");
        must(either("runAsUser").as_u64() != Some(0), "runAsUser 0");
        let profile = either("seccompProfile")["type"].as_str();
        must(matches!(profile, Some("RuntimeDefault" | "Localhost")), "seccompProfile");
        must(
            list(&own["capabilities"]["drop"]).contains(&Value::from("ALL")),
            "capabilities that are not dropped",
        );
        let added = list(&own["capabilities"]["add"]);
        must(added.iter().all(|added| added == "NET_BIND_SERVICE"), "capabilities that are added");
        must(own["procMount"].is_null() || own["procMount"] == "Default", "procMount");
        must(list(&container["ports"]).iter().all(|port| port["hostPort"].is_null()), "hostPort");
        // From here on it is ours.
        must(own["readOnlyRootFilesystem"] == true, "a root that can be written");
        let requests = &container["resources"]["requests"];
        must(requests["cpu"].is_string() && requests["memory"].is_string(), "no requests of cpu and memory");
        must(container["resources"]["limits"]["memory"].is_string(), "no limit of memory");
        let image = container["image"].as_str().unwrap_or_default();
        must(
            image.contains('@') || image.contains(':') && !image.ends_with(":latest"),
            "an image without a version",
        );
    }
    found
}

/// The specifications of all pods that a manifest makes.
pub(crate) fn pods(manifest: &Value) -> Option<&Value> {
    let spec = &manifest["spec"];
    match manifest["kind"].as_str()? {
        "Pod" => Some(spec),
        "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" | "Job" => Some(&spec["template"]["spec"]),
        "CronJob" => Some(&spec["jobTemplate"]["spec"]["template"]["spec"]),
        _ => None,
    }
}

pub(crate) fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}
