//! Whom requests are sent to.

mod events;
mod grpc;
mod http;

use galerne_tls::{Alpn, Client, ClientFiles};
use galerne_workload::{Answer, ErrorKind, Failure};

use crate::error::LoadError;
use crate::options::{Api, Limits, TargetOptions};
use crate::stopwatch::Stopwatch;
use crate::write::Body;

use grpc::Grpc;
use http::Http;

pub(crate) enum Target {
    Http(Http),
    Grpc(Grpc),
}

impl Target {
    /// Connects once, so that an endpoint that is not there is told before the run.
    pub(crate) async fn open(options: &TargetOptions, limits: &Limits) -> Result<Self, LoadError> {
        let grpc = options.endpoint.api == Api::Grpc;
        let alpn = if grpc { Alpn::H2 } else { Alpn::Http1 };
        let tls = match (options.endpoint.secure, options.tls.clone()) {
            (false, _) => None,
            (true, None) => return Err(LoadError::NoAuthority(options.endpoint.to_string())),
            (true, Some((ca, identity))) => {
                Some(Client::load(ClientFiles { ca, identity, name: None }, alpn)?)
            }
        };
        let key = options.api_key.as_deref();
        Ok(if grpc {
            Self::Grpc(Grpc::open(&options.endpoint, tls.as_ref(), key, limits).await?)
        } else {
            Self::Http(Http::open(&options.endpoint, tls, key, limits.connect_s_max).await?)
        })
    }

    /// Sends a request and reads its answer to the end.
    pub(crate) async fn ask(&self, body: Body, watch: Stopwatch) -> Result<Answer, Failure> {
        match (self, body) {
            (Self::Http(http), Body::Json(body)) => http.ask(body, watch).await,
            (Self::Grpc(grpc), Body::Message(message)) => grpc.ask(*message, watch).await,
            _ => unreachable!("the writer and the target have the same options"),
        }
    }
}

fn failure(kind: ErrorKind, message: impl Into<String>) -> Failure {
    Failure { kind, message: message.into() }
}
