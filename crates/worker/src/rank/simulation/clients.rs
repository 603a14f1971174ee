//! Those who ask, and the router processes that they ask. A client knows every token that it must get.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use galerne_router::{
    Gate, GateOptions, Listeners, ModelSource, RequestLimits, RouterOptions, RouterTls, ServerLimits,
};
use galerne_tls::Way;
use galerne_types::{Fleet, TokenId};
use galerne_wire::v1;
use galerne_wire::v1::galerne_client::GalerneClient;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::ledger::Ledger;
use super::machine::Dice;
use super::{connect, toy};

/// Pause before a client tries again what was refused.
const AGAIN: Duration = Duration::from_millis(300);

/// All clients.
#[derive(Clone)]
pub(super) struct Clients {
    all: Arc<Mutex<Vec<Client>>>,
    ledger: Ledger,
}

#[derive(Clone)]
struct Client {
    prompt: Vec<TokenId>,
    seed: u64,
    /// Tokens that it wants.
    wants: usize,
    /// Those that it has.
    has: Vec<TokenId>,
    /// The router that it asks.
    router: Option<u32>,
    /// Its last word, if it was refused for good.
    ended: bool,
}

impl Clients {
    pub(super) fn new(ledger: Ledger) -> Self {
        Self { all: Arc::default(), ledger }
    }

    fn all(&self) -> MutexGuard<'_, Vec<Client>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new client.
    pub(super) fn add(&self, dice: &mut Dice) {
        let prompt = (0..1 + dice.roll(90)).map(|_| 16 + dice.roll(1000) as TokenId).collect();
        let (seed, wants) = (dice.next(), 5 + dice.roll(60) as usize);
        let client = Client { prompt, seed, wants, has: Vec::new(), router: None, ended: false };
        self.all().push(client);
    }

    /// Clients that ask nobody.
    pub(super) fn idle(&self) -> Vec<usize> {
        let all = self.all();
        let idle = all.iter().enumerate().filter(|(_, client)| !client.ended && client.router.is_none());
        idle.map(|(number, _)| number).collect()
    }

    pub(super) fn asks(&self, number: usize, router: u32) {
        self.all()[number].router = Some(router);
    }

    /// A router is gone, and whoever asked it is free to ask another one.
    pub(super) fn freed(&self, router: u32) {
        self.all().iter_mut().filter(|client| client.router == Some(router)).for_each(|c| c.router = None);
    }

    fn has_ended(&self, number: usize) -> bool {
        self.all()[number].ended
    }

    pub(super) fn all_ended(&self) -> bool {
        self.all().iter().all(|client| client.ended)
    }

    /// Those that have not ended, in words.
    pub(super) fn open(&self) -> Vec<String> {
        let all = self.all();
        let open = all.iter().enumerate().filter(|(_, client)| !client.ended);
        open.map(|(n, c)| format!("client {n} has {} of {} tokens", c.has.len(), c.wants)).collect()
    }

    fn request(&self, number: usize) -> v1::GenerateRequest {
        let Client { prompt, seed, wants, has, .. } = self.all()[number].clone();
        v1::GenerateRequest {
            prompt: Some(v1::generate_request::Prompt::Tokens(v1::TokenIds { ids: prompt })),
            sampling: Some(v1::Sampling {
                temperature: Some(1.0),
                seed: Some(seed),
                ..v1::Sampling::default()
            }),
            max_tokens: Some(wants as u32),
            ignore_eos: true,
            resume: (!has.is_empty()).then_some(v1::TokenIds { ids: has }),
            ..v1::GenerateRequest::default()
        }
    }

    /// A part of an answer: exactly the next tokens.
    fn took(&self, number: usize, router: u32, part: &v1::GenerateResponse) {
        let mut all = self.all();
        let client = &mut all[number];
        let mut wrong =
            (client.router != Some(router)).then(|| "is told by a router that it left".to_owned());
        for token in &part.tokens {
            let seen = [&client.prompt[..], &client.has].concat();
            let (index, due) = (client.has.len(), toy::next(&seen, client.seed, client.has.len() as u32));
            if token.id != due {
                wrong = Some(format!("gets {} for token {index}, which is {due}", token.id));
            }
            client.has.push(token.id);
        }
        let finish = v1::FinishReason::try_from(part.finish_reason).unwrap_or_default();
        if finish != v1::FinishReason::Unspecified {
            client.ended = true;
            if finish != v1::FinishReason::Length || client.has.len() != client.wants {
                wrong = Some(format!(
                    "has {} of {} tokens at the end: {finish:?}",
                    client.has.len(),
                    client.wants
                ));
            }
        }
        let has = client.has.len();
        drop(all);
        self.ledger.tell(|| format!("client {number} has {has} tokens"));
        if let Some(says) = wrong {
            self.ledger.wrong(&format!("client {number} {says}"));
        }
    }

    /// An answer ends with an error, though it had `had` tokens when this router was asked: it must not if it has begun since.
    fn failed(&self, number: usize, had: usize, status: &Status) {
        let has = self.all()[number].has.len();
        self.ledger.tell(|| format!("client {number} is refused: {status}"));
        // Twice in a row a group was lost that worked on it and gave it no token: then it is taken for the reason.
        if status.code() == Code::Internal
            && status.message().contains("groups were lost")
            && self.ledger.losses() >= 1
        {
            self.all()[number].ended = true;
            return;
        }
        let refused = matches!(status.code(), Code::Unavailable | Code::ResourceExhausted);
        if has > had || !refused {
            self.ledger.wrong(&format!("client {number} has lost its stream after {has} tokens: {status}"));
        }
    }

    fn tokens(&self, number: usize) -> usize {
        self.all()[number].has.len()
    }
}

/// What a router process is told.
pub(super) struct RouterSeat {
    pub(super) process: u32,
    pub(super) way: Way,
    pub(super) ledger: Ledger,
    pub(super) clients: Clients,
    pub(super) asks: mpsc::UnboundedReceiver<usize>,
}

/// A router process: the real router, and the clients that it has.
pub(super) async fn run(seat: RouterSeat) {
    let RouterSeat { process, way, ledger, clients, mut asks } = seat;
    let (channel, inside) = galerne_router::inside();
    let (shown, fleet) = watch::channel(Fleet::default());
    let listen = || TcpListener::bind("127.0.0.1:0"); // nobody calls there
    let listeners = Listeners {
        http: listen().await.expect("a port"),
        grpc: listen().await.expect("a port"),
        inside: Some(inside),
        admin: None,
    };
    let options = RouterOptions {
        models: vec![ModelSource { path: super::model(), name: None, chat_format: None }],
        shutdown_grace: Duration::ZERO,
        limits: ServerLimits::default(),
        gate: Gate::open(GateOptions { keys: None::<PathBuf>, no_auth: true }, &[]).expect("an open gate"),
        tls: RouterTls { cluster: way.clone(), ..RouterTls::default() },
        requests: RequestLimits::default(),
        log: None,
        tell: |_| {},
        counts: None,
        bans: None,
    };
    tokio::spawn(galerne_router::serve(options, fleet, listeners, std::future::pending()));
    // While it reads its models, which a thread does, nothing else goes on in this process.
    let mut client = GalerneClient::new(channel);
    client.models(v1::ModelsRequest {}).await.expect("a router that has begun");
    let told = ledger.clone();
    tokio::spawn(async move {
        let coord = loop {
            match connect(&way).await {
                Ok(coord) => break coord,
                Err(error) => told.tell(|| format!("router {process}: {error}")),
            }
        };
        let (mut fleet, mut seen) = (coord.watch_fleet(), BTreeMap::new());
        while fleet.changed().await.is_ok() {
            let now = fleet.borrow_and_update().clone();
            told.sees(&mut seen, &now);
            shown.send_replace(now);
        }
    });
    while let Some(number) = asks.recv().await {
        tokio::spawn(ask(process, client.clone(), clients.clone(), number));
    }
}

/// Asks until the answer is there, or this process is gone.
async fn ask(process: u32, mut client: GalerneClient<Channel>, clients: Clients, number: usize) {
    while !clients.has_ended(number) {
        let had = clients.tokens(number);
        let answer = async {
            let mut parts = client.generate(clients.request(number)).await?.into_inner();
            while let Some(part) = parts.message().await? {
                clients.took(number, process, &part);
            }
            Ok::<_, Status>(())
        };
        match answer.await {
            Ok(()) => return,
            Err(status) => clients.failed(number, had, &status),
        }
        sleep(AGAIN).await;
    }
}
