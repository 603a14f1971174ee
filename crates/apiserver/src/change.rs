//! What creating, updating, patching and deleting do to an object.

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::apply;
use crate::defaults;
use crate::kinds::{self, Kind};
use crate::status::Failure;
use crate::store::{Place, State};
use crate::validate;

/// Who writes, and what part of an object.
#[derive(Clone, Debug, Default)]
pub(crate) struct Write {
    pub(crate) manager: String,
    pub(crate) force: bool,
    /// The subresource that is written: the status, which has fields of its own, or the scale, which has not.
    pub(crate) subresource: Option<&'static str>,
}

impl Write {
    fn status(&self) -> bool {
        self.subresource == Some("status")
    }
}

/// How something is deleted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Deletion {
    pub(crate) grace_s: Option<i64>,
    pub(crate) uid: Option<String>,
    pub(crate) resource_version: Option<String>,
    pub(crate) orphan: bool,
}

/// StatefulSet's fields that may change.
const STATEFUL_SET: [&str; 7] = [
    "replicas",
    "ordinals",
    "template",
    "updateStrategy",
    "revisionHistoryLimit",
    "persistentVolumeClaimRetentionPolicy",
    "minReadySeconds",
];

pub(crate) fn place(kind: &Kind, namespace: &str, name: &str) -> Place {
    (format!("{}/{}", kind.group, kind.plural), namespace.to_owned(), name.to_owned())
}

impl State {
    pub(crate) fn get(&self, kind: &Kind, namespace: &str, name: &str) -> Result<Arc<Value>, Failure> {
        let found = self.objects.get(&place(kind, namespace, name)).cloned();
        found.ok_or_else(|| Failure::not_found(&kind.plural, name))
    }

    pub(crate) fn create(
        &mut self,
        kind: &Kind,
        namespace: &str,
        mut object: Value,
        write: &Write,
    ) -> Result<Arc<Value>, Failure> {
        let meta = object["metadata"].clone();
        let prefix = meta["generateName"].as_str().map(str::to_owned);
        let generated = prefix.map(|prefix| format!("{prefix}{:05x}", self.fresh()));
        let name = meta["name"].as_str().map(str::to_owned).or(generated);
        let name = name.ok_or_else(|| Failure::invalid(&kind.kind, "", "metadata.name: Required value"))?;
        let place = place(kind, namespace, &name);
        if self.objects.contains_key(&place) {
            return Err(Failure::exists(&kind.plural, &name));
        }
        if meta["resourceVersion"].as_str().is_some_and(|version| !version.is_empty()) {
            return Err(Failure::bad("resourceVersion should not be set on objects to be created"));
        }
        if kind.status {
            object.as_object_mut().map(|object| object.remove("status"));
        }
        self.fill(kind, None, &mut object);
        let fields = apply::fields_of(&object);
        self.born(kind, namespace, &name, &mut object);
        own(&mut object, &write.manager, "Update", kind, None, &fields);
        self.checked(kind, &name, None, &mut object)?;
        if kind.kind == "CustomResourceDefinition" {
            self.define(&mut object);
        }
        Ok(self.commit(&place, Some(object)))
    }

    /// What a new object gets of the server.
    fn born(&mut self, kind: &Kind, namespace: &str, name: &str, object: &mut Value) {
        object["apiVersion"] = kind.api_version().into();
        object["kind"] = kind.kind.clone().into();
        let number = self.fresh();
        let meta = &mut object["metadata"];
        meta["name"] = name.into();
        if kind.namespaced {
            meta["namespace"] = namespace.into();
        }
        meta["uid"] = format!("00000000-0000-4000-8000-{number:012x}").into();
        meta["creationTimestamp"] = now().into();
        meta["generation"] = 1.into();
        if kind.kind == "Pod" {
            object["status"] = json!({ "phase": "Pending" });
        }
    }

    /// Adds what an object does not say; a Service gets an address, which it keeps.
    fn fill(&mut self, kind: &Kind, before: Option<&Value>, object: &mut Value) {
        defaults::fill(&kind.kind, object);
        let Some(spec) = object.get_mut("spec").filter(|spec| kind.kind == "Service" && spec.is_object())
        else {
            return;
        };
        let kept = before.and_then(|before| before["spec"]["clusterIP"].as_str().map(str::to_owned));
        if spec.get("clusterIP").is_none() {
            let number = self.fresh();
            spec["clusterIP"] =
                kept.unwrap_or_else(|| format!("10.96.{}.{}", number / 256 % 256, number % 256)).into();
        }
        spec["clusterIPs"] = json!([spec["clusterIP"]]);
    }

    /// A new definition's kinds are there at once.
    fn define(&mut self, definition: &mut Value) {
        for kind in kinds::defined(definition) {
            self.kinds.retain(|known| {
                (&known.group, &known.version, &known.plural) != (&kind.group, &kind.version, &kind.plural)
            });
            self.kinds.push(kind);
        }
        let condition =
            |kind: &str| json!({ "type": kind, "status": "True", "reason": "NoConflicts", "message": "" });
        definition["status"] =
            json!({ "conditions": [condition("NamesAccepted"), condition("Established")] });
    }

    /// PUT: the whole object, at the version that was read.
    pub(crate) fn replace(
        &mut self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        object: Value,
        write: &Write,
    ) -> Result<Arc<Value>, Failure> {
        let before = self.get(kind, namespace, name)?;
        same_version(kind, &before, &object)?;
        self.update(kind, &before, object, write)
    }

    /// A merge patch (RFC 7386).
    pub(crate) fn merge(
        &mut self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        patch: &Value,
        write: &Write,
    ) -> Result<Arc<Value>, Failure> {
        let before = self.get(kind, namespace, name)?;
        same_version(kind, &before, patch)?;
        let mut after = (*before).clone();
        merge_patch(&mut after, patch);
        self.update(kind, &before, after, write)
    }

    fn update(
        &mut self,
        kind: &Kind,
        before: &Arc<Value>,
        mut after: Value,
        write: &Write,
    ) -> Result<Arc<Value>, Failure> {
        separate(kind, before, &mut after, write.status());
        self.fill(kind, Some(before), &mut after);
        let fields = changed(&apply::fields_of(&after), before, &after);
        if fields.as_object().is_some_and(|fields| !fields.is_empty()) {
            disown_all(&mut after, &fields, |entry| !is(entry, &write.manager, "Update", write.subresource));
            let mut mine = owned(&after, &write.manager, "Update", write.subresource);
            apply::merge("", &mut mine, &fields);
            own(&mut after, &write.manager, "Update", kind, write.subresource, &mine);
        }
        disown_gone(&mut after);
        self.finish(kind, before, after)
    }

    /// Server-side apply.
    pub(crate) fn apply(
        &mut self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        applied: &Value,
        write: &Write,
    ) -> Result<Arc<Value>, Failure> {
        if write.manager.is_empty() {
            let why = "fieldManager: Required value: is required for apply patch";
            return Err(Failure::invalid("PatchOptions.meta.k8s.io", "", why));
        }
        if applied["metadata"].get("managedFields").is_some() {
            return Err(Failure::bad("metadata.managedFields must be nil"));
        }
        let place = place(kind, namespace, name);
        let before = self.objects.get(&place).cloned();
        if before.is_none() && write.status() {
            return Err(Failure::not_found(&kind.plural, name));
        }
        if before.is_none() && applied["metadata"]["name"] != name {
            let why = "undeterminable: name must be provided, and be the one of the path";
            return Err(Failure::bad(format!("the name of the object ({name} based on URL) was {why}")));
        }
        if let Some(before) = &before {
            same_version(kind, before, applied)?;
        }
        let mut applied = applied.clone();
        if let (true, Some(applied)) = (kind.status, applied.as_object_mut()) {
            // The status by its subresource, everything else without it.
            applied.retain(|field, _| match field.as_str() {
                "apiVersion" | "kind" | "metadata" => true,
                field => (field == "status") == write.status(),
            });
        }
        let fields = apply::fields_of(&applied);
        let mut after = before.as_deref().cloned().unwrap_or_else(|| json!({ "metadata": {} }));
        self.settle(&mut after, &applied, &fields, write)?;
        let gone = apply::without(&owned(&after, &write.manager, "Apply", write.subresource), &fields);
        let others = others(&after, write);
        apply::remove(&mut after, &apply::without(&gone, &others));
        apply::merge("", &mut after, &applied);
        self.fill(kind, before.as_deref(), &mut after);
        own(&mut after, &write.manager, "Apply", kind, write.subresource, &fields);
        let Some(before) = before else {
            self.born(kind, namespace, name, &mut after);
            self.checked(kind, name, None, &mut after)?;
            if kind.kind == "CustomResourceDefinition" {
                self.define(&mut after);
            }
            return Ok(self.commit(&place, Some(after)));
        };
        separate(kind, &before, &mut after, write.status());
        self.finish(kind, &before, after)
    }

    /// Fields that others own and that this one wants otherwise: a conflict, or his.
    fn settle(
        &self,
        after: &mut Value,
        applied: &Value,
        fields: &Value,
        write: &Write,
    ) -> Result<(), Failure> {
        let entries = after["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
        let mut conflicts = Vec::new();
        for entry in entries.iter().filter(|entry| !is(entry, &write.manager, "Apply", write.subresource)) {
            let shared = apply::common(fields, &entry["fieldsV1"]);
            if shared == json!({}) {
                continue;
            }
            let differing = apply::differing("", &shared, after, applied);
            let manager = entry["manager"].as_str().unwrap_or_default();
            conflicts.extend(differing.into_iter().map(|field| (field, manager.to_owned())));
        }
        if !conflicts.is_empty() && !write.force {
            return Err(Failure::owned(&conflicts));
        }
        if !conflicts.is_empty() {
            let wanted = changed(fields, after, applied);
            disown_all(after, &wanted, |entry| !is(entry, &write.manager, "Apply", write.subresource));
        }
        Ok(())
    }

    /// Whether the quotas of a namespace let one more object of `kind` in.
    fn in_quota(&self, kind: &Kind, name: &str, object: &Value) -> Result<(), Failure> {
        let namespace = object["metadata"]["namespace"].as_str().filter(|_| kind.built_in && kind.namespaced);
        let resource = format!("{}/{}", kind.group, kind.plural);
        for (_, quota) in
            namespace.into_iter().flat_map(|namespace| self.of("/resourcequotas", Some(namespace)))
        {
            let counted = [kind.plural.clone(), format!("count/{}", kind.resource())];
            let limit = counted.iter().find_map(|of| Some((of, quota["spec"]["hard"].get(of)?)));
            let Some((of, most)) =
                limit.and_then(|(of, most)| Some((of, most.as_str()?.parse::<usize>().ok()?)))
            else {
                continue;
            };
            let used = self.of(&resource, namespace).count();
            if used >= most {
                let quota = quota["metadata"]["name"].as_str().unwrap_or_default();
                let why = format!("{quota}, requested: {of}=1, used: {of}={used}, limited: {of}={most}");
                return Err(Failure::quota(&kind.resource(), name, &why));
            }
        }
        Ok(())
    }

    /// Checks and commits an update; one that changes nothing is no change.
    fn finish(&mut self, kind: &Kind, before: &Arc<Value>, mut after: Value) -> Result<Arc<Value>, Failure> {
        let name = before["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let namespace = before["metadata"]["namespace"].as_str().unwrap_or_default();
        self.checked(kind, &name, Some(before), &mut after)?;
        if sans_times(before) == sans_times(&after) {
            return Ok(before.clone());
        }
        let body = |object: &Value| {
            let mut body = object.as_object().cloned().unwrap_or_default();
            body.retain(|field, _| field != "metadata" && field != "status");
            body
        };
        if body(before) != body(&after) {
            after["metadata"]["generation"] =
                (before["metadata"]["generation"].as_i64().unwrap_or(0) + 1).into();
        }
        let place = place(kind, namespace, &name);
        let free = after["metadata"]["finalizers"].as_array().is_none_or(Vec::is_empty);
        let ends = after["metadata"].get("deletionTimestamp").is_some() && free && kind.kind != "Pod";
        if ends {
            self.commit(&place, Some(after));
            return Ok(self.erase(&place));
        }
        if kind.kind == "CustomResourceDefinition" {
            self.define(&mut after);
        }
        Ok(self.commit(&place, Some(after)))
    }

    fn checked(
        &self,
        kind: &Kind,
        name: &str,
        before: Option<&Value>,
        after: &mut Value,
    ) -> Result<(), Failure> {
        if let Some(before) = before {
            for field in ["uid", "creationTimestamp", "name", "namespace", "deletionTimestamp"] {
                match before["metadata"].get(field) {
                    Some(value) => after["metadata"][field] = value.clone(),
                    None => drop(after["metadata"].as_object_mut().map(|meta| meta.remove(field))),
                }
            }
            after["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"].clone();
        }
        if kind.built_in {
            validate::check(&kind.kind, name, after)?;
        }
        if let Some(schema) = &kind.schema {
            schema.check(after, before).map_err(|why| Failure::invalid(&kind.kind, name, &why))?;
        }
        if let (Some(twice), "Service") = (twice(&after["spec"]["ports"]), &*kind.kind) {
            let why = format!("spec.ports: Duplicate value: {twice:?}");
            return Err(Failure::invalid(&kind.kind, name, &why));
        }
        if before.is_none() {
            self.in_quota(kind, name, after)?;
        }
        if kind.kind == "StatefulSet"
            && let Some(before) = before
        {
            let fixed = |object: &Value| {
                let mut spec = object["spec"].as_object().cloned().unwrap_or_default();
                spec.retain(|field, _| !STATEFUL_SET.contains(&field.as_str()));
                spec
            };
            if fixed(before) != fixed(after) {
                let why = format!(
                    "spec: Forbidden: updates to statefulset spec for fields other than {STATEFUL_SET:?} are forbidden"
                );
                return Err(Failure::invalid(&kind.kind, name, &why));
            }
        }
        Ok(())
    }

    pub(crate) fn delete(
        &mut self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        how: &Deletion,
    ) -> Result<Arc<Value>, Failure> {
        let before = self.get(kind, namespace, name)?;
        let differs = |field: &str, wanted: &Option<String>| {
            wanted.as_deref().is_some_and(|wanted| before["metadata"][field].as_str() != Some(wanted))
        };
        if differs("uid", &how.uid) || differs("resourceVersion", &how.resource_version) {
            return Err(Failure::conflict(&kind.plural, name, "the object does not meet the preconditions"));
        }
        let place = place(kind, namespace, name);
        let grace =
            how.grace_s.or_else(|| before["spec"]["terminationGracePeriodSeconds"].as_i64()).unwrap_or(30);
        let runs = kind.kind == "Pod" && before["spec"].get("nodeName").is_some() && grace > 0;
        let finalized =
            before["metadata"]["finalizers"].as_array().is_some_and(|finalizers| !finalizers.is_empty());
        if how.orphan {
            self.orphan(&before);
        }
        if !runs && !finalized {
            return Ok(self.erase(&place));
        }
        if before["metadata"].get("deletionTimestamp").is_some() {
            return Ok(before);
        }
        let mut after = (*before).clone();
        after["metadata"]["deletionTimestamp"] = now().into();
        after["metadata"]["deletionGracePeriodSeconds"] = if runs { grace } else { 0 }.into();
        Ok(self.commit(&place, Some(after)))
    }
}

/// The present, as the API tells it.
pub(crate) fn now() -> String {
    Timestamp::from_second(Timestamp::now().as_second()).unwrap_or(Timestamp::UNIX_EPOCH).to_string()
}

fn same_version(kind: &Kind, before: &Value, after: &Value) -> Result<(), Failure> {
    let (there, asked) = (&before["metadata"]["resourceVersion"], &after["metadata"]["resourceVersion"]);
    let name = before["metadata"]["name"].as_str().unwrap_or_default();
    let differs = asked.as_str().is_some_and(|asked| !asked.is_empty() && there.as_str() != Some(asked));
    if differs { Err(Failure::modified(&kind.plural, name)) } else { Ok(()) }
}

/// A status is written by its subresource only, and nothing else is.
fn separate(kind: &Kind, before: &Value, after: &mut Value, status: bool) {
    if status {
        let (written, managed) =
            (after.get("status").cloned(), after["metadata"].get("managedFields").cloned());
        *after = before.clone();
        put(after, "status", written);
        put(&mut after["metadata"], "managedFields", managed);
    } else if kind.status {
        put(after, "status", before.get("status").cloned());
    }
}

fn put(object: &mut Value, field: &str, value: Option<Value>) {
    match value {
        Some(value) => object[field] = value,
        None => drop(object.as_object_mut().map(|object| object.remove(field))),
    }
}

fn merge_patch(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else { return *target = patch.clone() };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, value) in patch {
        match value {
            Value::Null => drop(target.as_object_mut().map(|target| target.remove(name))),
            value => merge_patch(&mut target[name], value),
        }
    }
}

fn is(entry: &Value, manager: &str, operation: &str, subresource: Option<&str>) -> bool {
    entry["manager"] == manager
        && entry["operation"] == operation
        && entry["subresource"].as_str() == subresource
}

/// The fields that `manager` owns.
fn owned(object: &Value, manager: &str, operation: &str, subresource: Option<&str>) -> Value {
    let mut entries = object["metadata"]["managedFields"].as_array().into_iter().flatten();
    entries
        .find(|entry| is(entry, manager, operation, subresource))
        .map_or_else(|| json!({}), |entry| entry["fieldsV1"].clone())
}

/// The fields that anybody else owns.
fn others(object: &Value, write: &Write) -> Value {
    let entries = object["metadata"]["managedFields"].as_array().into_iter().flatten();
    let mut all = json!({});
    for entry in entries.filter(|entry| !is(entry, &write.manager, "Apply", write.subresource)) {
        apply::merge("", &mut all, &entry["fieldsV1"]);
    }
    all
}

fn own(
    object: &mut Value,
    manager: &str,
    operation: &str,
    kind: &Kind,
    subresource: Option<&str>,
    fields: &Value,
) {
    let before = owned(object, manager, operation, subresource);
    let mut entries = object["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    let known = entries.iter().any(|entry| is(entry, manager, operation, subresource));
    if known && before == *fields {
        return;
    }
    entries.retain(|entry| !is(entry, manager, operation, subresource));
    let mut entry = json!({
        "manager": manager,
        "operation": operation,
        "apiVersion": kind.api_version(),
        "time": now(),
        "fieldsType": "FieldsV1",
        "fieldsV1": fields,
    });
    if let Some(subresource) = subresource {
        entry["subresource"] = subresource.into();
    }
    entries.push(entry);
    object["metadata"]["managedFields"] = entries.into();
}

/// Takes `fields` from those managers that are `whose`.
fn disown_all(object: &mut Value, fields: &Value, whose: impl Fn(&Value) -> bool) {
    let Some(entries) = object["metadata"]["managedFields"].as_array_mut() else { return };
    for entry in entries.iter_mut().filter(|entry| whose(entry)) {
        entry["fieldsV1"] = apply::without(&entry["fieldsV1"], fields);
    }
    entries.retain(|entry| entry["fieldsV1"].as_object().is_some_and(|fields| !fields.is_empty()));
}

/// A name that two ports have.
fn twice(ports: &Value) -> Option<&str> {
    let names = || ports.as_array().into_iter().flatten().filter_map(|port| port["name"].as_str());
    names().find(|name| names().filter(|other| other == name).count() > 1)
}

/// Nobody owns what is not there any more.
fn disown_gone(object: &mut Value) {
    let Some(mut entries) = object["metadata"]["managedFields"].as_array().cloned() else { return };
    for entry in &mut entries {
        entry["fieldsV1"] = apply::existing(&entry["fieldsV1"], object);
    }
    entries.retain(|entry| entry["fieldsV1"].as_object().is_some_and(|fields| !fields.is_empty()));
    object["metadata"]["managedFields"] = entries.into();
}

/// The part of `fields` whose values in `after` are not those of `before`.
fn changed(fields: &Value, before: &Value, after: &Value) -> Value {
    let mut all = Map::new();
    for (name, inner) in fields.as_object().into_iter().flatten() {
        let (old, new) = (apply::part(before, name), apply::part(after, name));
        let leaf = inner.as_object().is_none_or(Map::is_empty);
        match (old, new) {
            (Some(old), Some(new)) if !leaf => {
                let differing = changed(inner, old, new);
                if differing.as_object().is_some_and(|differing| !differing.is_empty()) {
                    all.insert(name.clone(), differing);
                }
            }
            (old, new) if old != new => drop(all.insert(name.clone(), inner.clone())),
            _ => {}
        }
    }
    Value::Object(all)
}

/// An object without what changes whenever it is written.
fn sans_times(object: &Value) -> Value {
    let mut object = object.clone();
    for entry in object["metadata"]["managedFields"].as_array_mut().into_iter().flatten() {
        entry["time"] = Value::Null;
    }
    object
}
