//! Calls over gRPC whose messages are bytes, whatever they are.

use bytes::{Buf, BufMut, Bytes};
use futures_util::StreamExt;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::Outcome;

/// Answers that are read of one call.
const ANSWERS_MAX: usize = 200;

#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// Sends `message` to `method` (`/package.Service/Method`) as the only one of its stream, and reads the answers.
pub(crate) async fn call(channel: &Channel, method: &str, message: &[u8]) -> Outcome {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.expect("a server");
    let method = method.parse().expect("the path of a method");
    let messages = futures_util::stream::iter([message.to_vec()]);
    let outcome = client.streaming(Request::new(messages), method, Raw).await;
    let mut status = match outcome {
        Err(status) => Some(status),
        Ok(answers) => {
            answers
                .into_inner()
                .take(ANSWERS_MAX)
                .filter_map(async |answer| answer.err())
                .boxed()
                .next()
                .await
        }
    };
    match status.take() {
        None => Ok(()),
        // What the transport says of bytes that are no message.
        Some(status) if status.code() == Code::Internal && status.message().contains("decode") => Ok(()),
        Some(status) => {
            let bad = matches!(status.code(), Code::Internal | Code::Unknown | Code::DataLoss);
            assert!(!bad, "it answers {:?}: {}", status.code(), status.message());
            Err(status.message().to_owned())
        }
    }
}
