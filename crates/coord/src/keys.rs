//! Where records lie: `/galerne/CLUSTER/groups/GROUP/{ranks/HOST/INDEX | epoch | health | drain | hold}`, and
//! `/galerne/CLUSTER/{routers/ROUTER | bans/DIGEST}`, which nobody who follows groups is told of.

use std::sync::Arc;

use galerne_types::{GroupId, RankId};

use crate::error::CoordError;

/// Prefix of all keys of all clusters.
pub(crate) const ROOT: &str = "/galerne/";

/// The cluster that a key is of.
pub(crate) fn cluster_of(key: &[u8]) -> Option<&str> {
    std::str::from_utf8(key).ok()?.strip_prefix(ROOT)?.split_once('/').map(|(cluster, _)| cluster)
}

/// The keys of one cluster.
#[derive(Clone, Debug)]
pub(crate) struct Keys {
    groups: Arc<str>,
    routers: Arc<str>,
    bans: Arc<str>,
}

/// What a key holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A rank's registration.
    Rank(GroupId, RankId),
    /// A group's last incarnation.
    Epoch(GroupId),
    /// A leader's word.
    Health(GroupId),
    /// Somebody's wish that the group ends.
    Drain(GroupId),
    /// Somebody's wish that the group gets no requests.
    Hold(GroupId),
}

impl Keys {
    pub(crate) fn new(cluster: &str) -> Result<Self, CoordError> {
        check_name("cluster", cluster)?;
        let prefix = |part: &str| format!("{ROOT}{cluster}/{part}/").into();
        Ok(Self { groups: prefix("groups"), routers: prefix("routers"), bans: prefix("bans") })
    }

    /// Prefix of all keys of the cluster.
    pub(crate) fn groups(&self) -> &str {
        &self.groups
    }

    /// Prefix of the keys of all routers.
    pub(crate) fn routers(&self) -> &str {
        &self.routers
    }

    pub(crate) fn router(&self, router: &str) -> String {
        format!("{}{router}", self.routers)
    }

    /// The router whose record a key holds.
    pub(crate) fn router_name<'a>(&self, key: &'a [u8]) -> Option<&'a str> {
        std::str::from_utf8(key).ok()?.strip_prefix(&*self.routers)
    }

    /// Prefix of the keys of all requests that are refused.
    pub(crate) fn bans(&self) -> &str {
        &self.bans
    }

    pub(crate) fn ban(&self, digest: &str) -> String {
        format!("{}{digest}", self.bans)
    }

    /// The digest of the request that is refused as long as a key is there.
    pub(crate) fn banned<'a>(&self, key: &'a [u8]) -> Option<&'a str> {
        std::str::from_utf8(key).ok()?.strip_prefix(&*self.bans)
    }

    /// Prefix of all keys of a group.
    pub(crate) fn group(&self, group: &GroupId) -> String {
        format!("{}{group}/", self.groups)
    }

    pub(crate) fn rank(&self, group: &GroupId, rank: &RankId) -> String {
        format!("{}{group}/ranks/{rank}", self.groups)
    }

    pub(crate) fn epoch(&self, group: &GroupId) -> String {
        format!("{}{group}/epoch", self.groups)
    }

    pub(crate) fn health(&self, group: &GroupId) -> String {
        format!("{}{group}/health", self.groups)
    }

    pub(crate) fn drain(&self, group: &GroupId) -> String {
        format!("{}{group}/drain", self.groups)
    }

    pub(crate) fn hold(&self, group: &GroupId) -> String {
        format!("{}{group}/hold", self.groups)
    }

    /// What a key of this cluster holds; `None` for keys that are not ours.
    pub(crate) fn place(&self, key: &[u8]) -> Option<Place> {
        let key = std::str::from_utf8(key).ok()?.strip_prefix(&*self.groups)?;
        let (group, rest) = key.split_once('/')?;
        let group = GroupId(group.to_owned());
        match (rest, rest.strip_prefix("ranks/")) {
            (_, Some(rank)) => Some(Place::Rank(group, RankId(rank.to_owned()))),
            ("epoch", None) => Some(Place::Epoch(group)),
            ("health", None) => Some(Place::Health(group)),
            ("drain", None) => Some(Place::Drain(group)),
            ("hold", None) => Some(Place::Hold(group)),
            _ => None,
        }
    }
}

/// A name must not reach into another's keys.
pub(crate) fn check_name(what: &'static str, name: &str) -> Result<(), CoordError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || !name.chars().all(plain) {
        return Err(CoordError::Name { what, name: name.to_owned() });
    }
    Ok(())
}

/// A rank's id is `HOST/INDEX`: each part is a name.
pub(crate) fn check_rank(rank: &RankId) -> Result<(), CoordError> {
    rank.0.split('/').try_for_each(|part| check_name("rank", part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_lead_back_to_their_places() {
        let keys = Keys::new("demo").unwrap();
        let (group, rank) = (GroupId("g0".into()), RankId("host.example/2".into()));
        assert_eq!(keys.rank(&group, &rank), "/galerne/demo/groups/g0/ranks/host.example/2");
        for (key, place) in [
            (keys.rank(&group, &rank), Some(Place::Rank(group.clone(), rank.clone()))),
            (keys.epoch(&group), Some(Place::Epoch(group.clone()))),
            (keys.health(&group), Some(Place::Health(group.clone()))),
            (keys.drain(&group), Some(Place::Drain(group.clone()))),
            (keys.hold(&group), Some(Place::Hold(group.clone()))),
            (format!("{}other", keys.group(&group)), None),
            (keys.groups().to_owned(), None),
            ("/galerne/demo2/groups/g0/epoch".into(), None),
        ] {
            assert_eq!(keys.place(key.as_bytes()), place, "{key}");
        }
        assert_eq!(keys.place(b"/galerne/demo/groups/\xff/epoch"), None);
        assert_eq!(cluster_of(keys.epoch(&group).as_bytes()), Some("demo"));
        assert_eq!(cluster_of(b"/galerne/demo"), None);
        let router = keys.router("r-1");
        assert_eq!(router, "/galerne/demo/routers/r-1");
        assert_eq!((keys.place(router.as_bytes()), keys.router_name(router.as_bytes())), (None, Some("r-1")));
        let ban = keys.ban("5e");
        assert_eq!(ban, "/galerne/demo/bans/5e");
        assert_eq!((keys.place(ban.as_bytes()), keys.banned(ban.as_bytes())), (None, Some("5e")));
    }

    #[test]
    fn names_that_would_reach_elsewhere_are_refused() {
        for name in ["", "a/b", "a b", "caf\u{e9}"] {
            let refused = Keys::new(name).unwrap_err().to_string();
            assert!(refused.contains(&format!("cluster name {name:?}")), "{refused}");
        }
        assert!(check_rank(&RankId("host/0".into())).is_ok());
        assert!(check_rank(&RankId("host//0".into())).is_err());
    }
}
