//! Flags for what connections and requests may take of a router.

use std::time::Duration;

use clap::Args;
use galerne_router::{RequestLimits, ServerLimits};
use galerne_types::limits::GRAMMAR_BYTES_MAX;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const DEFAULT: ServerLimits = ServerLimits::DEFAULT;
const REQUESTS: RequestLimits = RequestLimits::DEFAULT;

/// Limits of each face's connections, and of requests.
#[derive(Args, Clone)]
#[command(next_help_heading = "Limits")]
pub(crate) struct LimitArgs {
    /// Connections at once on each face; one more is answered 429.
    #[arg(long, default_value_t = DEFAULT.connections_max, value_name = "COUNT", value_parser = count)]
    connections_max: usize,
    /// Connections at once from one address on each face; one more is answered 429.
    #[arg(long, default_value_t = DEFAULT.connections_per_peer_max, value_name = "COUNT", value_parser = count)]
    connections_per_peer_max: usize,
    /// Time for a request's line and headers; for a TLS handshake.
    #[arg(long, default_value_t = seconds_of(DEFAULT.header_s_max), value_name = "SECONDS", value_parser = seconds)]
    header_s_max: f64,
    /// Bytes of a request's line and headers together.
    #[arg(long, default_value_t = DEFAULT.header_bytes_max, value_name = "BYTES", value_parser = header_bytes)]
    header_bytes_max: usize,
    /// Headers of one request.
    #[arg(long, default_value_t = DEFAULT.headers_max, value_name = "COUNT", value_parser = count)]
    headers_max: usize,
    /// Bytes of a request's path and query.
    #[arg(long, default_value_t = DEFAULT.target_bytes_max, value_name = "BYTES", value_parser = count)]
    target_bytes_max: usize,
    /// Time that a connection may stay open without a request.
    #[arg(long, default_value_t = seconds_of(DEFAULT.idle_s_max), value_name = "SECONDS", value_parser = seconds)]
    idle_s_max: f64,
    /// Bytes of one request: an HTTP body or a gRPC message.
    #[arg(long, default_value_t = DEFAULT.body_bytes_max, value_name = "BYTES", value_parser = count)]
    body_bytes_max: usize,
    /// Time for a request's whole body.
    #[arg(long, default_value_t = seconds_of(DEFAULT.body_s_max), value_name = "SECONDS", value_parser = seconds)]
    body_s_max: f64,
    /// Time between two bytes of a body.
    #[arg(long, default_value_t = seconds_of(DEFAULT.body_idle_s_max), value_name = "SECONDS", value_parser = seconds)]
    body_idle_s_max: f64,
    /// Time for which a reader may take nothing of its answer before it is cut.
    #[arg(long, default_value_t = seconds_of(DEFAULT.write_stall_s_max), value_name = "SECONDS", value_parser = seconds)]
    write_stall_s_max: f64,
    /// Bytes that the system may hold for a reader that is slow.
    #[arg(long, default_value_t = DEFAULT.send_buffer_bytes, value_name = "BYTES", value_parser = count)]
    send_buffer_bytes: usize,
    /// Requests at once on one gRPC connection.
    #[arg(long, default_value_t = DEFAULT.streams_per_connection_max, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    streams_per_connection_max: u32,
    /// Time between two pings on a gRPC connection; one that answers none for as long is closed.
    #[arg(long, default_value_t = seconds_of(DEFAULT.ping_s), value_name = "SECONDS", value_parser = seconds)]
    ping_s: f64,
    /// Requests that the router works on at once; one more is answered 429.
    #[arg(long, default_value_t = REQUESTS.requests_max, value_name = "COUNT", value_parser = count)]
    requests_max: usize,
    /// Bytes of all bodies that come in at once, over all connections, and of their JSON; beyond it requests are
    /// answered 429.
    #[arg(long, default_value_t = REQUESTS.bodies_bytes_max, value_name = "BYTES", value_parser = bytes)]
    bodies_bytes_max: usize,
    /// Prompts of one request.
    #[arg(long, default_value_t = REQUESTS.prompts_max, value_name = "COUNT", value_parser = count)]
    prompts_max: usize,
    /// Answers to one request: `n` or `best_of`, times its prompts.
    #[arg(long, default_value_t = REQUESTS.choices_max, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    choices_max: u32,
    /// Tokens of one prompt; the context of a model may be less.
    #[arg(long, default_value_t = REQUESTS.prompt_tokens_max, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens_max: u32,
    /// Tokens of one answer (`max_tokens`); the context of a model may be less.
    #[arg(long, default_value_t = REQUESTS.answer_tokens_max, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    answer_tokens_max: u32,
    /// Stop strings of one request.
    #[arg(long, default_value_t = REQUESTS.stop_strings_max, value_name = "COUNT", value_parser = count)]
    stop_strings_max: usize,
    /// Bytes of one stop string.
    #[arg(long, default_value_t = REQUESTS.stop_string_bytes_max, value_name = "BYTES", value_parser = count)]
    stop_string_bytes_max: usize,
    /// Bytes of one request's schema, regular expression, choices or rules.
    #[arg(long, default_value_t = REQUESTS.grammar_bytes_max, value_name = "BYTES", value_parser = grammar_bytes)]
    grammar_bytes_max: usize,
    /// Messages of one conversation.
    #[arg(long, default_value_t = REQUESTS.messages_max, value_name = "COUNT", value_parser = count)]
    messages_max: usize,
    /// Tools of one conversation.
    #[arg(long, default_value_t = REQUESTS.tools_max, value_name = "COUNT", value_parser = count)]
    tools_max: usize,
    /// Time for the first token, queues included; a request that waits longer is answered 429.
    #[arg(long, default_value_t = seconds_of(REQUESTS.first_token_s_max), value_name = "SECONDS", value_parser = seconds)]
    first_token_s_max: f64,
    /// Time between two tokens of a group; an answer that stands still longer ends with an error.
    #[arg(long, default_value_t = seconds_of(REQUESTS.next_token_s_max), value_name = "SECONDS", value_parser = seconds)]
    next_token_s_max: f64,
    /// Time that a new request waits for a group where none serves its model, as while the only one forms anew: then it is
    /// refused. Long enough for a group to start if groups are scaled to zero.
    #[arg(long, default_value_t = seconds_of(REQUESTS.hold_s_max), value_name = "SECONDS", value_parser = seconds)]
    hold_s_max: f64,
    /// Time that an answer whose group was lost waits for one that goes on with it; then it ends with an error.
    #[arg(long, default_value_t = seconds_of(REQUESTS.recovery_s_max), value_name = "SECONDS", value_parser = seconds)]
    recovery_s_max: f64,
}

impl LimitArgs {
    /// Of connections.
    pub(crate) fn connections(&self) -> ServerLimits {
        ServerLimits {
            connections_max: self.connections_max,
            connections_per_peer_max: self.connections_per_peer_max,
            header_s_max: Duration::from_secs_f64(self.header_s_max),
            header_bytes_max: self.header_bytes_max,
            headers_max: self.headers_max,
            target_bytes_max: self.target_bytes_max,
            idle_s_max: Duration::from_secs_f64(self.idle_s_max),
            body_bytes_max: self.body_bytes_max,
            body_s_max: Duration::from_secs_f64(self.body_s_max),
            body_idle_s_max: Duration::from_secs_f64(self.body_idle_s_max),
            write_stall_s_max: Duration::from_secs_f64(self.write_stall_s_max),
            send_buffer_bytes: self.send_buffer_bytes,
            streams_per_connection_max: self.streams_per_connection_max,
            ping_s: Duration::from_secs_f64(self.ping_s),
        }
    }

    /// Refuses limits that contradict each other.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let &Self { body_bytes_max: one, bodies_bytes_max: all, .. } = self;
        anyhow::ensure!(
            one <= all,
            "--body-bytes-max {one} is more than --bodies-bytes-max {all}, which all bodies share: raise that"
        );
        Ok(())
    }

    /// Lets this process open as many files as the system allows; says so where connections may need more.
    pub(crate) fn make_room_for_files(&self) {
        let faces = self.connections_max.saturating_mul(2);
        let needed = u64::try_from(faces).map_or(u64::MAX, |faces| faces.saturating_add(FILES_BESIDE));
        if let Some(files) = raise_files().filter(|files| *files < needed) {
            eprintln!(
                "only {files} files may be open at once here, and --connections-max on both faces may need {needed}: \
                 connections beyond that wait (raise the hard limit, ulimit -Hn)"
            );
        }
    }

    /// Of requests.
    pub(crate) fn requests(&self) -> RequestLimits {
        RequestLimits {
            requests_max: self.requests_max,
            bodies_bytes_max: self.bodies_bytes_max,
            prompts_max: self.prompts_max,
            choices_max: self.choices_max,
            prompt_tokens_max: self.prompt_tokens_max,
            answer_tokens_max: self.answer_tokens_max,
            stop_strings_max: self.stop_strings_max,
            stop_string_bytes_max: self.stop_string_bytes_max,
            grammar_bytes_max: self.grammar_bytes_max,
            messages_max: self.messages_max,
            tools_max: self.tools_max,
            first_token_s_max: Duration::from_secs_f64(self.first_token_s_max),
            next_token_s_max: Duration::from_secs_f64(self.next_token_s_max),
            hold_s_max: Duration::from_secs_f64(self.hold_s_max),
            recovery_s_max: Duration::from_secs_f64(self.recovery_s_max),
        }
    }
}

/// The longest time that a limit may be: a day.
const SECONDS_MAX: f64 = 86_400.0;

/// The most of anything that is counted here.
const COUNT_MAX: usize = 1 << 30;

/// The most bytes of anything.
const BYTES_MAX: usize = 1 << 40;

/// Files that a router opens beside its clients' connections.
const FILES_BESIDE: u64 = 256;

/// Raises the soft limit of open files to the hard one, and tells it; none if there is none. The soft one is often 1024
/// for the sake of programs that call `select`, which this is not.
pub(crate) fn raise_files() -> Option<u64> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    }
}

fn seconds_of(time: Duration) -> f64 {
    time.as_secs_f64()
}

pub(crate) fn seconds(text: &str) -> Result<f64, String> {
    let time = text.parse().ok().filter(|time| (0.001..=SECONDS_MAX).contains(time));
    time.ok_or_else(|| format!("a time is a number of seconds from 0.001 to {SECONDS_MAX}"))
}

pub(crate) fn count(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|count| (1..=COUNT_MAX).contains(count));
    count.ok_or_else(|| format!("a limit is a whole number from 1 to {COUNT_MAX}"))
}

fn bytes(text: &str) -> Result<usize, String> {
    let bytes = text.parse().ok().filter(|bytes| (1..=BYTES_MAX).contains(bytes));
    bytes.ok_or_else(|| format!("a limit of bytes is a whole number from 1 to {BYTES_MAX}"))
}

fn grammar_bytes(text: &str) -> Result<usize, String> {
    let bytes = count(text)?;
    let fits = bytes <= GRAMMAR_BYTES_MAX;
    fits.then_some(bytes).ok_or_else(|| format!("groups take grammars of at most {GRAMMAR_BYTES_MAX} bytes"))
}

fn header_bytes(text: &str) -> Result<usize, String> {
    let bytes = count(text)?;
    let fits = (1 << 10..=1 << 20).contains(&bytes);
    fits.then_some(bytes).ok_or_else(|| "headers may have from 1024 to 1048576 bytes".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::{Args, Command};

    use super::*;

    #[test]
    fn as_many_files_as_the_system_allows_may_be_open() {
        let before = getrlimit(Resource::Nofile);
        assert_eq!(raise_files(), before.maximum);
        let after = getrlimit(Resource::Nofile);
        assert_eq!((after.current, after.maximum), (before.maximum, before.maximum));
    }

    #[test]
    fn limits_that_cannot_be_are_refused_and_the_rest_reach_the_router() {
        let parse = |arguments: &[&str]| {
            let command = LimitArgs::augment_args(Command::new("router"));
            let matches = command.try_get_matches_from([&["router"], arguments].concat());
            matches.map(|matches| <LimitArgs as clap::FromArgMatches>::from_arg_matches(&matches).unwrap())
        };
        for wrong in [
            ["--choices-max", "0"],
            ["--grammar-bytes-max", "262145"],
            ["--first-token-s-max", "0"],
            ["--bodies-bytes-max", "-1"],
        ] {
            assert!(parse(&wrong).is_err(), "{wrong:?}");
        }
        let limits = parse(&["--choices-max", "7", "--first-token-s-max", "0.5"]).unwrap().requests();
        assert_eq!((limits.choices_max, limits.first_token_s_max), (7, Duration::from_millis(500)));
        let contrary = parse(&["--bodies-bytes-max", "100"]).unwrap().check().unwrap_err().to_string();
        assert!(
            contrary.contains("--body-bytes-max 4194304 is more than --bodies-bytes-max 100"),
            "{contrary}"
        );
        let (unset, default) = (parse(&[]).unwrap().requests(), RequestLimits::DEFAULT);
        assert_eq!(format!("{unset:?}"), format!("{default:?}"));
    }

    #[test]
    fn the_readme_has_every_limit_with_its_value() {
        let readme = include_str!("../../../README.md");
        for flag in LimitArgs::augment_args(Command::new("router")).get_arguments() {
            let name = flag.get_long().unwrap_or_default();
            let default = flag.get_default_values()[0].to_string_lossy();
            let row = readme.lines().find(|line| line.contains(&format!("`--{name}`")));
            let row = row.unwrap_or_else(|| panic!("README.md does not tell of --{name}"));
            assert!(row.contains(&*default), "README.md: --{name} is {default}: {row}");
        }
    }
}
