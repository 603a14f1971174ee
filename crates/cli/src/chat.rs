//! `galerne chat`: a conversation with a running cluster.

mod terminal;

use std::io::{BufRead, IsTerminal, Write};
use std::time::Instant;

use clap::Args;
use galerne_wire::v1::generate_request::Prompt;
use galerne_wire::v1::{Chat as Conversation, ChatMessage, FinishReason, GenerateRequest, Sampling};
use tokio::signal::unix::{SignalKind, signal};

use crate::client::{self, Client, ClientArgs};

use terminal::{Line, Terminal};

/// Talks with the model: one answer to PROMPT, or a conversation.
///
/// In a terminal, lines are edited and remembered; Ctrl-C stops an answer, Ctrl-D or /quit ends the conversation, /new
/// begins another one. Elsewhere each line of standard input is a turn.
#[derive(Args)]
pub(crate) struct Chat {
    #[command(flatten)]
    router: ClientArgs,
    /// Model to ask; by default the only one that is served.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "NAME")]
    model: String,
    /// What the model is told before the conversation.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// 0 is greedy: the same answer each time.
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    temperature: f32,
    /// Makes a sampled answer repeatable.
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// Most tokens of an answer.
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    max_tokens: u32,
    /// Remember no lines for the next conversation.
    #[arg(long)]
    no_history: bool,
    /// What to ask; without it, a conversation.
    prompt: Option<String>,
}

impl Chat {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let mut client = self.router.connect().await?;
        let mut messages = self.opening();
        if let Some(prompt) = &self.prompt {
            return self.turn(&mut client, &mut messages, prompt.clone()).await;
        }
        if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
            return self.converse(client, messages).await;
        }
        for line in std::io::stdin().lock().lines() {
            self.turn(&mut client, &mut messages, line?).await?;
        }
        Ok(())
    }

    /// A conversation in a terminal; an answer that fails does not end it.
    async fn converse(&self, mut client: Client, mut messages: Vec<ChatMessage>) -> anyhow::Result<()> {
        let mut terminal = Terminal::open(!self.no_history)?;
        println!("Ctrl-C stops an answer; /new begins anew; Ctrl-D or /quit ends.");
        loop {
            match terminal.line()? {
                Line::Text(text) => {
                    if let Err(error) = self.turn(&mut client, &mut messages, text).await {
                        eprintln!("error: {error}");
                    }
                }
                Line::New => messages = self.opening(),
                Line::End => return terminal.close(),
            }
        }
    }

    fn opening(&self) -> Vec<ChatMessage> {
        self.system.iter().map(|text| message("system", text.clone())).collect()
    }

    /// One question and its answer, both of which stay in `messages` unless there is none.
    async fn turn(
        &self,
        client: &mut Client,
        messages: &mut Vec<ChatMessage>,
        content: String,
    ) -> anyhow::Result<()> {
        messages.push(message("user", content));
        let sampling =
            Sampling { temperature: Some(self.temperature), seed: self.seed, ..Sampling::default() };
        match ask(client, &self.model, messages.clone(), sampling, self.max_tokens).await {
            Ok(answer) if answer.is_empty() => {
                messages.pop();
            }
            Ok(answer) => messages.push(message("assistant", answer)),
            Err(error) => {
                messages.pop();
                return Err(error);
            }
        }
        Ok(())
    }
}

fn message(role: &str, content: String) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content, ..Default::default() }
}

/// Streams one answer to standard output and returns it, or as much of it as there was before Ctrl-C. On a terminal its
/// speed follows.
pub(crate) async fn ask(
    client: &mut Client,
    model: &str,
    messages: Vec<ChatMessage>,
    sampling: Sampling,
    max_tokens: u32,
) -> anyhow::Result<String> {
    let request = GenerateRequest {
        model: model.to_owned(),
        prompt: Some(Prompt::Chat(Conversation { messages, ..Default::default() })),
        sampling: Some(sampling),
        max_tokens: Some(max_tokens),
        ..GenerateRequest::default()
    };
    let said = |status: tonic::Status| client::said(&status);
    let mut pace = Pace::begin();
    let (mut answer, mut out) = (String::new(), std::io::stdout());
    // One for the whole answer: it remembers what comes between two tokens.
    let mut interrupts = signal(SignalKind::interrupt())?;
    let mut stream = tokio::select! {
        stream = client.generate(request) => stream.map_err(said)?.into_inner(),
        _ = interrupts.recv() => {
            writeln!(out, " [stopped]")?;
            return Ok(answer);
        }
    };
    loop {
        let delta = tokio::select! {
            delta = stream.message() => delta.map_err(said)?,
            _ = interrupts.recv() => {
                write!(out, " [stopped]")?; // dropping the stream cancels it at the router
                break;
            }
        };
        let Some(delta) = delta else { break };
        pace.tokens(delta.tokens.len());
        out.write_all(delta.text.as_bytes())?;
        out.flush()?;
        answer.push_str(&delta.text);
        if delta.finish_reason() == FinishReason::Length {
            write!(out, " […]")?;
        }
    }
    writeln!(out)?;
    if out.is_terminal() {
        writeln!(out, "\x1b[2m{}\x1b[0m", pace.told())?;
    }
    Ok(answer)
}

/// How fast an answer comes.
struct Pace {
    asked: Instant,
    first: Option<Instant>,
    last: Instant,
    tokens: usize,
}

impl Pace {
    fn begin() -> Self {
        let now = Instant::now();
        Self { asked: now, first: None, last: now, tokens: 0 }
    }

    fn tokens(&mut self, count: usize) {
        if count > 0 {
            self.last = Instant::now();
            self.first.get_or_insert(self.last);
            self.tokens += count;
        }
    }

    fn told(&self) -> String {
        let Some(first) = self.first else { return "no tokens".to_owned() };
        let to_first = (first - self.asked).as_secs_f64();
        let since = (self.last - first).as_secs_f64();
        let mut told = format!("{} token(s), the first after {to_first:.2} s", self.tokens);
        if since > 0.0 {
            told.push_str(&format!(", then {:.1} tok/s", (self.tokens - 1) as f64 / since));
        }
        told
    }
}
