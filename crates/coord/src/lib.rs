//! etcd: leases, group formation, epochs and the fleet view; an embedded store for one machine.
//!
//! A rank [registers](Coord::register) under a lease. When enough compatible ranks stand, the one that would
//! be rank 0 writes the **epoch** in one transaction; the transaction's revision is the epoch's number, and it
//! fences everything older. The leader [declares](Registration::declare) its group's health under its lease,
//! in a transaction that holds only while its epoch is the last one. Routers [watch](Coord::watch_fleet).
//!
//! Records are JSON under `/galerne/CLUSTER/groups/GROUP/`: `ranks/HOST/INDEX`, `epoch` and `health`, so
//! `etcdctl get --prefix /galerne` shows a fleet; routers [tell](Coord::tell) beside it of their requests, and of those that
//! [all refuse](Coord::tell_bans).
//! A value that does not parse is logged and taken for absent.
//!
//! There is one client, on `etcd-client`, for a real etcd and for the [`embedded`] store alike. Every call has
//! a deadline; losing etcd is not losing the view.

mod access;
mod backoff;
mod clusters;
mod coord;
pub mod embedded;
mod error;
mod etcd;
mod fleet;
mod formation;
mod keys;
pub mod limits;
mod place;
mod registration;
#[cfg(test)]
mod simulation;
mod telling;
mod view;

pub use access::{EtcdAccess, EtcdLogin, EtcdTls};
pub use clusters::Clusters;
pub use coord::Coord;
pub use error::CoordError;
pub use formation::{Ended, Formation, Need, formation, need};
pub use registration::{Formed, Registration};
