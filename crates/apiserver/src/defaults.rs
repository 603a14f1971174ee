//! What the API server adds to objects of built-in kinds that do not say it themselves. Who applies an object does not own it.

use serde_json::{Map, Value, json};

/// Adds what an object of `kind` does not say.
pub(crate) fn fill(kind: &str, object: &mut Value) {
    let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) else { return };
    match kind {
        "Pod" => pod(spec),
        "Service" => service(spec),
        "StatefulSet" => {
            let retained = json!({ "whenDeleted": "Retain", "whenScaled": "Retain" });
            add(
                spec,
                json!({
                    "replicas": 1, "podManagementPolicy": "OrderedReady", "revisionHistoryLimit": 10,
                    "updateStrategy": {}, "persistentVolumeClaimRetentionPolicy": retained,
                }),
            );
            strategy(spec, "updateStrategy", &json!({ "partition": 0 }));
            template(spec);
        }
        "Deployment" => {
            add(
                spec,
                json!({ "replicas": 1, "revisionHistoryLimit": 10, "progressDeadlineSeconds": 600, "strategy": {} }),
            );
            strategy(spec, "strategy", &json!({ "maxSurge": "25%", "maxUnavailable": "25%" }));
            template(spec);
        }
        _ => {}
    }
}

/// Puts `defaults` where there is nothing.
fn add(map: &mut Map<String, Value>, defaults: Value) {
    let Value::Object(defaults) = defaults else { return };
    for (field, value) in defaults {
        map.entry(field).or_insert(value);
    }
}

/// The objects of a list, and the object that is a field.
fn within<'a>(
    map: &'a mut Map<String, Value>,
    field: &str,
) -> impl Iterator<Item = &'a mut Map<String, Value>> {
    let (one, many) = match map.get_mut(field) {
        Some(Value::Array(items)) => (None, Some(items)),
        Some(Value::Object(object)) => (Some(object), None),
        _ => (None, None),
    };
    one.into_iter().chain(many.into_iter().flatten().filter_map(Value::as_object_mut))
}

fn strategy(spec: &mut Map<String, Value>, field: &str, rolling: &Value) {
    for strategy in within(spec, field) {
        add(strategy, json!({ "type": "RollingUpdate" }));
        if strategy["type"] == "RollingUpdate" {
            add(strategy, json!({ "rollingUpdate": {} }));
            within(strategy, "rollingUpdate").for_each(|update| add(update, rolling.clone()));
        }
    }
}

fn template(spec: &mut Map<String, Value>) {
    for template in within(spec, "template") {
        within(template, "spec").for_each(pod);
    }
}

fn pod(spec: &mut Map<String, Value>) {
    add(
        spec,
        json!({
            "restartPolicy": "Always", "dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler",
            "terminationGracePeriodSeconds": 30, "securityContext": {},
        }),
    );
    for field in ["initContainers", "containers"] {
        within(spec, field).for_each(container);
    }
    for volume in within(spec, "volumes") {
        within(volume, "secret").for_each(|secret| add(secret, json!({ "defaultMode": 420 })));
        within(volume, "hostPath").for_each(|path| add(path, json!({ "type": "" })));
    }
}

fn container(container: &mut Map<String, Value>) {
    add(
        container,
        json!({
            "imagePullPolicy": "IfNotPresent", "resources": {}, "terminationMessagePath": "/dev/termination-log",
            "terminationMessagePolicy": "File",
        }),
    );
    within(container, "ports").for_each(|port| add(port, json!({ "protocol": "TCP" })));
    for variable in within(container, "env") {
        for source in within(variable, "valueFrom") {
            within(source, "fieldRef").for_each(|field| add(field, json!({ "apiVersion": "v1" })));
        }
    }
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
        for probe in within(container, probe) {
            let defaults = json!({ "timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3 });
            add(probe, defaults);
            within(probe, "httpGet").for_each(|get| add(get, json!({ "scheme": "HTTP", "path": "/" })));
        }
    }
}

fn service(spec: &mut Map<String, Value>) {
    add(
        spec,
        json!({
            "type": "ClusterIP", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
        }),
    );
    for port in within(spec, "ports") {
        let number = port.get("port").cloned().unwrap_or_default();
        add(port, json!({ "protocol": "TCP", "targetPort": number }));
    }
}
