//! How messages are read from a connection: as one piece, which is much faster than byte for byte out of a growing buffer.

use std::marker::PhantomData;

use prost::Message;
use prost::bytes::Buf as _;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder};
use tonic_prost::ProstEncoder;

/// Writes `T`, reads `U`.
#[derive(Debug)]
pub(crate) struct WholeCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for WholeCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: Message + 'static, U: Message + Default + 'static> Codec for WholeCodec<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = WholeDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        WholeDecoder(PhantomData)
    }
}

/// Reads `U`.
#[derive(Debug)]
pub(crate) struct WholeDecoder<U>(PhantomData<U>);

impl<U: Message + Default + 'static> Decoder for WholeDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let bytes = buffer.remaining();
        let message = match buffer.chunk() {
            whole if whole.len() == bytes => {
                let message = U::decode(whole);
                buffer.advance(bytes);
                message
            }
            _ => U::decode(buffer),
        };
        message.map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}
