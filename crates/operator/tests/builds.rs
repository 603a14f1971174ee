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
    Site { cluster, image: "galerne:1" }
}

#[test]
fn a_group_over_two_hosts_is_two_pods_that_nobody_evicts() {
    let cluster = cluster(&json!({}));
    let [budget, set] = group_objects(&site(&cluster), 3, "r");
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
    let pods = site.shared_objects().into_iter().chain(group_objects(&site, 0, "r"));
    let pods: Vec<Value> = pods.filter_map(|object| object.body["spec"].get("template").cloned()).collect();
    assert_eq!(pods.len(), 3, "routers, etcd, a group");
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
