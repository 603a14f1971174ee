//! What a cluster is made of.

use galerne_operator::api::GalerneCluster;
use galerne_operator::build::{Kind, Manifest, Site, group_objects};
use serde_json::{Value, json};

fn cluster(changes: &Value) -> GalerneCluster {
    let mut spec = json!({
        "model": { "name": "m", "path": "m" }, "tensorParallel": 8, "ranksPerHost": 4, "spares": 1,
        "device": { "kind": "Cuda", "resource": "nvidia.com/gpu" },
        "router": { "apiKeysSecret": "keys" }, "etcd": { "managed": {} }, "storage": { "claim": "models" },
    });
    for (field, value) in changes.as_object().into_iter().flatten() {
        spec[field] = value.clone();
    }
    let meta = json!({ "name": "demo", "namespace": "n", "uid": "u" });
    let cluster = json!({ "apiVersion": "galerne.dev/v1alpha1", "kind": "GalerneCluster", "metadata": meta, "spec": spec });
    serde_json::from_value(cluster).expect("a cluster")
}

fn site(cluster: &GalerneCluster) -> Site<'_> {
    Site { cluster, image: "galerne:1", gangs: None }
}

#[test]
fn a_group_over_two_hosts_is_two_pods_that_nobody_evicts() {
    let cluster = cluster(&json!({}));
    let [budget, set] = group_objects(&site(&cluster), 3, "r").try_into().expect("two objects");
    assert_eq!((budget.kind, budget.name.as_str()), (Kind::PodDisruptionBudget, "demo-g3"));
    assert_eq!(budget.body["spec"]["maxUnavailable"], 0);
    assert_eq!(budget.body["metadata"]["ownerReferences"][0]["uid"], "u");
    let Manifest { kind, body, .. } = set;
    assert_eq!((kind, &body["spec"]["replicas"]), (Kind::StatefulSet, &json!(2)));
    let pod = &body["spec"]["template"]["spec"];
    let worker = &pod["containers"][0];
    let args: Vec<&str> =
        worker["args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap()).collect();
    for wanted in [
        "--etcd=http://demo-etcd.n:2379",
        "--cluster=n.demo",
        "--model=/models/m",
        "--group=g3",
        "--tp=8",
        "--ranks=4",
        "--spares=1",
        "--host=$(POD_NAME)",
        "--bind=$(POD_IP)",
        "--device=cuda",
        "--stay-when-drained",
    ] {
        assert!(args.contains(&wanted), "{wanted} is not in {args:?}");
    }
    assert_eq!(worker["resources"]["limits"]["nvidia.com/gpu"], "5", "spares have devices, too");
    let shared = pod["volumes"].as_array().unwrap().iter().find(|volume| volume["name"] == "shared-memory");
    assert_eq!(shared.unwrap()["emptyDir"]["medium"], "Memory", "NCCL's buffers between the GPUs of a host");
    assert!(worker["volumeMounts"].as_array().unwrap().iter().any(|mount| mount["mountPath"] == "/dev/shm"));
    let apart = &pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0];
    assert_eq!(apart["topologyKey"], "kubernetes.io/hostname");
}

#[test]
fn every_pod_keeps_to_the_restricted_profile() {
    let cluster = cluster(&json!({}));
    let site = site(&cluster);
    let objects = site.shared_objects().into_iter().chain(group_objects(&site, 0, "r"));
    let pods = objects.filter_map(|object| object.body["spec"].get("template").cloned());
    let preload = serde_json::to_value(site.preload("node", "r")).unwrap();
    let pods: Vec<Value> = pods.chain([preload]).collect();
    assert_eq!(pods.len(), 4, "routers, etcd, a group, what brings a version to a node");
    for pod in pods {
        let pod = &pod["spec"];
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        assert_eq!(pod["automountServiceAccountToken"], false);
        for container in pod["containers"].as_array().unwrap() {
            let may = &container["securityContext"];
            assert_eq!(
                (&may["allowPrivilegeEscalation"], &may["readOnlyRootFilesystem"]),
                (&json!(false), &json!(true))
            );
            assert_eq!(may["capabilities"]["drop"], json!(["ALL"]));
        }
    }
}

#[test]
fn a_version_is_what_pods_are_made_from_and_nothing_else() {
    let base = cluster(&json!({}));
    let revision = |changes: Value| site(&cluster(&changes)).revision();
    assert_eq!(revision(json!({})), site(&base).revision());
    for same in [
        json!({ "groups": { "max": 9 } }),
        json!({ "update": { "maxSurge": 2 } }),
        json!({ "drainSeconds": 5 }),
    ] {
        assert_eq!(revision(same.clone()), site(&base).revision(), "{same}");
    }
    for other in
        [json!({ "image": "x" }), json!({ "ranksPerHost": 8 }), json!({ "workerArgs": ["--kv-blocks=1"] })]
    {
        assert_ne!(revision(other.clone()), site(&base).revision(), "{other}");
    }
}

#[test]
fn routers_of_a_cluster_that_may_sleep_hold_what_wakes_it() {
    let router = |changes: Value| {
        let cluster = cluster(&changes);
        let objects = site(&cluster).shared_objects();
        let deployment = objects.into_iter().find(|object| object.kind == Kind::Deployment).unwrap();
        deployment.body["spec"]["template"]["spec"]["containers"][0].clone()
    };
    let holds = |router: &Value| {
        let args = router["args"].as_array().unwrap().iter().filter_map(Value::as_str);
        args.filter_map(|arg| arg.strip_prefix("--hold-s-max=")).map(str::to_owned).collect::<Vec<_>>()
    };
    let ready = |router: &Value| router["readinessProbe"]["httpGet"]["path"].clone();
    let sla = json!({ "ttft": { "percentile": 95, "ms": 500 } });
    let awake = router(json!({ "groups": { "min": 1, "max": 2 }, "sla": sla }));
    assert_eq!((holds(&awake), ready(&awake)), (vec![], json!("/readyz")));
    let sleepy = json!({ "groups": { "min": 0, "max": 2 }, "sla": sla, "startSeconds": 90 });
    let router_of_sleepy = router(sleepy.clone());
    assert_eq!(
        (holds(&router_of_sleepy), ready(&router_of_sleepy)),
        (vec!["90".to_owned()], json!("/healthz"))
    );
    let mut told = sleepy;
    told["router"] = json!({ "noAuth": true, "args": ["--hold-s-max=7"] });
    assert_eq!(holds(&router(told)), ["7"], "somebody has said how long");
}

/// What a container of a pod mounts, by volume: what the volume is, and where.
fn mounts(pod: &Value) -> Vec<(Value, String)> {
    let volume = |name: &Value| {
        let volumes = pod["volumes"].as_array().unwrap();
        volumes.iter().find(|volume| volume["name"] == *name).expect("a volume of that name").clone()
    };
    let mounts = pod["containers"][0]["volumeMounts"].as_array().unwrap().iter();
    mounts.map(|mount| (volume(&mount["name"]), mount["mountPath"].as_str().unwrap().to_owned())).collect()
}

/// The pods of routers, of the etcd if it is managed, and of a group; each with what its process is told.
fn pods(cluster: &GalerneCluster) -> Vec<(Value, Vec<String>)> {
    let site = site(cluster);
    let objects = site.shared_objects().into_iter().chain(group_objects(&site, 0, "r"));
    let templates = objects.filter_map(|object| object.body["spec"].get("template").cloned());
    let told = |pod: &Value| {
        let container = &pod["containers"][0];
        let words = ["command", "args"]
            .into_iter()
            .flat_map(|field| container[field].as_array().into_iter().flatten());
        words.map(|word| word.as_str().unwrap().to_owned()).collect()
    };
    templates.map(|template| (template["spec"].clone(), told(&template["spec"]))).collect()
}

#[test]
fn with_a_certificate_all_parts_speak_tls() {
    let cluster = cluster(&json!({ "tls": { "secret": "ours" } }));
    let pods = pods(&cluster);
    for (pod, told) in &pods {
        let secret = mounts(pod).into_iter().find(|(volume, _)| volume["secret"]["secretName"] == "ours");
        assert_eq!(secret.expect("its secret").1, "/etc/galerne/cluster");
        let flags: &[&str] = match told[0].as_str() {
            "etcd" => &[
                "--cert-file=/etc/galerne/cluster/tls.crt",
                "--key-file=/etc/galerne/cluster/tls.key",
                "--trusted-ca-file=/etc/galerne/cluster/ca.crt",
                "--client-cert-auth",
                "https://0.0.0.0:2379",
            ],
            _ => &[
                "--cluster-ca=/etc/galerne/cluster/ca.crt",
                "--cluster-cert=/etc/galerne/cluster/tls.crt",
                "--cluster-key=/etc/galerne/cluster/tls.key",
                "--etcd=https://demo-etcd.n:2379",
                "--etcd-ca=/etc/galerne/cluster/ca.crt",
                "--etcd-cert=/etc/galerne/cluster/tls.crt",
                "--etcd-key=/etc/galerne/cluster/tls.key",
                "--etcd-tls-name=galerne",
            ],
        };
        for flag in flags {
            assert!(told.iter().any(|word| word == flag), "{flag} is not in {told:?}");
        }
    }
    assert_eq!(pods.len(), 3);
}

#[test]
fn an_etcd_elsewhere_has_a_secret_of_its_own() {
    let etcd = |anonymous: bool| json!({ "etcd": { "endpoints": ["https://etcd.infra:2379"], "tls": { "secret": "theirs", "anonymous": anonymous } } });
    for anonymous in [false, true] {
        let cluster = cluster(&etcd(anonymous));
        let pods = pods(&cluster);
        assert_eq!(pods.len(), 2, "routers and a group");
        for (pod, told) in &pods {
            assert!(mounts(pod).iter().any(|(volume, path)| {
                volume["secret"]["secretName"] == "theirs" && path == "/etc/galerne/etcd"
            }));
            assert!(told.iter().any(|word| word == "--etcd-ca=/etc/galerne/etcd/ca.crt"), "{told:?}");
            let shown = told.iter().any(|word| word == "--etcd-cert=/etc/galerne/etcd/tls.crt");
            assert_eq!(shown, !anonymous, "{told:?}");
            assert!(
                !told.iter().any(|word| word.starts_with("--cluster-ca")),
                "within the cluster all is open"
            );
        }
    }
}

#[test]
fn cert_manager_is_asked_for_what_pods_mount() {
    let cluster = cluster(&json!({ "tls": { "issuer": { "name": "ours", "kind": "ClusterIssuer" } } }));
    let objects = site(&cluster).shared_objects();
    let Manifest { name, body, .. } =
        objects.iter().find(|it| it.kind == Kind::Certificate).expect("a certificate");
    assert_eq!((name.as_str(), &body["spec"]["dnsNames"]), ("demo-tls", &json!(["galerne"])));
    assert_eq!((&body["apiVersion"], &body["kind"]), (&json!("cert-manager.io/v1"), &json!("Certificate")));
    assert_eq!(body["spec"]["issuerRef"]["kind"], "ClusterIssuer");
    assert_eq!(body["metadata"]["ownerReferences"][0]["uid"], "u");
    for (pod, _) in pods(&cluster) {
        let secret = &body["spec"]["secretName"];
        assert!(mounts(&pod).iter().any(|(volume, _)| volume["secret"]["secretName"] == *secret));
    }
}

#[test]
fn where_there_are_gangs_the_pods_of_a_group_are_one() {
    let gang = |changes: Value| {
        let cluster = cluster(&changes);
        let with = Site { gangs: Some("scheduling.k8s.io/v1alpha2"), ..site(&cluster) };
        assert_eq!(with.revision(), site(&cluster).revision(), "what Kubernetes can makes no other version");
        group_objects(&with, 3, "r")
    };
    let [_, gang_of_two, set] = gang(json!({})).try_into().expect("three objects");
    assert_eq!((gang_of_two.kind, gang_of_two.name.as_str()), (Kind::PodGroup, "demo-g3"));
    assert_eq!(gang_of_two.body["apiVersion"], "scheduling.k8s.io/v1alpha2");
    assert_eq!(gang_of_two.body["spec"]["schedulingPolicy"]["gang"]["minCount"], 2);
    assert_eq!(set.body["spec"]["template"]["spec"]["schedulingGroup"]["podGroupName"], "demo-g3");
    assert_eq!(gang(json!({ "ranksPerHost": 8 })).len(), 2, "a group of one pod is none");
}

#[test]
fn a_version_is_brought_to_a_node_by_a_pod_that_goes_nowhere_else() {
    let hub = json!({ "model": { "name": "m", "hub": "a/b" }, "startSeconds": 90, "placement": { "tolerations": [{ "key": "gpu" }] } });
    let cluster = cluster(&hub);
    let site = site(&cluster);
    let pod = site.preload("node-1", "r");
    assert_ne!(pod.metadata.name, site.preload("node-2", "r").metadata.name);
    let pod = serde_json::to_value(pod).unwrap()["spec"].clone();
    let field = &pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        [0]["matchFields"][0];
    assert_eq!((&field["key"], &field["values"]), (&json!("metadata.name"), &json!(["node-1"])));
    assert_eq!(pod["initContainers"][0]["args"], json!(["model", "fetch", "a/b", "--to=/models/a--b"]));
    assert_eq!(pod["containers"][0]["args"], json!(["model", "preload", "/models/a--b"]));
    assert_eq!((&pod["restartPolicy"], &pod["activeDeadlineSeconds"]), (&json!("Never"), &json!(90)));
    let tolerated = [&pod["tolerations"][0]["key"], &pod["tolerations"][1]["key"]];
    assert_eq!(
        tolerated,
        ["gpu", "nvidia.com/gpu"],
        "it gets where groups get, though it asks for no device"
    );
    assert!(pod["containers"][0]["resources"]["limits"].is_null(), "the page cache would count");
}
