//! What the first group of a version must do before it gets requests: answer fixed prompts in time, and with the tokens that a
//! group of the same numerics gives, if there is one.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use galerne_tls::Client;
use galerne_types::{Fleet, Group, GroupId};
use galerne_wire::v1::ask::Ask;
use galerne_wire::v1::engine_client::EngineClient;
use galerne_wire::v1::run_event::Event;
use galerne_wire::{show_epoch, show_secret, v1};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;
use tonic::transport::{Channel, Endpoint};

use super::credentials::NO_CERTIFICATE;
use super::fleets::View;
use crate::api::Trial;
use crate::names;

/// Prompts that are put.
const PROMPTS: u32 = 4;
/// Tokens of each.
const PROMPT_TOKENS: u32 = 24;
/// Tokens of each answer.
const ANSWER_TOKENS: u32 = 16;
/// How long a leader may take to be reached.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);

/// How leaders are called.
#[derive(Clone, Copy)]
pub(super) enum Caller<'a> {
    /// In the open.
    Open,
    /// Under TLS, if the operator has a certificate.
    Tls(Option<&'a Arc<Client>>),
}

/// Why there are no answers.
enum Unanswered {
    /// The group's own fault, as far as one can tell.
    Wrong(String),
    /// It could not be asked to the end.
    Lost(String),
}

/// Tries group `number`: every prompt within `most`.
///
/// # Errors
/// When it could not be asked to the end, which says nothing of its version.
pub(super) async fn run(
    view: &View,
    number: u32,
    most: Duration,
    caller: Caller<'_>,
) -> Result<(Trial, String), String> {
    let fleet = view.fleet.borrow().clone();
    match compare(&fleet, &GroupId(names::group(number)), most, caller).await {
        Ok(message) => Ok((Trial::Passed, message)),
        Err(Unanswered::Wrong(message)) => Ok((Trial::Failed, message)),
        Err(Unanswered::Lost(message)) => Err(message),
    }
}

async fn compare(
    fleet: &Fleet,
    id: &GroupId,
    most: Duration,
    caller: Caller<'_>,
) -> Result<String, Unanswered> {
    let serving = fleet.groups.get(id).and_then(|group| Some((group, group.serving()?)));
    let (group, health) = serving.ok_or_else(|| Unanswered::Lost("it does not serve any more".into()))?;
    let began = Instant::now();
    let answers = ask(group, most, caller).await?;
    let said = format!("{PROMPTS} prompts in {:.1?}, tokens {}", began.elapsed(), digest(&answers));
    let alike = |other: &&Group| {
        let serves =
            other.serving().is_some_and(|other| !other.draining && other.model.same_numerics(&health.model));
        serves && other.hold.is_none()
    };
    let reference = fleet.groups.iter().filter(|(other, _)| *other != id).find(|(_, other)| alike(other));
    let Some((name, reference)) = reference else {
        return Ok(format!("{said}; no group has its numerics, to compare with"));
    };
    match ask(reference, most, caller).await {
        Ok(expected) if expected == answers => Ok(format!("{said}, as those of group {name}")),
        Ok(expected) => {
            let theirs = digest(&expected);
            Err(Unanswered::Wrong(format!(
                "{said}; those of group {name}, whose numerics it has, are {theirs}"
            )))
        }
        // The other one is in trouble of its own: that says nothing of this one.
        Err(Unanswered::Wrong(trouble) | Unanswered::Lost(trouble)) => {
            Ok(format!("{said}; group {name}, whose numerics it has, did not answer: {trouble}"))
        }
    }
}

fn digest(answers: &[Vec<u32>]) -> String {
    let mut hash = Sha256::new();
    answers.iter().flatten().for_each(|token| hash.update(token.to_le_bytes()));
    hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

/// The greedy answers to all prompts, one after the other.
async fn ask(group: &Group, most: Duration, caller: Caller<'_>) -> Result<Vec<Vec<u32>>, Unanswered> {
    let (Some(health), Some((epoch, record))) = (group.serving(), group.epoch.as_ref()) else {
        return Err(Unanswered::Lost("it does not serve any more".into()));
    };
    let lost = |error: String| Unanswered::Lost(format!("its leader: {error}"));
    let channel = connect(&health.leader, caller).await.map_err(lost)?;
    let (asks, asked) = mpsc::channel(1);
    let mut request = Request::new(ReceiverStream::new(asked));
    show_secret(&mut request, &record.secret).map_err(|status| lost(status.message().to_owned()))?;
    show_epoch(&mut request, *epoch);
    let mut leader = EngineClient::new(channel);
    let news = timeout(CONNECT_TIMEOUT, leader.serve(request))
        .await
        .map_err(|_| lost("it does not answer".into()))?;
    let mut news = news.map_err(|status| lost(status.message().to_owned()))?.into_inner();
    let mut answers = Vec::new();
    for number in 0..PROMPTS {
        let ask = v1::Ask { ask: Some(Ask::Run(prompt(number, health.model.vocab))) };
        asks.send(ask).await.map_err(|_| lost("it has hung up".into()))?;
        let late = |_| Unanswered::Wrong(format!("prompt {number} was not answered within {most:?}"));
        answers.push(timeout(most, answer(&mut news, number)).await.map_err(late)??);
    }
    Ok(answers)
}

async fn connect(leader: &str, caller: Caller<'_>) -> Result<Channel, String> {
    let endpoint = Endpoint::from_shared(format!("http://{leader}")).map_err(|error| error.to_string())?;
    let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT);
    let connected = match caller {
        Caller::Open => timeout(CONNECT_TIMEOUT, endpoint.connect()).await,
        Caller::Tls(Some(client)) => {
            timeout(CONNECT_TIMEOUT, endpoint.connect_with_connector(client.dialer())).await
        }
        Caller::Tls(None) => return Err(NO_CERTIFICATE.into()),
    };
    let connected = connected.map_err(|_| format!("no connection within {CONNECT_TIMEOUT:?}"))?;
    connected.map_err(|error| root_cause(&error))
}

/// What is at the bottom of an error.
fn root_cause(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// One answer, to its end.
async fn answer(news: &mut tonic::Streaming<v1::News>, id: u32) -> Result<Vec<u32>, Unanswered> {
    let lost = |error: &str| Unanswered::Lost(format!("its leader: {error}"));
    let mut tokens = Vec::new();
    loop {
        let some = news.next().await.ok_or_else(|| lost("it has hung up"))?;
        let v1::News { events, tokens: columns, ends } = some.map_err(|status| lost(status.message()))?;
        for event in events.into_iter().chain(ends).filter(|event| event.id == id) {
            match event.event {
                Some(Event::Token(token)) => tokens.extend(token.token.map(|token| token.id)),
                Some(Event::Failed(failed)) => {
                    return Err(Unanswered::Wrong(format!("prompt {id} failed: {}", failed.message)));
                }
                Some(Event::Finished(_)) => {
                    add(&mut tokens, columns.as_ref(), id)?;
                    return Ok(tokens);
                }
                _ => {}
            }
        }
        add(&mut tokens, columns.as_ref(), id)?;
    }
}

/// Adds the tokens of which nothing is told but which they are: they stand between events and ends.
fn add(tokens: &mut Vec<u32>, columns: Option<&v1::Tokens>, id: u32) -> Result<(), Unanswered> {
    let Some(columns) = columns else { return Ok(()) };
    let runs = columns.runs().map_err(|error| Unanswered::Lost(error.to_string()))?;
    runs.filter(|run| run.request == id).for_each(|run| tokens.extend(run.tokens));
    Ok(())
}

/// Token ids that every vocabulary has, and no two prompts alike.
fn prompt(number: u32, vocab: u32) -> v1::RunRequest {
    let token = |place: u32| (number * 7_919 + place * 104_729 + 11) % vocab.max(1);
    v1::RunRequest {
        id: number,
        prompt: (0..PROMPT_TOKENS).map(token).collect(),
        sampling: Some(v1::Sampling { temperature: Some(0.0), seed: Some(0), ..v1::Sampling::default() }),
        max_tokens: ANSWER_TOKENS,
        ..v1::RunRequest::default()
    }
}
