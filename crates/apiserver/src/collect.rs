//! What goes when its owner goes.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::Value;

use crate::store::{Place, State};

impl State {
    /// Removes an object, and whatever then has no owner left. The real one does the latter some time later.
    pub(crate) fn erase(&mut self, place: &Place) -> Arc<Value> {
        let last = self.commit(place, None);
        let uid = last["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
        for (place, object) in self.dependents(&uid) {
            let finalized =
                object["metadata"]["finalizers"].as_array().is_some_and(|finalizers| !finalizers.is_empty());
            let runs = place.0 == "/pods" && object["spec"].get("nodeName").is_some();
            if !finalized && !runs {
                self.erase(&place);
            } else if object["metadata"].get("deletionTimestamp").is_none() {
                let mut ending = (*object).clone();
                ending["metadata"]["deletionTimestamp"] = crate::change::now().into();
                let grace = ending["spec"]["terminationGracePeriodSeconds"].as_i64().unwrap_or(30);
                ending["metadata"]["deletionGracePeriodSeconds"] = grace.into();
                self.commit(&place, Some(ending));
            }
        }
        last
    }

    /// Objects that `uid` owned, and that nobody owns who is still there.
    fn dependents(&self, uid: &str) -> Vec<(Place, Arc<Value>)> {
        let owners = |object: &Value| -> BTreeSet<String> {
            let references = object["metadata"]["ownerReferences"].as_array().into_iter().flatten();
            references.filter_map(|owner| owner["uid"].as_str().map(str::to_owned)).collect()
        };
        let owned: Vec<_> = self.objects.iter().filter(|(_, object)| owners(object).contains(uid)).collect();
        if owned.is_empty() {
            return Vec::new();
        }
        let there: BTreeSet<&str> =
            self.objects.values().filter_map(|object| object["metadata"]["uid"].as_str()).collect();
        let alone = owned
            .into_iter()
            .filter(|(_, object)| !owners(object).iter().any(|owner| there.contains(owner.as_str())));
        alone.map(|(place, object)| (place.clone(), object.clone())).collect()
    }

    /// What an object owns is nobody's from now on.
    pub(crate) fn orphan(&mut self, owner: &Value) {
        let uid = &owner["metadata"]["uid"];
        let of = |object: &Value| {
            let references = object["metadata"]["ownerReferences"].as_array().into_iter().flatten();
            references.filter(|reference| reference["uid"] == *uid).count() > 0
        };
        let owned: Vec<(Place, Arc<Value>)> = self
            .objects
            .iter()
            .filter(|(_, object)| of(object))
            .map(|(place, object)| (place.clone(), object.clone()))
            .collect();
        for (place, object) in owned {
            let mut orphan = (*object).clone();
            if let Some(references) = orphan["metadata"]["ownerReferences"].as_array_mut() {
                references.retain(|reference| reference["uid"] != *uid);
            }
            self.commit(&place, Some(orphan));
        }
    }
}
