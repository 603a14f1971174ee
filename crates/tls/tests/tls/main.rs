//! Servers and clients with real certificates.

mod authority;
mod opening;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use authority::Authority;
use galerne_tls::{
    Alpn, CLUSTER_NAME, Client, ClientFiles, ClusterFiles, Server, ServerFiles, cluster, incoming,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::StreamExt as _;
use tonic::transport::Uri;
use tower_service::Service as _;

const PATIENCE: Duration = Duration::from_secs(20);

/// What is said on a connection here, again and again: HTTP/2's preface, without which none opens.
const WORD: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

async fn patiently<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("within patience")
}

fn server(authority: &Authority, names: &[&str], client_ca: Option<&Authority>) -> Arc<Server> {
    let (cert, key) = authority.issue(names);
    let files = ServerFiles { cert, key, client_ca: client_ca.map(Authority::ca) };
    Server::load(files, Alpn::H2).unwrap()
}

fn client(authority: &Authority, identity: Option<(&Authority, &str)>) -> Arc<Client> {
    let identity = identity.map(|(authority, name)| authority.issue(&[name]));
    Client::load(ClientFiles { ca: authority.ca(), identity, name: None }, Alpn::H2).unwrap()
}

/// Serves what comes, echoing it, and returns the port.
async fn echo(server: impl Into<Option<Arc<Server>>>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut connections = incoming(listener, server.into());
    tokio::spawn(async move {
        while let Some(Ok(stream)) = connections.next().await {
            tokio::spawn(async move {
                let (mut read, mut write) = tokio::io::split(stream);
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    port
}

/// Sends a word and reads it back.
async fn say(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<()> {
    stream.write_all(WORD).await?;
    let mut heard = [0; WORD.len()];
    patiently(stream.read_exact(&mut heard)).await?;
    assert_eq!(&heard, WORD);
    Ok(())
}

/// One connection, open.
struct Call(<galerne_tls::Dialer as tower_service::Service<Uri>>::Response);

impl Call {
    async fn to(client: &Arc<Client>, host: &str, port: u16) -> io::Result<Self> {
        let uri = Uri::try_from(format!("http://{host}:{port}")).unwrap();
        patiently(client.dialer().call(uri)).await.map(Self)
    }

    /// Sends a word and reads it back. A client learns here that its certificate is refused: TLS 1.3 tells it late.
    async fn word(&mut self) -> io::Result<()> {
        say(self.0.inner_mut()).await
    }

    fn server_certificate(&self) -> Vec<u8> {
        self.0.inner().get_ref().1.peer_certificates().unwrap()[0].to_vec()
    }
}

#[tokio::test]
async fn a_client_believes_only_its_authority_and_the_right_name() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let port = echo(server(&ours, &["localhost", "127.0.0.1"], None)).await;
    for host in ["localhost", "127.0.0.1"] {
        Call::to(&client(&ours, None), host, port).await.unwrap().word().await.unwrap();
    }
    let stranger = Call::to(&client(&theirs, None), "localhost", port).await.err().unwrap();
    assert!(stranger.to_string().contains("invalid peer certificate"), "{stranger}");
    let port = echo(server(&ours, &["elsewhere"], None)).await;
    let misnamed = Call::to(&client(&ours, None), "localhost", port).await.err().unwrap();
    assert!(misnamed.to_string().contains("not valid for name"), "{misnamed}");
}

#[tokio::test]
async fn a_server_that_wants_certificates_refuses_all_others() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let port = echo(server(&ours, &["localhost"], Some(&ours))).await;
    for identity in [None, Some((&theirs, "me"))] {
        let refused = match Call::to(&client(&ours, identity), "localhost", port).await {
            Ok(mut call) => call.word().await,
            Err(error) => Err(error),
        };
        assert!(refused.is_err());
    }
    Call::to(&client(&ours, Some((&ours, "me"))), "localhost", port).await.unwrap().word().await.unwrap();
}

#[tokio::test]
async fn new_certificates_serve_new_connections_and_old_connections_go_on() {
    let authority = Authority::new();
    let server = server(&authority, &["localhost"], None);
    let (port, client) = (echo(server.clone()).await, client(&authority, None));
    let mut before = Call::to(&client, "localhost", port).await.unwrap();
    before.word().await.unwrap();
    assert!(!server.reload().unwrap(), "nothing has changed");
    let (cert, _) = authority.issue(&["localhost"]);
    assert!(server.reload().unwrap());
    let mut after = Call::to(&client, "localhost", port).await.unwrap();
    after.word().await.unwrap();
    before.word().await.unwrap();
    assert_ne!(before.server_certificate(), after.server_certificate());

    std::fs::write(&cert, "broken").unwrap();
    let says = server.reload().unwrap_err().to_string();
    assert_eq!(says, format!("{} holds no certificate in PEM form", cert.display()));
    let mut still = Call::to(&client, "localhost", port).await.unwrap();
    still.word().await.unwrap();
    assert_eq!(still.server_certificate(), after.server_certificate(), "the last good ones hold");
}

#[tokio::test]
async fn a_client_shows_its_new_certificate_after_a_reload() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let port = echo(server(&ours, &["localhost"], Some(&ours))).await;
    let (cert, key) = theirs.issue(&["me"]);
    let files = ClientFiles { ca: ours.ca(), identity: Some((cert.clone(), key.clone())), name: None };
    let client = Client::load(files, Alpn::H2).unwrap();
    let refused = async || Call::to(&client, "localhost", port).await?.word().await;
    assert!(refused().await.is_err());
    let (good_cert, good_key) = ours.issue(&["me"]);
    std::fs::copy(good_cert, &cert).unwrap();
    std::fs::copy(good_key, &key).unwrap();
    assert!(client.reload().unwrap());
    Call::to(&client, "localhost", port).await.unwrap().word().await.unwrap();
}

#[tokio::test]
async fn those_who_do_not_speak_tls_disturb_nobody() {
    let authority = Authority::new();
    let (port, client) = (echo(server(&authority, &["localhost"], None)).await, client(&authority, None));
    let mut call = Call::to(&client, "localhost", port).await.unwrap();
    let silent = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let mut plain = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // An alert, and the end, or a reset: no answer either way.
    let _ = patiently(plain.read_to_end(&mut answer)).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    call.word().await.unwrap();
    Call::to(&client, "localhost", port).await.unwrap().word().await.unwrap();
    drop(silent);

    let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = plain.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = plain.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    });
    assert!(Call::to(&client, "localhost", port).await.is_err());
}

#[tokio::test]
async fn within_a_cluster_a_certificate_says_who_belongs_to_it() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let member = |authority: &Authority, name: &str| {
        let (cert, key) = authority.issue(&[name]);
        cluster(&ClusterFiles { ca: authority.ca(), cert, key }).unwrap()
    };
    let (server, client) = member(&ours, CLUSTER_NAME);
    let port = echo(server).await;
    Call::to(&client, "127.0.0.1", port).await.unwrap().word().await.unwrap();
    let (_, stranger) = member(&theirs, CLUSTER_NAME);
    assert!(Call::to(&stranger, "127.0.0.1", port).await.is_err());
    let (outsider, _) = member(&ours, "outsider");
    let port = echo(outsider).await;
    assert!(Call::to(&client, "127.0.0.1", port).await.is_err(), "made for another name");
}

#[test]
fn wrong_files_are_one_sentence_each() {
    let (authority, other) = (Authority::new(), Authority::new());
    let (cert, key) = authority.issue(&["localhost"]);
    let (_, other_key) = other.issue(&["localhost"]);
    let empty = authority.file("empty.pem", "");
    let (expired, expired_key) = authority.issue_expired("old");
    let says = |cert: &Path, key: &Path, client_ca: Option<&Path>| {
        let client_ca = client_ca.map(Path::to_owned);
        let files = ServerFiles { cert: cert.to_owned(), key: key.to_owned(), client_ca };
        Server::load(files, Alpn::Http1).err().unwrap().to_string()
    };
    let absent = Path::new("/nowhere/cert.pem");
    assert!(says(absent, &key, None).starts_with("/nowhere/cert.pem cannot be read: No such file"));
    assert!(says(&empty, &key, None).ends_with("empty.pem holds no certificate in PEM form"));
    assert!(says(&cert, &cert, None).ends_with("localhost.pem holds no private key in PEM form"));
    assert!(says(&cert, &key, Some(&key)).ends_with("localhost.key holds no certificate in PEM form"));
    assert!(says(&expired, &expired_key, None).ends_with("old.pem expired on 2001-12-31: renew it"));
    let pair = says(&cert, &other_key, None);
    assert!(pair.contains("cannot be used with the key in") && pair.contains("KeyMismatch"), "{pair}");
    let named = ClientFiles { ca: authority.ca(), identity: None, name: Some("a b".to_owned()) };
    assert!(Client::load(named, Alpn::H2).err().unwrap().to_string().contains("no name"));
}
