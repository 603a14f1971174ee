//! `galerne.v1.Galerne/Generate`.

use std::error::Error as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use galerne_tls::Client;
use galerne_wire::v1::GenerateRequest;
use galerne_wire::v1::galerne_client::GalerneClient;
use galerne_workload::{Answer, ErrorKind, Failure};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint as Dial};
use tonic::{Code, Request, Status};

use super::failure;
use crate::error::{LoadError, root_cause};
use crate::options::{Endpoint, Limits};
use crate::stopwatch::Stopwatch;

/// A few connections over which requests take turns.
pub(crate) struct Grpc {
    channels: Vec<Channel>,
    next: AtomicUsize,
    bearer: Option<MetadataValue<Ascii>>,
}

impl Grpc {
    /// Makes the connections.
    pub(super) async fn open(
        endpoint: &Endpoint,
        tls: Option<&Arc<Client>>,
        key: Option<&str>,
        limits: &Limits,
    ) -> Result<Self, LoadError> {
        let address = endpoint.address();
        let dial = Dial::from_shared(format!("http://{address}"))
            .map_err(|_| LoadError::Url(endpoint.to_string()))?;
        let dial = dial.connect_timeout(limits.connect_s_max).tcp_nodelay(true);
        let mut channels = Vec::new();
        for _ in 0..limits.grpc_connections {
            let connected = match tls {
                Some(tls) => dial.connect_with_connector(tls.dialer()).await,
                None => dial.connect().await,
            };
            channels.push(connected.map_err(|error| LoadError::connect(&address, error))?);
        }
        let bearer =
            key.map(|key| format!("Bearer {key}").parse().map_err(|_| LoadError::ApiKey)).transpose()?;
        Ok(Self { channels, next: AtomicUsize::new(0), bearer })
    }

    pub(super) async fn ask(
        &self,
        message: GenerateRequest,
        mut watch: Stopwatch,
    ) -> Result<Answer, Failure> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.channels.len();
        let mut request = Request::new(message);
        if let Some(bearer) = &self.bearer {
            request.metadata_mut().insert("authorization", bearer.clone());
        }
        let mut client = GalerneClient::new(self.channels[turn].clone());
        let mut stream = client.generate(request).await.map_err(|status| told(&status))?.into_inner();
        let mut usage = None;
        while let Some(delta) = stream.message().await.map_err(|status| told(&status))? {
            if !delta.tokens.is_empty() {
                watch.tokens(delta.tokens.len() as u32);
            }
            usage = delta.usage.or(usage);
        }
        let Some(usage) = usage else {
            return Err(failure(ErrorKind::Broken, "the stream ended without its usage"));
        };
        Ok(watch.answer(Some(usage.prompt_tokens), Some(usage.completion_tokens)))
    }
}

fn told(status: &Status) -> Failure {
    let kind = match status.code() {
        Code::ResourceExhausted => ErrorKind::Refused,
        code => ErrorKind::Grpc(format!("{code:?}")),
    };
    let broken = status.source().map(|_| root_cause(status)); // what the connection was broken by
    failure(kind, broken.unwrap_or_else(|| status.message().to_owned()))
}
