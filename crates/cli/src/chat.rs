//! `galerne chat`: a conversation with a running cluster.

use std::io::{BufRead, Write};

use clap::Args;
use galerne_wire::v1::generate_request::Prompt;
use galerne_wire::v1::{Chat as Conversation, ChatMessage, FinishReason, GenerateRequest, Sampling};

use crate::client::{Client, ClientArgs};

/// Talks with the model: one answer to PROMPT, or a conversation from standard input.
#[derive(Args)]
pub(crate) struct Chat {
    #[command(flatten)]
    router: ClientArgs,
    /// Model to ask; by default the only one that is served.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "NAME")]
    model: String,
    /// 0 is greedy: the same answer each time.
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    temperature: f32,
    /// Makes a sampled answer repeatable.
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// Most tokens of an answer.
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    max_tokens: u32,
    /// What to ask; without it each line of standard input is a turn.
    prompt: Option<String>,
}

impl Chat {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let mut client = self.router.connect().await?;
        let mut messages = Vec::new();
        if let Some(prompt) = &self.prompt {
            self.turn(&mut client, &mut messages, prompt.clone()).await?;
            return Ok(());
        }
        for line in std::io::stdin().lock().lines() {
            self.turn(&mut client, &mut messages, line?).await?;
        }
        Ok(())
    }

    async fn turn(
        &self,
        client: &mut Client,
        messages: &mut Vec<ChatMessage>,
        content: String,
    ) -> anyhow::Result<()> {
        messages.push(ChatMessage { role: "user".to_owned(), content });
        let sampling =
            Sampling { temperature: Some(self.temperature), seed: self.seed, ..Sampling::default() };
        let answer = ask(client, &self.model, messages.clone(), sampling, self.max_tokens).await?;
        messages.push(ChatMessage { role: "assistant".to_owned(), content: answer });
        Ok(())
    }
}

/// Streams one answer to standard output and returns it.
pub(crate) async fn ask(
    client: &mut Client,
    model: &str,
    messages: Vec<ChatMessage>,
    sampling: Sampling,
    max_tokens: u32,
) -> anyhow::Result<String> {
    let request = GenerateRequest {
        model: model.to_owned(),
        prompt: Some(Prompt::Chat(Conversation { messages })),
        sampling: Some(sampling),
        max_tokens: Some(max_tokens),
        ..GenerateRequest::default()
    };
    let said = |status: tonic::Status| anyhow::anyhow!("the router answered: {}", status.message());
    let mut stream = client.generate(request).await.map_err(said)?.into_inner();
    let (mut answer, mut out) = (String::new(), std::io::stdout());
    while let Some(delta) = stream.message().await.map_err(said)? {
        out.write_all(delta.text.as_bytes())?;
        out.flush()?;
        answer.push_str(&delta.text);
        if delta.finish_reason() == FinishReason::Length {
            write!(out, " […]")?;
        }
    }
    writeln!(out)?;
    Ok(answer)
}
