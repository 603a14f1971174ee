//! A real etcd that wants certificates, or to know who asks.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use etcd_client::{Client, Permission};
use galerne_coord::{Coord, CoordError, EtcdAccess, EtcdLogin, EtcdTls};
use galerne_types::{Group, RankState};
use tokio::time::timeout;

use crate::authority::Authority;
use crate::coord::{rank, rank_id, seen};
use crate::server::{free_address, tool};

const PATIENCE: Duration = Duration::from_secs(20);
/// For what is refused: tries go on for so long.
const SHORT: Duration = Duration::from_millis(500);
const PASSWORD: &str = "PlantedSecret0815";

/// An etcd with flags of its own; it ends with the test.
struct Etcd {
    child: Child,
    endpoint: String,
    peer: String,
    flags: Vec<String>,
    data: tempfile::TempDir,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Etcd {
    fn start(scheme: &str, flags: Vec<String>) -> Self {
        let (endpoint, peer) =
            (format!("{scheme}://{}", free_address()), format!("http://{}", free_address()));
        let data = tempfile::tempdir().unwrap();
        let child = Self::spawn(&endpoint, &peer, &flags, data.path());
        Self { child, endpoint, peer, flags, data }
    }

    /// Ends it, and starts it again with its data and other flags.
    fn restart(&mut self, flags: Option<Vec<String>>) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.flags = flags.unwrap_or(std::mem::take(&mut self.flags));
        self.child = Self::spawn(&self.endpoint, &self.peer, &self.flags, self.data.path());
    }

    fn spawn(endpoint: &str, peer: &str, flags: &[String], data: &Path) -> Child {
        let mut command = Command::new(tool("etcd", "GALERNE_ETCD"));
        command
            .args(["--name=test", "--log-level=fatal", "--unsafe-no-fsync", "--bcrypt-cost=4"])
            .args(flags);
        command.args([format!("--data-dir={}", data.display()), format!("--initial-cluster=test={peer}")]);
        command
            .args(["listen-client-urls", "advertise-client-urls"].map(|flag| format!("--{flag}={endpoint}")));
        command
            .args(["listen-peer-urls", "initial-advertise-peer-urls"].map(|flag| format!("--{flag}={peer}")));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: between fork and exec only prctl is called, which is async-signal-safe.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        command.spawn().expect("etcd: set GALERNE_ETCD to its path, or let `make test` fetch it")
    }

    async fn connect(&self, access: &EtcdAccess, timeout: Duration) -> Result<Coord, CoordError> {
        Coord::connect_as(access, std::slice::from_ref(&self.endpoint), "c", timeout).await
    }

    /// What it says to one who asks like this.
    async fn refuses(&self, access: &EtcdAccess) -> String {
        self.connect(access, SHORT).await.err().expect("refused").to_string()
    }

    /// Lets in `galerne`, who may use our keys, `nobody`, who may use none, and returns what `root` may do all with.
    async fn enable_auth(&self) -> Client {
        self.connect(&EtcdAccess::default(), PATIENCE).await.unwrap();
        let mut admin = Client::connect([&self.endpoint], None).await.unwrap();
        for user in ["root", "galerne", "nobody"] {
            admin.user_add(user, PASSWORD, None).await.unwrap();
        }
        admin.role_add("galerne").await.unwrap();
        let keys = Permission::read_write("/galerne/").with_prefix();
        admin.role_grant_permission("galerne", keys).await.unwrap();
        admin.user_grant_role("galerne", "galerne").await.unwrap();
        admin.user_grant_role("root", "root").await.unwrap();
        admin.auth_enable().await.unwrap();
        admin.update_user(Some(("root".into(), PASSWORD.into()))).await.unwrap();
        admin
    }
}

/// Flags of an etcd that shows a certificate of `authority`, and, if it `asks`, wants to see one.
fn tls(authority: &Authority, asks: bool) -> Vec<String> {
    let (cert, key) = authority.issue(&["localhost", "127.0.0.1"]);
    let file = |flag: &str, path: &Path| format!("--{flag}={}", path.display());
    let mut flags = vec![file("cert-file", &cert), file("key-file", &key)];
    if asks {
        flags.extend(["--client-cert-auth".to_owned(), file("trusted-ca-file", &authority.ca())]);
    }
    flags
}

fn with_tls(ca: &Authority, identity: Option<(PathBuf, PathBuf)>) -> EtcdAccess {
    EtcdAccess { tls: Some(EtcdTls { ca: ca.ca(), identity, name: None }), login: None }
}

fn with_login(user: &str, password_file: PathBuf) -> EtcdAccess {
    EtcdAccess { tls: None, login: Some(EtcdLogin { user: user.to_owned(), password_file }) }
}

#[tokio::test]
async fn etcd_is_believed_only_with_the_right_certificate() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let mut etcd = Etcd::start("https", tls(&ours, false));
    let coord = etcd.connect(&with_tls(&ours, None), PATIENCE).await.unwrap();
    assert!(coord.fleet().await.unwrap().groups.is_empty());

    let stranger = etcd.refuses(&with_tls(&theirs, None)).await;
    assert!(
        stranger.starts_with(&format!("etcd at {} does not answer (invalid peer", etcd.endpoint)),
        "{stranger}"
    );
    assert!(stranger.contains("no authority in --etcd-ca has made etcd's certificate"), "{stranger}");
    let open = etcd.refuses(&EtcdAccess::default()).await;
    assert!(open.ends_with("wants TLS: name the authority of etcd's certificate with --etcd-ca"), "{open}");
    let (cert, key) = ours.issue(&["me"]);
    let absent = etcd.refuses(&with_tls(&ours, Some(("/nowhere/cert.pem".into(), key)))).await;
    assert!(
        absent.starts_with("/nowhere/cert.pem, which is needed to speak to etcd, cannot be used"),
        "{absent}"
    );
    assert!(cert.exists());

    etcd.restart(Some({
        let (cert, key) = ours.issue(&["elsewhere"]);
        vec![format!("--cert-file={}", cert.display()), format!("--key-file={}", key.display())]
    }));
    let misnamed = etcd.connect(&with_tls(&ours, None), 4 * SHORT).await.err().unwrap().to_string();
    assert!(misnamed.contains("etcd's certificate must be made for the host of its endpoint"), "{misnamed}");
    let mut by_name = with_tls(&ours, None);
    by_name.tls.as_mut().unwrap().name = Some("elsewhere".into());
    etcd.connect(&by_name, PATIENCE).await.unwrap().answers().await.unwrap();

    let plain = Etcd::start("http", Vec::new());
    plain.connect(&EtcdAccess::default(), PATIENCE).await.unwrap();
    let endpoint = plain.endpoint.replace("http", "https");
    let deaf =
        Coord::connect_as(&with_tls(&ours, None), &[endpoint], "c", SHORT).await.err().unwrap().to_string();
    assert!(deaf.contains("nobody speaks TLS there"), "{deaf}");
    let plainly = plain.refuses(&with_tls(&ours, None)).await;
    assert!(plainly.ends_with("is not HOST:PORT or https://HOST:PORT"), "{plainly}");
}

#[tokio::test]
async fn etcd_sees_our_certificate_and_the_new_one_when_it_changes() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let mut etcd = Etcd::start("https", tls(&ours, true));
    let (cert, key) = ours.issue(&["me"]);
    let coord = etcd.connect(&with_tls(&ours, Some((cert.clone(), key.clone()))), PATIENCE).await.unwrap();
    let mut fleet = coord.watch_fleet();
    let _rank = coord.register(rank(0, 1)).await.unwrap();
    patiently(seen(&mut fleet, |group| group.ranks.contains_key(&rank_id(0)))).await;

    let nameless = etcd.refuses(&with_tls(&ours, None)).await;
    assert!(nameless.contains("name one with --etcd-cert and --etcd-key"), "{nameless}");
    let stranger = etcd.refuses(&with_tls(&ours, Some(theirs.issue(&["stranger"])))).await;
    assert!(stranger.contains("does not answer ("), "{stranger}");

    // Etcd comes back with another authority: the files that are there by then are used, by ranks and by watches.
    std::fs::copy(theirs.ca(), ours.ca()).unwrap();
    let (new_cert, new_key) = theirs.issue(&["me"]);
    std::fs::copy(new_cert, cert).unwrap();
    std::fs::copy(new_key, key).unwrap();
    etcd.restart(Some(tls(&theirs, true)));
    let again = rank(1, 1);
    let _second = loop {
        match coord.register(again.clone()).await {
            Ok(registered) => break registered,
            Err(error) => assert!(matches!(error, CoordError::Unreachable { .. }), "{error}"),
        }
    };
    patiently(seen(&mut fleet, |group| group.ranks.contains_key(&rank_id(1)))).await;
}

#[tokio::test]
async fn etcd_is_told_who_asks() {
    let etcd = Etcd::start("http", Vec::new());
    let files = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        std::fs::write(files.path().join(name), text).unwrap();
        files.path().join(name)
    };
    let (right, wrong) = (file("right", &format!("{PASSWORD}\n")), file("wrong", "PlantedSecret0816"));
    etcd.connect(&EtcdAccess::default(), PATIENCE).await.unwrap();
    let open = etcd.refuses(&with_login("galerne", right.clone())).await;
    assert!(
        open.ends_with("authentication is not enabled: leave out --etcd-user, or enable it at etcd"),
        "{open}"
    );

    etcd.enable_auth().await;
    let coord = etcd.connect(&with_login("galerne", right.clone()), PATIENCE).await.unwrap();
    assert!(coord.fleet().await.unwrap().groups.is_empty());
    for (access, says) in [
        (EtcdAccess::default(), "etcd wants to know who asks: name --etcd-user and --etcd-password-file"),
        (with_login("galerne", wrong), "look at --etcd-user and at what stands in --etcd-password-file"),
        (
            with_login("nobody", right),
            "grant the user of --etcd-user to read and write all keys below /galerne/",
        ),
    ] {
        let refused = etcd.refuses(&access).await;
        assert!(refused.starts_with(&format!("etcd at {} refused to connect: ", etcd.endpoint)), "{refused}");
        assert!(refused.ends_with(says), "{refused}");
        assert!(!refused.contains("PlantedSecret"), "{refused}");
    }
    let absent = etcd.refuses(&with_login("galerne", "/nowhere/password".into())).await;
    assert!(absent.starts_with("/nowhere/password, which is needed"), "{absent}");
    assert!(!format!("{:?}", with_login("galerne", file("right", PASSWORD))).contains(PASSWORD));
}

/// Tokens that last a second, of a lease that lasts three: it is renewed, written and watched all the same.
#[tokio::test]
async fn a_rank_and_its_watchers_outlive_their_tokens() {
    let files = tempfile::tempdir().unwrap();
    let key = files.path().join("token.key");
    std::fs::write(&key, "0123456789abcdef0123456789abcdef").unwrap();
    let tokens = format!("--auth-token=jwt,sign-method=HS256,priv-key={},ttl=1s", key.display());
    let mut etcd = Etcd::start("http", vec![tokens]);
    let password = files.path().join("password");
    std::fs::write(&password, PASSWORD).unwrap();
    let mut admin = etcd.enable_auth().await;
    let coord = etcd.connect(&with_login("galerne", password.clone()), PATIENCE).await.unwrap();
    let mut fleet = coord.watch_fleet();
    let registration = coord.register(rank(0, 1)).await.unwrap();
    patiently(seen(&mut fleet, holds(0))).await;
    let lost = timeout(Duration::from_secs(5), seen(&mut fleet, |group| group.ranks.is_empty())).await;
    assert!(lost.is_err(), "the lease ended with a token");
    registration.update(RankState::Ready, 1);
    patiently(seen(&mut fleet, holds(1))).await;

    // Another user comes: the tokens of all are of an old revision.
    admin.update_user(Some(("root".into(), PASSWORD.into()))).await.unwrap();
    admin.user_add("another", PASSWORD, None).await.unwrap();
    registration.update(RankState::Ready, 2);
    patiently(seen(&mut fleet, holds(2))).await;

    // Its password is another one, and the file says so a moment later; then etcd starts anew.
    admin.update_user(Some(("root".into(), PASSWORD.into()))).await.unwrap();
    admin.user_change_password("galerne", "another").await.unwrap();
    std::fs::write(&password, "another\n").unwrap();
    etcd.restart(None);
    registration.update(RankState::Ready, 3);
    patiently(seen(&mut fleet, holds(3))).await;
}

async fn patiently<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("within patience")
}

/// Whether the rank is there and was written last with so much memory.
fn holds(memory_bytes: u64) -> impl Fn(&Group) -> bool {
    move |group| group.ranks.get(&rank_id(0)).is_some_and(|rank| rank.memory_bytes == memory_bytes)
}
