//! The faces under TLS, and calls to leaders.

use std::sync::Arc;

use galerne_router::RouterTls;
use galerne_tls::{Alpn, CLUSTER_NAME, Client, ClientFiles, ClusterFiles, Server, ServerFiles, Way, cluster};
use galerne_wire::v1::galerne_client::GalerneClient;
use galerne_wire::v1::{FinishReason, FleetRequest, GenerateRequest, TokenIds, generate_request::Prompt};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, pem::PemObject as _};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tonic::transport::{Channel, Endpoint};

use crate::leader::{Leader, tokens};
use crate::stage::{Stage, patiently};
use authority::Authority;

#[path = "../../../tls/tests/tls/authority.rs"]
mod authority;

fn faces(authority: &Authority, client_ca: Option<&Authority>) -> RouterTls {
    let (cert, key) = authority.issue(&["localhost"]);
    let files = ServerFiles { cert, key, client_ca: client_ca.map(Authority::ca) };
    let http = Some(Server::load(files.clone(), Alpn::Http1).unwrap());
    RouterTls { http, grpc: Some(Server::load(files, Alpn::H2).unwrap()), cluster: Way::Open }
}

fn named(address: &str) -> String {
    address.replace("127.0.0.1", "http://localhost")
}

async fn grpc(stage: &Stage, files: ClientFiles) -> Result<GalerneClient<Channel>, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(named(&stage.grpc)).unwrap();
    let dialer = Client::load(files, Alpn::H2).unwrap().dialer();
    patiently(endpoint.connect_with_connector(dialer)).await.map(GalerneClient::new)
}

/// Asks the HTTP face whether it is well.
async fn https(stage: &Stage, authority: &Authority) -> String {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority.ca()).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(&stage.http).await.unwrap();
    let name = "localhost".try_into().unwrap();
    let mut stream = patiently(TlsConnector::from(Arc::new(config)).connect(name, stream)).await.unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    patiently(stream.read_to_string(&mut answer)).await.unwrap();
    answer
}

#[tokio::test]
async fn both_faces_speak_tls_and_nothing_else() {
    let authority = Authority::new();
    let leader = Leader::start(tokens(&[5], FinishReason::Stop)).await;
    let stage = Stage::secured(&leader, faces(&authority, None)).await;
    let files = ClientFiles { ca: authority.ca(), identity: None, name: None };
    let mut client = grpc(&stage, files.clone()).await.unwrap();
    client.fleet(FleetRequest {}).await.unwrap();
    for address in [&stage.http, &stage.grpc] {
        let mut plain = TcpStream::connect(address).await.unwrap();
        plain.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        // An alert and the end, or a reset.
        let _ = patiently(plain.read_to_end(&mut answer)).await;
        assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    }
    let wrong_protocol = Endpoint::from_shared(named(&stage.http)).unwrap();
    let dialer = Client::load(files, Alpn::H2).unwrap().dialer();
    assert!(patiently(wrong_protocol.connect_with_connector(dialer)).await.is_err(), "h2 on the HTTP face");
    assert!(https(&stage, &authority).await.starts_with("HTTP/1.1 200 OK\r\n"));
    client.fleet(FleetRequest {}).await.unwrap();
}

#[tokio::test]
async fn only_clients_with_a_certificate_are_let_in_if_it_is_so_wanted() {
    let (authority, theirs) = (Authority::new(), Authority::new());
    let leader = Leader::start(tokens(&[5], FinishReason::Stop)).await;
    let stage = Stage::secured(&leader, faces(&authority, Some(&authority))).await;
    for identity in [None, Some(theirs.issue(&["me"]))] {
        let files = ClientFiles { ca: authority.ca(), identity, name: None };
        let refused = match grpc(&stage, files).await {
            Ok(mut client) => client.fleet(FleetRequest {}).await.is_err(),
            Err(_) => true,
        };
        assert!(refused);
    }
    let files = ClientFiles { ca: authority.ca(), identity: Some(authority.issue(&["me"])), name: None };
    grpc(&stage, files).await.unwrap().fleet(FleetRequest {}).await.unwrap();
}

#[tokio::test]
async fn a_leader_that_is_not_of_the_cluster_is_not_asked() {
    let authority = Authority::new();
    let (cert, key) = authority.issue(&[CLUSTER_NAME]);
    let (_, client) = cluster(&ClusterFiles { ca: authority.ca(), cert, key }).unwrap();
    // It speaks in the open; that one under TLS answers is tried with real ranks.
    let mut leader = Leader::start(tokens(&[5], FinishReason::Stop)).await;
    let tls = RouterTls { cluster: Way::Tls(client), ..RouterTls::default() };
    let stage = Stage::secured(&leader, tls).await;
    let prompt = Some(Prompt::Tokens(TokenIds { ids: vec![1] }));
    let request = GenerateRequest { prompt, ..Default::default() };
    assert!(patiently(stage.client().await.generate(request)).await.is_err());
    assert!(leader.requests.try_recv().is_err());
}
