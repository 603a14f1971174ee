//! The Helm chart, the plain manifests and the alert rules, held against the tools that read them.

mod alerts;
mod restricted;
mod rights;
mod tools;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::sync::LazyLock;

use serde_json::{Value, json};

use restricted::{list, pods, violations};
use tools::{chart, documents, plain, program, python, root, run};

/// Settings of the chart that differ in what they make.
const MATRIX: &[&[&str]] = &[
    &[],
    &["watchNamespaces={one,two}", "rbac.nodes=false", "serviceAccount.name=other"],
    &["operator.replicas=1", "podDisruptionBudget.enabled=false", "networkPolicies.enabled=false"],
    &[
        "metrics.monitors.enabled=true",
        "metrics.monitors.routerKey.name=operators-key",
        "metrics.dashboard.enabled=true",
        "metrics.rules.enabled=true",
        "metrics.rules.labels.release=prometheus",
        "tls.mode=certManager",
    ],
    &[
        "watchNamespaces={one}",
        "networkPolicies.namespaces={more}",
        "networkPolicies.etcd.cidrs={10.0.0.0/8,fd00::/8}",
        "networkPolicies.modelHub=true",
        "metrics.monitors.enabled=true",
        "tls.mode=certManager",
        "tls.certManager.issuerRef.kind=ClusterIssuer",
        "tls.certManager.issuerRef.name=ours",
    ],
    &[
        "image.repository=registry.example/galerne",
        "image.digest=sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "image.pullSecrets[0].name=registry",
        "operator.nodeSelector.disk=fast",
        "operator.tolerations[0].key=quiet",
        "operator.tolerations[0].operator=Exists",
        "operator.priorityClassName=system-cluster-critical",
        "operator.podAnnotations.note=yes",
        "operator.env[0].name=GALERNE_IO_THREADS",
        "operator.env[0].value=one",
        "serviceAccount.annotations.note=yes",
        "tls.mode=secret",
        "etcd.tlsSecret=etcd-client",
        "rbac.certificates=true",
        "rbac.podGroups=false",
    ],
];

/// What the chart becomes with each of them.
static RENDERED: LazyLock<Vec<String>> = LazyLock::new(|| {
    MATRIX.iter().map(|settings| chart(settings).unwrap_or_else(|said| panic!("{said}"))).collect()
});

/// All manifests: of the chart with every setting of the matrix, and the plain ones.
fn manifests() -> Vec<Value> {
    let read = plain().into_iter().map(|path| std::fs::read_to_string(path).expect("a readable file"));
    documents(&RENDERED.iter().cloned().chain(read).collect::<Vec<_>>().join("\n---\n"))
}

fn labels_match(selector: &Value, labels: &Value) -> bool {
    let wanted = selector.as_object().expect("labels");
    !wanted.is_empty() && wanted.iter().all(|(name, value)| labels[name] == *value)
}

#[test]
fn lint_finds_nothing() {
    for settings in MATRIX {
        let mut helm = program("helm");
        helm.args(["lint", "--strict", "helm/galerne"]);
        settings.iter().for_each(|setting| {
            helm.args(["--set", setting]);
        });
        run(&mut helm);
    }
}

#[test]
fn whoever_installs_it_is_told_where_clusters_are_looked_after() {
    for (settings, where_) in [(&[][..], "all namespaces"), (&["watchNamespaces={one,two}"], "one, two")] {
        let mut helm = program("helm");
        helm.env("KUBECONFIG", "/dev/null"); // no cluster of the user's is asked
        helm.args([
            "install",
            "galerne",
            "helm/galerne",
            "--namespace",
            "galerne-system",
            "--dry-run=client",
        ]);
        settings.iter().for_each(|setting| {
            helm.args(["--set", setting]);
        });
        let said = run(&mut helm);
        assert!(said.contains(&format!("looks after the GalerneClusters of {where_}.")), "{said}");
    }
}

#[test]
fn every_manifest_is_what_kubernetes_takes() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("all.yaml");
    std::fs::write(&file, RENDERED.join("\n---\n")).expect("written");
    let files = plain().into_iter().chain([file]).filter(|path| !path.ends_with("kustomization.yaml"));
    // The oldest that the chart allows, and the newest.
    let said = run(python().args(["tests/chart/validate.py", "1.29,1.37"]).args(files));
    let mut others = vec!["monitoring.coreos.com/v1", "cert-manager.io/v1", "kind.x-k8s.io/v1alpha4"];
    if !root().join("k8s/crds").exists() {
        others.push("galerne.dev/v1alpha1"); // nobody knows yet what ours must be
    }
    let of_others = |line: &&str| others.iter().any(|other| line.starts_with(&format!("unknown {other} ")));
    let complaints: Vec<&str> = said.lines().filter(|line| !of_others(line)).collect();
    assert!(complaints.is_empty() && said.contains("cert-manager"), "{complaints:#?}");
}

#[test]
fn every_pod_is_restricted() {
    let manifests = manifests();
    let pods: Vec<&Value> = manifests.iter().filter_map(pods).collect();
    assert!(pods.len() > MATRIX.len(), "the plain manifests have one, too");
    for pod in pods {
        assert_eq!(violations(pod), Vec::<String>::new(), "{pod:#}");
    }
}

#[test]
fn a_pod_that_is_not_restricted_is_found() {
    let operator = documents(&chart(&[]).unwrap());
    let pod = operator.iter().find_map(pods).expect("the operator's");
    let cases = [
        ("/hostNetwork", json!(true)),
        ("/volumes", json!([{ "name": "x", "hostPath": { "path": "/" } }])),
        ("/securityContext/seccompProfile", json!({ "type": "Unconfined" })),
        ("/securityContext/runAsNonRoot", json!(false)),
        ("/securityContext/runAsUser", json!(0)),
        ("/containers/0/securityContext", json!({})),
        ("/containers/0/securityContext/privileged", json!(true)),
        ("/containers/0/securityContext/capabilities/add", json!(["SYS_ADMIN"])),
        ("/containers/0/securityContext/readOnlyRootFilesystem", json!(false)),
        ("/containers/0/ports/0/hostPort", json!(8002)),
        ("/containers/0/resources", json!({})),
        ("/containers/0/image", json!("galerne:latest")),
    ];
    for (path, value) in cases {
        let mut pod = pod.clone();
        let (parent, field) = path.rsplit_once('/').expect("a path");
        pod.pointer_mut(parent).expect("a parent")[field] = value;
        assert!(!violations(&pod).is_empty(), "{path}");
    }
}

#[test]
fn selectors_find_the_operator_and_policies_find_every_pod() {
    for yaml in RENDERED.iter() {
        let manifests = documents(yaml);
        let deployment = manifests.iter().find(|m| m["kind"] == "Deployment").expect("the operator");
        let labels = &deployment["spec"]["template"]["metadata"]["labels"];
        let of = |kind: &'static str| manifests.iter().filter(move |m| m["kind"] == kind);
        for selector in [
            &deployment["spec"]["selector"]["matchLabels"],
            &of("Service").next().expect("one")["spec"]["selector"],
        ] {
            assert!(labels_match(selector, labels), "{selector}");
        }
        for selector in of("PodDisruptionBudget").map(|budget| &budget["spec"]["selector"]["matchLabels"]) {
            assert!(labels_match(selector, labels), "{selector}");
        }
        let service = &of("Service").next().expect("one")["metadata"]["labels"];
        let ours = |monitor: &&Value| monitor["metadata"]["name"] == "galerne";
        for monitor in of("ServiceMonitor").filter(ours) {
            assert!(labels_match(&monitor["spec"]["selector"]["matchLabels"], service));
        }
        for policy in of("NetworkPolicy") {
            let Value::Object(selector) = &policy["spec"]["podSelector"]["matchLabels"] else {
                panic!("{policy:#}")
            };
            let ours = selector.get("app.kubernetes.io/name");
            assert_eq!(ours, Some(&json!("galerne")), "pods of others are left alone");
            assert_eq!(policy["spec"]["policyTypes"], json!(["Ingress", "Egress"]));
            let rules = [&policy["spec"]["ingress"], &policy["spec"]["egress"]];
            let peers = rules
                .into_iter()
                .flat_map(list)
                .map(|rule| if rule["to"].is_null() { &rule["from"] } else { &rule["to"] });
            assert!(
                peers.into_iter().all(|peers| !list(peers).is_empty()),
                "no peers means everybody: {policy:#}"
            );
        }
        let denies = |policy: &&Value| labels_match(&policy["spec"]["podSelector"]["matchLabels"], labels);
        assert_eq!(of("NetworkPolicy").any(|policy| denies(&policy)), of("NetworkPolicy").next().is_some());
    }
}

#[test]
fn wrong_values_are_refused_with_their_name() {
    for (setting, name) in [
        ("image.tagg=1", "tagg"),
        ("image.digest=sha256:12", "/image/digest"),
        ("watchNamespaces={Not_A_Name}", "/watchNamespaces/0"),
        ("operator.replicas=0", "/operator/replicas"),
        ("operator.env[0].name=PATH", "/operator/env/0/name"),
        ("operator.env[0].value=1", "/operator/env/0/value"),
        ("networkPolicies.clients=null", "clients"), // which would let everybody in
        ("networkPolicies.apiServer.ports={0}", "/networkPolicies/apiServer/ports/0"),
        ("metrics.rules.errorsPercent=0", "/metrics/rules/errorsPercent"),
        ("tls.mode=maybe", "/tls/mode"),
        ("etcd.tlsSecret=Not_A_Name", "/etcd/tlsSecret"),
    ] {
        let said = chart(&[setting]).err();
        assert!(said.as_ref().is_some_and(|said| said.contains(name)), "{setting}: {said:?}");
    }
}

#[test]
fn the_image_is_made_with_what_the_tests_were_made_with() {
    let read = |path: &str| std::fs::read_to_string(root().join(path)).expect("a readable file");
    let (image, setup, manifest) = (read("Dockerfile"), read(".ci/setup"), read("Cargo.toml"));
    let after = |text: &str, name: &str| {
        let (_, rest) = text.split_once(name).unwrap_or_else(|| panic!("no {name}"));
        rest.split(|c: char| !c.is_ascii_digit() && c != '.').next().unwrap_or_default().to_owned()
    };
    assert_eq!(after(&image, "rust:"), after(&manifest, "rust-version = \""));
    assert_eq!(after(&image, "nvidia-nccl-cu13=="), after(&setup, "nvidia-nccl-cu13=="));
}

/// Names and contents of a folder's files; nothing if there is no such folder.
fn folder(path: &str) -> BTreeMap<OsString, String> {
    let entries = std::fs::read_dir(root().join(path)).into_iter().flatten();
    let entries = entries.map(|entry| entry.expect("a readable entry"));
    entries
        .map(|entry| (entry.file_name(), std::fs::read_to_string(entry.path()).expect("a readable file")))
        .collect()
}

#[test]
fn copies_are_what_they_were_made_from() {
    let read = |path: &str| {
        std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    };
    let helms = |line: &&str| {
        let line = line.trim_start();
        !line.starts_with("helm.sh/chart: ") && !line.starts_with("app.kubernetes.io/managed-by: ")
    };
    let rendered: Vec<String> = chart(&[]).unwrap().lines().filter(helms).map(str::to_owned).collect();
    let written: Vec<String> = read("k8s/operator.yaml").lines().map(str::to_owned).collect();
    assert!(rendered == written, "k8s/operator.yaml is not what the chart makes: run `make chart`");
    let same = read("k8s/grafana/galerne.json") == read("helm/galerne/files/galerne.json");
    assert!(same, "the chart's dashboard is another one: run `make chart`");
    assert!(
        folder("k8s/crds") == folder("helm/galerne/crds"),
        "the chart's definitions are others: run `make crds`"
    );
    let built = documents(&run(program("kubectl").args(["kustomize", "k8s"])));
    assert_eq!(built.len(), documents(&read("k8s/operator.yaml")).len() + 1);
}
