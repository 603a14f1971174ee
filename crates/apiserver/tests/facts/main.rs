//! What the Kubernetes API's documentation says, and whether this server does so: "Kubernetes API Concepts", "Server-Side Apply",
//! "Finalizers", "Owners and Dependents", "Disruptions", and the reference of each kind. A fact is a request and its answer. With
//! KUBECONFIG the cluster that it names is asked instead: a fact that does not hold there is none.

mod cases;

use std::time::Duration;

use futures_util::StreamExt;
use galerne_apiserver::ApiServer;
use http_body_util::{BodyExt, BodyStream};
use hyper::{Method, Request, Response};
use kube::client::Body;
use kube::{Client, Config};
use serde_json::{Value, json};

const APPLY: &str = "application/apply-patch+yaml";
const MERGE: &str = "application/merge-patch+json";
/// `n` stands for the namespace of the test.
const MAPS: &str = "/api/v1/namespaces/n/configmaps";
const DEADLINE: Duration = Duration::from_secs(20);

/// What is asked, in a namespace that is this test's alone.
struct Server {
    client: Client,
    namespace: String,
    ours: Option<ApiServer>,
}

impl Server {
    async fn start() -> Self {
        let real = std::env::var_os("KUBECONFIG").is_some();
        let ours = if real { None } else { Some(ApiServer::start().await.expect("an API server")) };
        let mut config = match &ours {
            Some(ours) => Config::new(ours.url().parse().expect("a URL")),
            None => Config::infer().await.expect("the cluster that KUBECONFIG names"),
        };
        config.default_retry = false;
        let client = Client::try_from(config).expect("a client");
        let mut server = Self { client, namespace: "n".into(), ours };
        if server.ours.is_none() {
            let made = json!({ "metadata": { "generateName": "galerne-facts-" } });
            let (_, namespace) = post(&server, "/api/v1/namespaces", made).await;
            server.namespace = namespace["metadata"]["name"].as_str().expect("a name").to_owned();
        }
        server
    }

    async fn end(self) {
        // Ours has no such kind, and needs none.
        ask(&self, Method::DELETE, &format!("/api/v1/namespaces/{}", self.namespace), "", Value::Null).await;
    }
}

macro_rules! facts {
    ($($fact:ident),* $(,)?) => {
        $(#[tokio::test]
        async fn $fact() {
            let server = Server::start().await;
            cases::$fact(&server).await;
            server.end().await;
        })*
    };
}

facts! {
    objects_are_created_once_and_conflicts_are_told,
    fields_are_owned_by_those_who_applied_them,
    items_of_lists_are_owned_by_their_keys,
    what_is_not_said_is_added_and_nobodys,
    what_somebody_removes_is_nobodys,
    a_watch_tells_what_changed_since_a_version,
    lists_come_in_pages,
    finalizers_hold_and_owners_take_along,
    pods_end_gracefully_and_budgets_hold_them,
    a_group_tells_what_there_is_of_a_version,
    a_status_is_written_by_itself_and_generations_count_specs,
    custom_resources_keep_to_their_schemas,
    a_scale_without_a_number_is_none,
    names_labels_and_quantities_are_checked,
    a_quota_lets_no_more_in,
}

async fn send(server: &Server, method: Method, path: &str, media: &str, body: Value) -> Response<Body> {
    let path = path.replace("/namespaces/n/", &format!("/namespaces/{}/", server.namespace));
    let body = if body.is_null() { Vec::new() } else { body.to_string().into() };
    let request = Request::builder().method(method).uri(path).header("content-type", media);
    server.client.send(request.body(Body::from(body)).expect("a request")).await.expect("an answer")
}

/// A code, and a body: JSON, or a line of text.
async fn ask(server: &Server, method: Method, path: &str, media: &str, body: Value) -> (u16, Value) {
    let answer = send(server, method, path, media, body).await;
    let code = answer.status().as_u16();
    let bytes = answer.into_body().collect().await.expect("a body").to_bytes();
    let text = || Value::from(String::from_utf8_lossy(&bytes));
    (code, serde_json::from_slice(&bytes).unwrap_or_else(|_| text()))
}

/// Waits until a path answers with this code.
async fn until(server: &Server, path: &str, code: u16) {
    until_it(server, path, |got, _| got == code).await;
}

/// Waits until a path answers so.
async fn until_it(server: &Server, path: &str, is: impl Fn(u16, &Value) -> bool) {
    let answers = async {
        loop {
            let (code, body) = get(server, path).await;
            if is(code, &body) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(DEADLINE, answers)
        .await
        .unwrap_or_else(|_| panic!("{path} does not answer as it should"));
}

async fn get(server: &Server, path: &str) -> (u16, Value) {
    ask(server, Method::GET, path, "", Value::Null).await
}

async fn post(server: &Server, path: &str, body: Value) -> (u16, Value) {
    ask(server, Method::POST, path, "application/json", body).await
}

async fn apply(server: &Server, name: &str, manager: &str, force: bool, mut body: Value) -> (u16, Value) {
    (body["apiVersion"], body["kind"]) = ("v1".into(), "ConfigMap".into());
    body["metadata"]["name"] = name.into();
    let path = format!("{MAPS}/{name}?fieldManager={manager}&force={force}");
    ask(server, Method::PATCH, &path, APPLY, body).await
}

fn map(name: &str) -> Value {
    json!({ "metadata": { "name": name, "labels": { "test": "facts" } }, "data": { "a": "1" } })
}

/// The events of a watch, until there are `count` of them.
async fn events(server: &Server, path: &str, count: usize) -> Vec<(String, Value)> {
    let answer = send(server, Method::GET, path, "", Value::Null).await;
    let mut frames = BodyStream::new(answer.into_body());
    let (mut text, mut events) = (Vec::new(), Vec::new());
    let all = async {
        while events.len() < count {
            let Some(frame) = frames.next().await else { break };
            text.extend_from_slice(&frame.expect("a frame").into_data().expect("data"));
            while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = text.drain(..=end).collect();
                let event: Value = serde_json::from_slice(&line).expect("JSON");
                events.push((event["type"].as_str().expect("a type").to_owned(), event["object"].clone()));
            }
        }
    };
    tokio::time::timeout(DEADLINE, all).await.expect("events in time");
    events
}
