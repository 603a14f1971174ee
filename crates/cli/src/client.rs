//! A client of a router: where it is, and what it wants to see.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use galerne_tls::{Alpn, Client as TlsClient, ClientFiles};
use galerne_wire::v1::galerne_client::GalerneClient;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// How long a router may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A router's gRPC face.
pub(crate) type Client = GalerneClient<InterceptedService<Channel, Bearer>>;

/// Which router to ask, and as whom.
#[derive(Args, Clone)]
pub(crate) struct ClientArgs {
    /// gRPC address of a router.
    #[arg(long, default_value = "127.0.0.1:8001", value_name = "ADDR")]
    pub(crate) grpc: String,
    /// API key, if the router asks for one.
    #[arg(long, value_name = "KEY", env = "GALERNE_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    #[command(flatten)]
    pub(crate) tls: ClientTlsArgs,
}

/// TLS with a router.
#[derive(Args, Clone)]
pub(crate) struct ClientTlsArgs {
    /// Authority of the router's certificate (PEM): speak TLS with it.
    #[arg(long, value_name = "FILE", env = "GALERNE_TLS_CA")]
    tls_ca: Option<PathBuf>,
    /// Certificate to show to the router (PEM), if it wants to see one.
    #[arg(long, value_name = "FILE", requires_all = ["tls_ca", "tls_key"])]
    tls_cert: Option<PathBuf>,
    /// Its key (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

/// A client over a channel that needs no key.
pub(crate) fn over(channel: Channel) -> Client {
    GalerneClient::with_interceptor(channel, Bearer(None))
}

impl ClientTlsArgs {
    /// The authority, and the certificate and key to show.
    pub(crate) fn files(&self) -> Option<(PathBuf, Option<(PathBuf, PathBuf)>)> {
        let Self { tls_ca, tls_cert, tls_key } = self.clone();
        Some((tls_ca?, tls_cert.zip(tls_key)))
    }

    fn client(&self) -> anyhow::Result<Option<Arc<TlsClient>>> {
        let Some((ca, identity)) = self.files() else { return Ok(None) };
        Ok(Some(TlsClient::load(ClientFiles { ca, identity, name: None }, Alpn::H2)?))
    }
}

impl ClientArgs {
    /// Connects, or says in a sentence why not.
    pub(crate) async fn connect(&self) -> anyhow::Result<Client> {
        let address = &self.grpc;
        let key = self.api_key.as_deref().map(Bearer::header).transpose()?;
        let endpoint = Channel::from_shared(format!("http://{address}"))
            .with_context(|| format!("{address:?} is not an address: give HOST:PORT"))?
            .connect_timeout(CONNECT_TIMEOUT);
        let connected = match self.tls.client()? {
            None => endpoint.connect().await,
            Some(tls) => endpoint.connect_with_connector(tls.dialer()).await,
        };
        let channel = connected.map_err(|error| match explained(&error) {
            Some(says) => anyhow::anyhow!("the router at {address} cannot be reached: {says}"),
            None => {
                anyhow::anyhow!("no router answers at {address}: start one, or give its address with --grpc")
            }
        })?;
        Ok(GalerneClient::with_interceptor(channel, Bearer(key)))
    }
}

/// What a router said, or what the way to it is broken by.
pub(crate) fn said(status: &Status) -> anyhow::Error {
    match (explained(status), status.source()) {
        (Some(says), _) => anyhow::anyhow!("the router cannot be asked: {says}"),
        (None, Some(broken)) => anyhow::anyhow!("the router cannot be asked: {}", root_cause(broken)),
        (None, None) => anyhow::anyhow!("the router answered: {}", status.message()),
    }
}

fn root_cause(mut error: &dyn Error) -> String {
    while let Some(deeper) = error.source() {
        error = deeper;
    }
    error.to_string()
}

/// Why TLS was not agreed on, and what to do about it, if that is what is wrong.
pub(crate) fn explained(error: &dyn Error) -> Option<String> {
    // An alert that says so may be lost with the connection.
    const BROKEN: &str = "if it speaks TLS, name the authority of its certificate with --tls-ca, and if it wants to see one, \
                          a certificate with --tls-cert and --tls-key";
    const SPEAKS_PLAINLY: &str = "it speaks no TLS: leave out --tls-ca";
    const STRANGER: &str = "no authority in --tls-ca has made its certificate";
    const KNOWN: [(&str, &str); 11] = [
        ("UnknownIssuer", STRANGER),
        ("BadSignature", STRANGER),
        ("not valid for name", "its certificate is made for another name: give --grpc that name"),
        (
            "fatal alert",
            "it wants to see a certificate of its clients' authority: name one with --tls-cert and --tls-key",
        ),
        ("InvalidContentType", SPEAKS_PLAINLY),
        ("tls handshake eof", SPEAKS_PLAINLY),
        ("frame with invalid size", BROKEN),
        ("broken pipe", BROKEN),
        ("onnection closed", BROKEN),
        ("onnection reset", BROKEN),
        ("onnection was not ready", BROKEN),
    ];
    let reason = root_cause(error);
    let advice = KNOWN.iter().find(|(words, _)| reason.contains(words));
    advice.map(|(_, advice)| format!("{reason}: {advice}"))
}

/// Shows the API key with every request.
#[derive(Clone)]
pub(crate) struct Bearer(Option<MetadataValue<Ascii>>);

impl Bearer {
    fn header(key: &str) -> anyhow::Result<MetadataValue<Ascii>> {
        let mut value: MetadataValue<Ascii> = format!("Bearer {key}")
            .parse()
            .map_err(|_| anyhow::anyhow!("the API key must be plain ASCII"))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(key) = &self.0 {
            request.metadata_mut().insert("authorization", key.clone());
        }
        Ok(request)
    }
}
