//! HTTP: verbs and paths become questions and changes.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{RawQuery, State as Shared};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde_json::{Value, json};

use crate::change::{Deletion, Write};
use crate::kinds::{self, Kind};
use crate::request::{self, Query, Target};
use crate::status::Failure;
use crate::store::{State, Store};
use crate::watch::{metadata_of, watch};

/// Bytes of a body, at most: what etcd takes.
const BODY_BYTES_MAX: usize = 3 << 20;

/// All of the API.
pub(crate) fn routes(store: Arc<Store>) -> Router {
    Router::new()
        .fallback(answer)
        .layer(axum::extract::DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(store)
}

async fn answer(
    Shared(store): Shared<Arc<Store>>,
    method: Method,
    uri: Uri,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    if let Some((group, version)) = request::group_version(uri.path()) {
        return resources(&store.current(), group, version);
    }
    let Some(target) = Target::parse(uri.path()) else { return no_such_page() };
    let query = Query::new(parameters(query.as_deref().unwrap_or_default()));
    let kind = store.current().kind(&target.group, &target.version, &target.plural);
    let Some(kind) = kind else {
        return not_served(&target.group);
    };
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let metadata_only = accept.contains("as=PartialObjectMetadata");
    let watches = method == Method::GET && target.name.is_none() && query.says("watch");
    if kind.plural != "leases" {
        store.count(method == Method::GET, watches);
    }
    if watches {
        let body = watch(store, kind, target.namespace, &query, metadata_only);
        return ([(header::CONTENT_TYPE, "application/json")], body).into_response();
    }
    let request = Request { kind, target, query, headers, body, metadata_only };
    let answered = match method {
        Method::GET => request.get(&store.current()),
        Method::POST => store.change(|state| request.post(state)),
        Method::PUT => store.change(|state| request.put(state)),
        Method::PATCH => store.change(|state| request.patch(state)),
        Method::DELETE => store.change(|state| request.delete(state)),
        _ => Err(Failure::bad("no such verb")),
    };
    match answered {
        Ok((code, object)) => (code, Json(&*object)).into_response(),
        Err(failure) => failure.into_response(),
    }
}

/// What there is of a version of an API group.
fn resources(state: &State, group: &str, version: &str) -> Response {
    let kinds = state.kinds.iter().filter(|kind| kind.group == group && kind.version == version);
    let verbs = ["create", "delete", "get", "list", "patch", "update", "watch"];
    let resource = |kind: &Arc<Kind>| json!({ "name": kind.plural, "singularName": kind.kind.to_lowercase(), "kind": kind.kind, "namespaced": kind.namespaced, "verbs": verbs });
    let resources: Vec<Value> = kinds.map(resource).collect();
    if resources.is_empty() {
        return not_served(group);
    }
    let of = format!("{group}/{version}");
    Json(json!({ "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": of, "resources": resources }))
        .into_response()
}

/// Of a kind or a version that there is not: a `Status` in a group of Kubernetes' own, and a line of text in any other.
fn not_served(group: &str) -> Response {
    let own = group.ends_with(".k8s.io") || !group.contains('.');
    if own { Failure::not_served().into_response() } else { no_such_page() }
}

fn no_such_page() -> Response {
    (StatusCode::NOT_FOUND, "404 page not found\n").into_response()
}

struct Request {
    kind: Arc<Kind>,
    target: Target,
    query: Query,
    headers: HeaderMap,
    body: Bytes,
    metadata_only: bool,
}

type Answer = Result<(StatusCode, Arc<Value>), Failure>;

fn ok(object: impl Into<Arc<Value>>) -> Answer {
    Ok((StatusCode::OK, object.into()))
}

impl Request {
    fn namespace(&self) -> &str {
        self.target.namespace.as_deref().unwrap_or_default()
    }

    fn name(&self) -> Result<&str, Failure> {
        self.target.name.as_deref().ok_or_else(|| Failure::bad("the path names no object"))
    }

    fn json(&self) -> Result<Value, Failure> {
        serde_json::from_slice(&self.body)
            .map_err(|error| Failure::bad(format!("the body is not JSON: {error}")))
    }

    fn write(&self) -> Write {
        let agent =
            self.headers.get(header::USER_AGENT).and_then(|agent| agent.to_str().ok()).unwrap_or("unknown");
        let manager = match (self.query.text("fieldManager"), self.applies()) {
            ("", false) => agent.split('/').next().unwrap_or_default(),
            (manager, _) => manager,
        };
        let subresource =
            ["status", "scale"].into_iter().find(|of| self.target.subresource.as_deref() == Some(of));
        Write { manager: manager.to_owned(), force: self.query.says("force"), subresource }
    }

    fn media(&self) -> &str {
        let media = self.headers.get(header::CONTENT_TYPE).and_then(|media| media.to_str().ok());
        media.unwrap_or_default().split(';').next().unwrap_or_default()
    }

    fn applies(&self) -> bool {
        self.media() == "application/apply-patch+yaml"
    }

    fn get(&self, state: &State) -> Answer {
        let show = |object: &Arc<Value>| match self.metadata_only {
            true => Arc::new(metadata_of(object)),
            false => object.clone(),
        };
        let Ok(name) = self.name() else { return self.list(state, show) };
        let object = state.get(&self.kind, self.namespace(), name)?;
        match self.target.subresource.as_deref() {
            None | Some("status") => ok(show(&object)),
            Some("scale") => {
                let path = self.kind.scale.iter().find(|scale| kinds::at(&object, &scale.spec).is_none());
                if let Some(scale) = path {
                    let path = format!(".{}", scale.spec.join("."));
                    return Err(Failure::internal(&format!(
                        "the spec replicas field {path:?} does not exist"
                    )));
                }
                ok(self.scale(&object)?)
            }
            Some(other) => Err(Failure::not_found("subresource", other)),
        }
    }

    fn list(&self, state: &State, show: impl Fn(&Arc<Value>) -> Arc<Value>) -> Answer {
        let resource = format!("{}/{}", self.kind.group, self.kind.plural);
        let selector = self.query.selector();
        let namespace = self.target.namespace.as_deref();
        let after = self.query.text("continue").split_once('/');
        let from = after.unwrap_or((namespace.unwrap_or_default(), ""));
        let mut rest = state.of_from(&resource, namespace, from).filter(|(place, object)| {
            after.is_none_or(|after| (place.1.as_str(), place.2.as_str()) > after) && selector.takes(object)
        });
        let limit = self.query.number("limit").filter(|limit| *limit > 0).unwrap_or(u64::MAX);
        let mut items = Vec::new();
        let mut last = String::new();
        while (items.len() as u64) < limit
            && let Some((place, object)) = rest.next()
        {
            last = format!("{}/{}", place.1, place.2);
            items.push(show(object));
        }
        let more = if rest.next().is_some() { last } else { String::new() };
        let (version, kind) = (state.version.to_string(), format!("{}List", self.kind.kind));
        let (api_version, kind) = match self.metadata_only {
            true => ("meta.k8s.io/v1".to_owned(), "PartialObjectMetadataList".to_owned()),
            false => (self.kind.api_version(), kind),
        };
        let metadata = json!({ "resourceVersion": version, "continue": more });
        let items: Vec<Value> = items.into_iter().map(Arc::unwrap_or_clone).collect();
        ok(json!({ "apiVersion": api_version, "kind": kind, "metadata": metadata, "items": items }))
    }

    fn post(&self, state: &mut State) -> Answer {
        match self.target.subresource.as_deref() {
            Some("eviction") => self.evict(state),
            Some("binding") => self.bind(state),
            Some(other) => Err(Failure::not_found("subresource", other)),
            None => {
                let created = state.create(&self.kind, self.namespace(), self.json()?, &self.write())?;
                Ok((StatusCode::CREATED, created))
            }
        }
    }

    fn put(&self, state: &mut State) -> Answer {
        if self.target.subresource.as_deref() == Some("scale") {
            return self.rescale(state);
        }
        ok(state.replace(&self.kind, self.namespace(), self.name()?, self.json()?, &self.write())?)
    }

    fn patch(&self, state: &mut State) -> Answer {
        let (name, patch) = (self.name()?, self.json()?);
        match (self.media(), self.target.subresource.as_deref()) {
            ("application/merge-patch+json", Some("scale")) => self.rescale(state),
            ("application/merge-patch+json", _) => {
                ok(state.merge(&self.kind, self.namespace(), name, &patch, &self.write())?)
            }
            ("application/apply-patch+yaml", None | Some("status")) => {
                let there = state.get(&self.kind, self.namespace(), name).is_ok();
                let applied = state.apply(&self.kind, self.namespace(), name, &patch, &self.write())?;
                Ok((if there { StatusCode::OK } else { StatusCode::CREATED }, applied))
            }
            (media, _) => Err(Failure::media(format!("{media} is not served here"))),
        }
    }

    fn delete(&self, state: &mut State) -> Answer {
        let options = if self.body.is_empty() { Value::Null } else { self.json()? };
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let asked = self.query.text("gracePeriodSeconds").parse().ok();
        let how = Deletion {
            grace_s: options["gracePeriodSeconds"].as_i64().or(asked),
            uid: text(&options["preconditions"]["uid"]),
            resource_version: text(&options["preconditions"]["resourceVersion"]),
            orphan: options["propagationPolicy"] == "Orphan",
        };
        ok(state.delete(&self.kind, self.namespace(), self.name()?, &how)?)
    }

    /// An object's scale.
    fn scale(&self, object: &Value) -> Result<Value, Failure> {
        let none = || Failure::not_found("subresource", "scale");
        let scale = self.kind.scale.as_ref().ok_or_else(none)?;
        let number = |path: &[String]| kinds::at(object, path).and_then(Value::as_i64).unwrap_or(0);
        let selector =
            scale.selector.as_ref().and_then(|path| kinds::at(object, path)).cloned().unwrap_or_default();
        let meta = &object["metadata"];
        let metadata = json!({
            "name": meta["name"], "namespace": meta["namespace"], "uid": meta["uid"], "resourceVersion": meta["resourceVersion"],
        });
        Ok(json!({
            "apiVersion": "autoscaling/v1",
            "kind": "Scale",
            "metadata": metadata,
            "spec": { "replicas": number(&scale.spec) },
            "status": { "replicas": number(&scale.status), "selector": selector },
        }))
    }

    /// What `kubectl scale` does.
    fn rescale(&self, state: &mut State) -> Answer {
        let wanted = self.json()?["spec"]["replicas"].clone();
        let scale = self.kind.scale.clone().ok_or_else(|| Failure::not_found("subresource", "scale"))?;
        let mut patch = json!({});
        kinds::put(&mut patch, &scale.spec, wanted);
        let after = state.merge(&self.kind, self.namespace(), self.name()?, &patch, &self.write())?;
        ok(self.scale(&after)?)
    }

    /// A pod gets its node.
    fn bind(&self, state: &mut State) -> Answer {
        let node = self.json()?["target"]["name"].clone();
        let patch = json!({ "spec": { "nodeName": node } });
        state.merge(&self.kind, self.namespace(), self.name()?, &patch, &self.write())?;
        Ok((
            StatusCode::CREATED,
            Arc::new(json!({ "apiVersion": "v1", "kind": "Status", "status": "Success" })),
        ))
    }

    /// A pod is asked to go, if its budgets let it.
    fn evict(&self, state: &mut State) -> Answer {
        let name = self.name()?;
        let pod = state.get(&self.kind, self.namespace(), name)?;
        let running = pod["status"]["phase"] == "Running";
        let budgets = state.of("policy/poddisruptionbudgets", Some(self.namespace()));
        for (_, budget) in budgets {
            let labels = budget["spec"]["selector"]["matchLabels"].as_object().cloned().unwrap_or_default();
            let about = labels.iter().all(|(name, value)| pod["metadata"]["labels"].get(name) == Some(value));
            let unhealthy_may = budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow" && !running;
            if about && !unhealthy_may && budget["spec"]["maxUnavailable"] == 0 {
                return Err(Failure::budget(budget["metadata"]["name"].as_str().unwrap_or_default()));
            }
        }
        state.delete(&self.kind, self.namespace(), name, &Deletion::default())?;
        Ok((
            StatusCode::CREATED,
            Arc::new(json!({ "apiVersion": "v1", "kind": "Status", "status": "Success" })),
        ))
    }
}

/// A query's parameters, decoded.
fn parameters(query: &str) -> BTreeMap<String, String> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| (decode(name), decode(value)))
        .collect()
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digits: Vec<u8> = rest.by_ref().take(2).collect();
                let digits = std::str::from_utf8(&digits).unwrap_or_default();
                u8::from_str_radix(digits, 16).unwrap_or(b'%')
            }
            byte => byte,
        });
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
