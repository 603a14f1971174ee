//! Every limit and interval of the crate, by name.

use std::time::Duration;

/// A rank that does not renew its lease for so long is gone, in seconds. Supervisors evict a dead child at
/// once; this is for hosts that die or are cut off.
pub const LEASE_TTL_S: i64 = 3;
/// A router that does not renew its lease for so long is gone, in seconds. Nothing fails by it: what it told is no sum of
/// anybody's any more.
pub const ROUTER_TTL_S: i64 = 10;
/// Pause between two renewals of a router's lease.
pub const ROUTER_KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(3);
/// A rank that its supervisor saw die is shown as dead for so long, in seconds, unless it is back before.
pub const DEAD_TTL_S: i64 = 10;
/// So long a group waits for a member whose registration is gone, before it goes on without it: longer than one that lives
/// takes to find out that its lease is lost, and to register again.
pub const GONE_AFTER: Duration = Duration::from_secs(2);
/// So long survivors wait for a rank to come back, before they go on with fewer.
pub const SHRINK_AFTER: Duration = Duration::from_millis(700);
/// So long more ranks than a group has must stand before it grows: it begins anew for it.
pub const GROW_AFTER: Duration = Duration::from_secs(3);
/// A rank that waits for time to pass looks again so often.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Pause between two renewals of a lease; two may fail before the lease is at risk.
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(1);
/// A call to etcd, repetitions included, is given up after so long.
pub const CALL_DEADLINE: Duration = Duration::from_secs(2);
/// A call that has no answer for so long is also made anew, perhaps at another member of etcd: far longer than etcd takes.
pub const HEDGE_AFTER: Duration = Duration::from_millis(150);
/// Dialling one endpoint is given up after so long.
pub const DIAL_DEADLINE: Duration = Duration::from_secs(1);
/// First pause after a failed attempt; the next ones double.
pub const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// Longest pause between attempts: below the lease's TTL, so that leases survive etcd's return.
pub const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// The fleet is listed afresh at least so often, whatever the watch told.
pub const RECONCILE_INTERVAL: Duration = Duration::from_secs(30);
/// Whoever has etcd tell what happens asks so often whether it is still there.
pub const ASK_INTERVAL: Duration = Duration::from_millis(500);
/// A member of etcd that has left so many of these questions without an answer is not.
pub const ASKS_MAX: u32 = 2;
/// Whether a watch has told everything is looked at so often: the member that it hangs on may lag behind the others.
pub const LAG_INTERVAL: Duration = Duration::from_secs(2);
/// A watch may be behind for so long.
pub const LAG_MAX: Duration = Duration::from_millis(500);
/// The fleets of all clusters of an etcd are listed afresh at least so often: that is long.
pub const CLUSTERS_RECONCILE_INTERVAL: Duration = Duration::from_secs(300);
/// Pings on an idle connection to etcd. etcd closes connections that ping more often than every 5 s.
pub const PING_INTERVAL: Duration = Duration::from_secs(6);
/// A connection whose ping is not answered for so long is dead.
pub const PING_DEADLINE: Duration = Duration::from_secs(2);
/// Largest listing or batch of events that is taken from etcd, in bytes.
pub const ANSWER_BYTES_MAX: usize = 64 << 20;
