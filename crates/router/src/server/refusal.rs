//! What is said to those whom no handler answers.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::places::Full;
use super::{Protocol, ServerLimits};
use crate::limits::RETRY_AFTER_S;

/// Time for a refused client to read why.
const REFUSAL_S_MAX: Duration = Duration::from_secs(1);

/// Tells a connection that there is no place for it, in the words of its protocol.
pub(super) async fn refuse(mut stream: TcpStream, protocol: Protocol, full: Full) {
    let message = match full {
        Full::All(max) => format!("all {max} connections are in use: retry later"),
        Full::Peer(max) => format!("all {max} connections that one address may have are in use: close some"),
    };
    let said = match protocol {
        Protocol::Http1 => response("429 Too Many Requests", "too_many_connections", &message),
        Protocol::Http2 => goaway(&message),
    };
    let told = async {
        stream.write_all(&said).await?;
        stream.shutdown().await?;
        // Bytes left unread would turn the end of this connection into a reset, which takes the answer with it.
        let mut sink = [0; 1024];
        while stream.read(&mut sink).await? > 0 {}
        std::io::Result::Ok(())
    };
    let _ = timeout(REFUSAL_S_MAX, told).await;
}

/// A whole response of HTTP/1.1 with OpenAI's error body, after which the connection is closed.
fn response(status: &str, code: &str, message: &str) -> Vec<u8> {
    let (kind, retry) = match &status[..3] {
        "429" => ("rate_limit_error", format!("retry-after: {RETRY_AFTER_S}\r\n")),
        _ => ("invalid_request_error", String::new()),
    };
    let error = serde_json::json!({ "message": message, "type": kind, "param": null, "code": code });
    let body = serde_json::json!({ "error": error }).to_string();
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{retry}\
         connection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

/// HTTP/2's SETTINGS, which must come first, and GOAWAY with the sentence (RFC 9113, 6.5 and 6.8).
fn goaway(message: &str) -> Vec<u8> {
    const ENHANCE_YOUR_CALM: u32 = 0xb;
    let mut out = vec![0, 0, 0, 4, 0, 0, 0, 0, 0];
    let length = (8 + message.len()) as u32;
    out.extend_from_slice(&length.to_be_bytes()[1..]);
    out.extend_from_slice(&[7, 0, 0, 0, 0, 0]);
    out.extend_from_slice(&0_u32.to_be_bytes()); // no request was taken: all may be sent again
    out.extend_from_slice(&ENHANCE_YOUR_CALM.to_be_bytes());
    out.extend_from_slice(message.as_bytes());
    out
}

/// What a client gets that did not send its request's head in time.
pub(super) fn head_too_slow(limits: &ServerLimits) -> Vec<u8> {
    let seconds = limits.header_s_max.as_secs_f64();
    let message = format!("the request line and the headers did not arrive within {seconds} s");
    response("408 Request Timeout", "header_too_slow", &message)
}

/// hyper refuses a head that it cannot read with a bare status: the same with a sentence. `None` if this is no such
/// response.
pub(super) fn in_words(bare: &[u8], limits: &ServerLimits) -> Option<Vec<u8>> {
    let head = std::str::from_utf8(bare).ok()?;
    if !head.starts_with("HTTP/1.1 4") || !head.ends_with("\r\n\r\n") || head.contains("content-type") {
        return None;
    }
    match &head[9..12] {
        "400" => {
            let message = "the request's line or headers are not HTTP/1.1";
            Some(response("400 Bad Request", "bad_head", message))
        }
        "414" => Some(too_long_target(limits)),
        "431" => {
            Some(response("431 Request Header Fields Too Large", "header_too_large", &head_too_large(limits)))
        }
        _ => None,
    }
}

pub(super) fn head_too_large(limits: &ServerLimits) -> String {
    let ServerLimits { header_bytes_max, headers_max, .. } = limits;
    format!(
        "the request line and the headers must have at most {header_bytes_max} bytes in at most {headers_max} headers"
    )
}

fn too_long_target(limits: &ServerLimits) -> Vec<u8> {
    response("414 URI Too Long", "target_too_long", &target_too_long(limits))
}

pub(super) fn target_too_long(limits: &ServerLimits) -> String {
    format!("a path with its query must have at most {} bytes", limits.target_bytes_max)
}
