//! `galerne load`: puts a load on a running endpoint and tells how it fared.

mod page;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use galerne_load::{Api, Endpoint, Limits, LoadError, Mode, Options, TargetOptions};
use galerne_workload::{Arrivals, Law, Length, Pace, Prefixes, Rules, Slo, Source, TokenIds, Workload};
use tokio::sync::watch;

use crate::args;
use crate::client::{self, ClientTlsArgs};
use crate::limits;

/// How long a load goes on for which nothing says it.
const DURATION_S: f64 = 30.0;

/// Requests that are open at most beyond which nobody measures from one machine.
const IN_FLIGHT_MAX: usize = 1 << 20;

/// Puts a load on an endpoint and tells latencies, throughput and goodput.
///
/// With --rate (or --trace) requests are sent when they are due, whatever the server does, and latencies count from
/// then: a server that stalls cannot hide it. With --concurrency so many requests are open at any time. Ctrl-C ends a
/// run with what there is to tell so far.
///
/// TTFT is the time to the first token, TPOT the time per token after it, ITL the time between two messages with
/// tokens, E2E the time to the end.
#[derive(Args)]
pub(crate) struct Load {
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    when: WhenArgs,
    #[command(flatten)]
    what: WhatArgs,
    #[command(flatten)]
    verdict: VerdictArgs,
    #[command(flatten)]
    limits: LimitArgs,
}

#[derive(Args)]
struct TargetArgs {
    /// Whom to ask: http://HOST:PORT[/v1], https://…, or ours over gRPC: grpc://HOST:PORT, grpcs://….
    #[arg(long, default_value = "http://127.0.0.1:8000", value_name = "URL")]
    url: String,
    /// Over HTTP: chat (text) or completions (token ids, so that prompts have exactly the tokens asked for).
    #[arg(long, default_value = "chat", value_name = "API", value_parser = api)]
    api: Api,
    /// Model to ask for; by default the server chooses.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// API key, if the server asks for one.
    #[arg(long, value_name = "KEY", env = "GALERNE_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    #[command(flatten)]
    tls: ClientTlsArgs,
}

#[derive(Args)]
#[command(next_help_heading = "When")]
struct WhenArgs {
    /// Requests a second, in the mean: an open loop.
    #[arg(long, value_name = "PER_SECOND", value_parser = rate, conflicts_with_all = ["concurrency", "trace"])]
    rate: Option<f64>,
    /// How they come: poisson, constant, or gamma:SHAPE (below 1 in bursts, above 1 regularly).
    #[arg(long, default_value = "poisson", value_name = "LAW", requires = "rate")]
    arrivals: Arrivals,
    /// Requests that are open at any time: a closed loop.
    #[arg(long, value_name = "COUNT", value_parser = in_flight)]
    concurrency: Option<usize>,
    /// Replay these requests: a JSON object a line with timestamp (ms), prompt_tokens or prompt, output_tokens; Mooncake's
    /// traces are such files. With --concurrency their time stamps are ignored.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt_tokens", "output_tokens", "prefix_tokens"])]
    trace: Option<PathBuf>,
    /// Replay the trace so many times as fast.
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR", value_parser = rate, requires = "trace")]
    trace_speed: f64,
    /// Send no more than this.
    #[arg(long, value_name = "COUNT", value_parser = limits::count)]
    requests: Option<usize>,
    /// Send nothing after this; 30 unless there is another end. What is open then is waited for.
    #[arg(long, value_name = "SECONDS", value_parser = limits::seconds)]
    duration_s: Option<f64>,
    /// What is due before this does not count.
    #[arg(long, default_value_t = 0.0, value_name = "SECONDS", value_parser = from_zero)]
    warm_up_s: f64,
    /// Everything that is drawn by lot follows from it.
    #[arg(long, default_value_t = 1, value_name = "SEED")]
    seed: u64,
}

#[derive(Args)]
#[command(next_help_heading = "What")]
struct WhatArgs {
    /// Tokens of a prompt: 256, 100-400, normal:mean=256,sd=64, lognormal:median=256,sigma=0.8,max=2048. As text (chat)
    /// it is a word for each, to which the chat's format comes.
    #[arg(long, default_value = "256", value_name = "LENGTH")]
    prompt_tokens: Length,
    /// Tokens of an answer, in the same words.
    #[arg(long, default_value = "128", value_name = "LENGTH")]
    output_tokens: Length,
    /// Begin each prompt with so many more tokens that it shares with others.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    prefix_tokens: Option<u32>,
    /// How many different such beginnings there are.
    #[arg(long, default_value_t = 1, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..), requires = "prefix_tokens")]
    prefixes: u32,
    /// Token ids of made-up prompts: ordinary ones of the model's vocabulary.
    #[arg(long, default_value = "1000-30000", value_name = "FIRST-LAST")]
    token_ids: TokenIds,
    /// Let answers end with the model's end-of-sequence token (and send no ignore_eos, which not every server knows).
    #[arg(long)]
    stop_at_eos: bool,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0, value_name = "T", value_parser = from_zero)]
    temperature: f64,
}

#[derive(Args)]
#[command(next_help_heading = "Verdict")]
struct VerdictArgs {
    /// Targets that a good request keeps: some of ttft=500ms,tpot=50ms,e2e=10s.
    #[arg(long, value_name = "TARGETS")]
    slo: Option<Slo>,
    /// Percentage of the requests that must be good.
    #[arg(long, default_value_t = 99.0, value_name = "PERCENT", value_parser = percent, requires = "slo")]
    slo_percent: f64,
    /// Exit with 1 if too few were good, if any failed (without --slo), or if the run is not valid.
    #[arg(long)]
    check: bool,
    /// An open loop is not valid if its requests were sent later than this, by the 99th percentile.
    #[arg(long, default_value_t = 20.0, value_name = "MILLISECONDS", value_parser = rate)]
    lag_ms_max: f64,
    /// Write the report as JSON; `-` writes it to standard output, and no table.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Args)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// Requests open at once in an open loop; one more waits, which shows in its latency.
    #[arg(long, default_value_t = 4096, value_name = "COUNT", value_parser = in_flight)]
    in_flight_max: usize,
    /// Connections of gRPC, over which requests take turns.
    #[arg(long, default_value_t = 4, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=1024))]
    grpc_connections: u16,
    /// Time for a connection.
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS", value_parser = limits::seconds)]
    connect_s_max: f64,
    /// Time for a request; one that takes longer has failed.
    #[arg(long, default_value_t = 600.0, value_name = "SECONDS", value_parser = limits::seconds)]
    request_s_max: f64,
}

impl Load {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        limits::raise_files();
        let options = self.options()?;
        let stop = args::shutdown_on_signal()?;
        let quiet = self.verdict.json.as_deref().is_some_and(|file| file.as_os_str() == "-");
        let heading = self.heading(&options);
        if !quiet {
            println!("{heading}");
        }
        let (progress, seen) = watch::channel(galerne_load::Progress::default());
        let shown = tokio::spawn(page::follow(seen, options.duration, options.requests_max));
        let report =
            galerne_load::run(options, stop.clone(), progress).await.map_err(|error| explain(&error))?;
        shown.await?;
        if let Some(file) = &self.verdict.json {
            page::write(file, &heading, &report)?;
        }
        if !quiet {
            println!("\n{report}");
        }
        if self.verdict.check { page::check(&report) } else { Ok(()) }
    }

    fn options(&self) -> anyhow::Result<Options> {
        let Self { target, when, what, verdict, limits } = self;
        let endpoint = Endpoint::parse(&target.url, target.api)?;
        let (source, mode) = self.source()?;
        let ends = when.requests.is_some() || when.trace.is_some();
        let duration = match when.duration_s {
            None if ends => Duration::MAX,
            given => Duration::from_secs_f64(given.unwrap_or(DURATION_S)),
        };
        let lag_max = Duration::from_secs_f64(verdict.lag_ms_max / 1e3);
        Ok(Options {
            target: TargetOptions {
                endpoint,
                model: target.model.clone(),
                api_key: target.api_key.clone(),
                tls: target.tls.files(),
                temperature: what.temperature,
                ignore_eos: !what.stop_at_eos,
                token_ids: what.token_ids,
            },
            workload: Workload::new(when.seed, source),
            mode,
            requests_max: when.requests.unwrap_or(usize::MAX),
            duration,
            rules: Rules {
                warm_up: Duration::from_secs_f64(when.warm_up_s),
                slo: verdict.slo,
                slo_share: verdict.slo_percent / 100.0,
                lag_max: matches!(mode, Mode::Open { .. }).then_some(lag_max),
            },
            limits: Limits {
                connect_s_max: Duration::from_secs_f64(limits.connect_s_max),
                request_s_max: Duration::from_secs_f64(limits.request_s_max),
                grpc_connections: limits.grpc_connections.into(),
            },
        })
    }

    fn source(&self) -> anyhow::Result<(Source, Mode)> {
        let Self { when, what, limits, .. } = self;
        let open = Mode::Open { in_flight_max: limits.in_flight_max };
        let mode = when.concurrency.map_or(open, |concurrency| Mode::Closed { concurrency });
        if let Some(file) = &when.trace {
            let trace = galerne_load::read_trace(file)?;
            return Ok((Source::Trace { trace, speed: when.trace_speed }, mode));
        }
        anyhow::ensure!(
            when.rate.is_some() || when.concurrency.is_some(),
            "how many requests? Give --rate for an open loop, --concurrency for a closed one, or a --trace"
        );
        let law = Law {
            pace: when.rate.map(|rate_per_s| Pace { arrivals: when.arrivals, rate_per_s }),
            prompt: what.prompt_tokens,
            output: what.output_tokens,
            prefixes: what.prefix_tokens.map(|tokens| Prefixes { count: what.prefixes, tokens }),
        };
        Ok((Source::Law(law), mode))
    }

    /// What is run, in a line or two.
    fn heading(&self, options: &Options) -> String {
        let Self { when, what, .. } = self;
        let how = match (when.rate, when.concurrency, &when.trace) {
            (Some(rate), _, _) => format!("open loop, {rate} requests/s ({})", when.arrivals),
            (_, Some(concurrency), _) => format!("closed loop of {concurrency}"),
            (_, _, Some(_)) => format!("open loop, as recorded, {} times as fast", when.trace_speed),
            _ => unreachable!("there is a source"),
        };
        let what = match &when.trace {
            Some(file) => format!("requests of {}", file.display()),
            None => {
                let prefix = what
                    .prefix_tokens
                    .map_or(String::new(), |tokens| format!("{tokens} shared ({} kinds) + ", what.prefixes));
                format!("prompts of {prefix}{} tokens, answers of {}", what.prompt_tokens, what.output_tokens)
            }
        };
        format!("{}\n{how}; {what}; seed {}", options.target.endpoint, when.seed)
    }
}

/// What to do about it, where that is known.
fn explain(error: &LoadError) -> anyhow::Error {
    match client::explained(error) {
        Some(says) => anyhow::anyhow!("the endpoint cannot be asked: {says}"),
        None => anyhow::anyhow!("{error}"),
    }
}

fn api(text: &str) -> Result<Api, String> {
    match text {
        "chat" => Ok(Api::Chat),
        "completions" => Ok(Api::Completions),
        _ => Err("chat or completions; gRPC goes by its URL, grpc://HOST:PORT".to_owned()),
    }
}

fn within(text: &str, range: std::ops::RangeInclusive<f64>) -> Result<f64, String> {
    let value = text.parse().ok().filter(|value| range.contains(value));
    value.ok_or_else(|| format!("it is a number from {} to {}", range.start(), range.end()))
}

fn rate(text: &str) -> Result<f64, String> {
    within(text, 0.001..=1e6)
}

fn from_zero(text: &str) -> Result<f64, String> {
    within(text, 0.0..=86_400.0)
}

fn percent(text: &str) -> Result<f64, String> {
    within(text, 0.0..=100.0)
}

fn in_flight(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|count| (1..=IN_FLIGHT_MAX).contains(count));
    count.ok_or_else(|| format!("it is a whole number from 1 to {IN_FLIGHT_MAX}"))
}
