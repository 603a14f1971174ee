//! A client of a router: where it is, and what it wants to see.

use std::time::Duration;

use anyhow::Context;
use clap::Args;
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
}

impl ClientArgs {
    /// Connects, or says in a sentence why not.
    pub(crate) async fn connect(&self) -> anyhow::Result<Client> {
        let address = &self.grpc;
        let key = self.api_key.as_deref().map(Bearer::header).transpose()?;
        let endpoint = Channel::from_shared(format!("http://{address}"))
            .with_context(|| format!("{address:?} is not an address: give HOST:PORT"))?
            .connect_timeout(CONNECT_TIMEOUT);
        let channel = endpoint.connect().await.with_context(|| {
            format!("no router answers at {address}: start one, or give its address with --grpc")
        })?;
        Ok(GalerneClient::with_interceptor(channel, Bearer(key)))
    }
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
