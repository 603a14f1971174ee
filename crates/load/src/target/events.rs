//! Server-sent events of OpenAI's API: what a chunk says about its answer, as cheaply as that can be told.

use galerne_workload::{ErrorKind, Failure};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::failure;

/// Bytes of one line.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Cuts a stream of bytes into events. OpenAI's have one line each.
#[derive(Default)]
pub(super) struct Events {
    partial: Vec<u8>,
}

/// What an event says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A piece of the answer, and perhaps what it cost.
    Chunk {
        /// It has text, or a part of a call.
        said: bool,
        usage: Option<Usage>,
    },
    /// `[DONE]`
    Done,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u32,
    #[serde(default)]
    pub(super) completion_tokens: u32,
}

#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
    usage: Option<Usage>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
    #[serde(borrow)]
    text: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    #[serde(borrow)]
    reasoning_content: Option<&'a RawValue>,
    #[serde(borrow)]
    reasoning: Option<&'a RawValue>,
    #[serde(borrow)]
    tool_calls: Option<&'a RawValue>,
}

impl Events {
    /// Takes bytes in and hands over each event that they end.
    pub(super) fn feed(
        &mut self,
        mut bytes: &[u8],
        mut take: impl FnMut(Event) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
            bytes = rest;
            let event = if self.partial.is_empty() {
                read(line)?
            } else {
                self.partial.extend_from_slice(line);
                let event = read(&self.partial)?;
                self.partial.clear();
                event
            };
            if let Some(event) = event {
                take(event)?;
            }
        }
        self.partial.extend_from_slice(bytes);
        if self.partial.len() > LINE_BYTES_MAX {
            return Err(failure(ErrorKind::Protocol, format!("a line has more than {LINE_BYTES_MAX} bytes")));
        }
        Ok(())
    }
}

/// What a line says; nothing if it is empty, a comment or another field.
fn read(line: &[u8]) -> Result<Option<Event>, Failure> {
    let Some(data) = line.strip_prefix(b"data:") else { return Ok(None) };
    let data = data.trim_ascii();
    if data == b"[DONE]" {
        return Ok(Some(Event::Done));
    }
    let chunk: Chunk<'_> = serde_json::from_slice(data).map_err(|error| {
        failure(ErrorKind::Protocol, format!("an event is no chunk of an answer: {error}"))
    })?;
    if let Some(error) = chunk.error {
        return Err(failure(ErrorKind::Stream, message(error.get().as_bytes())));
    }
    let said = chunk.choices.iter().any(Choice::said);
    Ok(Some(Event::Chunk { said, usage: chunk.usage }))
}

impl Choice<'_> {
    fn said(&self) -> bool {
        let something = |value: &Option<&RawValue>| {
            value.is_some_and(|value| !matches!(value.get(), "\"\"" | "null" | "[]"))
        };
        let in_delta = |delta: &Delta<'_>| {
            let Delta { content, reasoning_content, reasoning, tool_calls } = delta;
            [content, reasoning_content, reasoning, tool_calls].into_iter().any(something)
        };
        something(&self.text) || self.delta.as_ref().is_some_and(in_delta)
    }
}

/// What an error says in OpenAI's, Mistral's and FastAPI's words, or as it is.
pub(super) fn message(body: &[u8]) -> String {
    let value: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let told = [&value["error"]["message"], &value["message"], &value["detail"], &value["error"]];
    match told.into_iter().find_map(|value| value.as_str()) {
        Some(told) => told.to_owned(),
        None => String::from_utf8_lossy(body).trim().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = ": hello\r\n\
        data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\r\n\r\n\
        event: message\n\
        data: {\"choices\":[{\"delta\":{\"content\":\"é\"},\"finish_reason\":null}],\"usage\":null}\n\n\
        data:{\"choices\":[{\"text\":\" x\"}]}\n\n\
        data: {\"choices\":[{\"delta\":{\"tool_calls\":[{\"index\":0}]}}]}\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":null},\"finish_reason\":\"stop\"}]}\n\n\
        data: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":3,\"total_tokens\":8}}\n\n\
        data: [DONE]\n\n";

    fn events<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<Event>, Failure> {
        let (mut events, mut taken) = (Events::default(), Vec::new());
        for piece in pieces {
            events.feed(piece, |event| {
                taken.push(event);
                Ok(())
            })?;
        }
        Ok(taken)
    }

    #[test]
    fn a_stream_says_the_same_wherever_it_is_cut() {
        let chunk = |said| Event::Chunk { said, usage: None };
        let usage = Some(Usage { prompt_tokens: 5, completion_tokens: 3 });
        let expected = [
            chunk(false),
            chunk(true),
            chunk(true),
            chunk(true),
            chunk(false),
            Event::Chunk { said: false, usage },
            Event::Done,
        ];
        assert_eq!(events([STREAM.as_bytes()]).unwrap(), expected);
        assert_eq!(events(STREAM.as_bytes().chunks(1)).unwrap(), expected);
        for cut in 0..STREAM.len() {
            let (before, after) = STREAM.as_bytes().split_at(cut);
            assert_eq!(events([before, after]).unwrap(), expected, "cut at {cut}");
        }
    }

    #[test]
    fn errors_are_told_in_the_servers_words() {
        let failed = |data: &str| events([format!("data: {data}\n").as_bytes()]).unwrap_err();
        let lost = failed("{\"error\":{\"message\":\"the group was lost\",\"code\":503}}");
        assert_eq!((lost.kind, &*lost.message), (ErrorKind::Stream, "the group was lost"));
        assert_eq!(failed("{\"error\":\"full\"}").message, "\"full\"");
        assert_eq!(failed("<html>").kind, ErrorKind::Protocol);
        let told = [
            "{\"error\":{\"message\":\"slow down\"}}",
            "{\"message\":\"slow down\"}",
            "{\"detail\":\"slow down\"}",
            "{\"error\":\"slow down\"}",
            " slow down\n",
        ];
        assert_eq!(told.map(|body| message(body.as_bytes())), ["slow down"; 5]);
    }

    #[test]
    fn a_line_has_an_end() {
        let endless = vec![b'x'; LINE_BYTES_MAX + 1];
        assert_eq!(events([&*endless]).unwrap_err().kind, ErrorKind::Protocol);
    }
}
