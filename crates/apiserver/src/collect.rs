//! What goes when its owner goes.

use std::sync::Arc;

use serde_json::Value;

use crate::store::{Place, State, owners};

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
        let mut dependents = self.owned_by(uid);
        dependents.retain(|(_, object)| !owners(object).any(|owner| self.uids.contains(owner)));
        dependents
    }

    fn owned_by(&self, uid: &str) -> Vec<(Place, Arc<Value>)> {
        let places = self.owned.get(uid).into_iter().flatten();
        places.filter_map(|place| Some((place.clone(), self.objects.get(place)?.clone()))).collect()
    }

    /// What an object owns is nobody's from now on.
    pub(crate) fn orphan(&mut self, owner: &Value) {
        let uid = &owner["metadata"]["uid"];
        for (place, object) in self.owned_by(uid.as_str().unwrap_or_default()) {
            let mut orphan = (*object).clone();
            if let Some(references) = orphan["metadata"]["ownerReferences"].as_array_mut() {
                references.retain(|reference| reference["uid"] != *uid);
            }
            self.commit(&place, Some(orphan));
        }
    }
}
