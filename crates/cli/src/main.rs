//! The `galerne` binary: one command each for what a person or a machine does with a cluster.

mod args;
mod chat;
mod client;
mod config;
mod drain;
mod fleet;
mod key;
mod kube;
mod limits;
mod load;
mod model;
mod operator;
mod router;
mod status;
mod telemetry;
mod up;
mod worker;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use galerne_worker::{ERROR_PREFIX, EXIT_FAILURE, WorkerError};

/// A router makes and drops many small things on every thread: with the system's allocator that is an eighth of its time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Serves Mistral 7B (and models of its architecture) from tensor-parallel groups of rank processes.
///
/// Start with `galerne up --model PATH`: it runs everything on this machine. On several machines, start
/// `galerne worker` on each and `galerne router` in front, all with the same --etcd.
#[derive(Parser)]
#[command(name = "galerne", version, max_term_width = 110)]
struct Cli {
    /// TOML file with settings: a table for each command, a key for each flag.
    #[arg(long, global = true, env = "GALERNE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Threads for connections and requests; by default half of the processors, and at least one: the others are for the
    /// ranks' own threads, and for the system's side of the network.
    #[arg(long, global = true, env = "GALERNE_IO_THREADS", value_name = "N")]
    io_threads: Option<NonZeroUsize>,
    #[command(flatten)]
    telemetry: telemetry::TelemetryArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Up(Box<up::Up>),
    Router(router::RouterCommand),
    Worker(worker::WorkerCommand),
    #[command(hide = true)]
    Rank(worker::RankCommand),
    Chat(chat::Chat),
    Status(status::Status),
    Drain(drain::Drain),
    Load(load::Load),
    Operator(operator::OperatorCommand),
    Key(key::Key),
    Model(model::ModelCommand),
    Config(config::ConfigCommand),
    /// Prints a script that completes this program's commands and flags in a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    match parse().and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Each error names its cause already: the chain of sources would say it twice.
            eprintln!("{ERROR_PREFIX}{error}");
            ExitCode::from(exit_code(&error))
        }
    }
}

/// What the command line, the environment and the configuration file say together.
fn parse() -> anyhow::Result<Cli> {
    let arguments: Vec<_> = std::env::args_os().collect();
    let matches = config::parse(Cli::command(), &arguments)?;
    Ok(Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit()))
}

fn run(Cli { config, io_threads, telemetry, command }: Cli) -> anyhow::Result<()> {
    telemetry.pass_on();
    let threads = io_threads.map_or_else(|| io_threads_of(&command), NonZeroUsize::get);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    let telemetry = runtime.block_on(async { telemetry.start(&command) })?;
    let log = telemetry.log().clone();
    let result = runtime.block_on(async {
        match command {
            Command::Up(up) => up.run(log).await,
            Command::Router(router) => router.run(log).await,
            Command::Worker(worker) => worker.run().await,
            Command::Rank(rank) => rank.run().await,
            Command::Chat(chat) => chat.run().await,
            Command::Status(status) => status.run().await,
            Command::Drain(drain) => drain.run().await,
            Command::Load(load) => load.run().await,
            Command::Operator(operator) => operator.run().await,
            Command::Key(key) => key.run(),
            Command::Model(model) => model.run(),
            Command::Config(check) => check.run(&config::with_variables(Cli::command(), true), config),
            Command::Completions { shell } => {
                clap_complete::generate(shell, &mut offered(), "galerne", &mut std::io::stdout());
                Ok(())
            }
        }
    });
    telemetry.end();
    // A blocked helper thread must not keep a finished process alive.
    runtime.shutdown_background();
    result
}

/// How many threads are best for a command that is not told. With fewer of them, a request is handed less often from one to
/// another, which costs a router as much as its tokens do; a load generator has the machine for itself.
fn io_threads_of(command: &Command) -> usize {
    let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    if matches!(command, Command::Load(_)) { processors } else { processors.div_ceil(2) }
}

/// The commands that a shell offers: not those that the program starts itself with.
fn offered() -> clap::Command {
    let all = Cli::command();
    let shown = all.get_subcommands().filter(|sub| !sub.is_hide_set()).cloned();
    clap::Command::new("galerne").args(all.get_arguments().cloned()).subcommands(shown)
}

/// A rank tells its supervisor by its exit code whether starting it again can help.
fn exit_code(error: &anyhow::Error) -> u8 {
    error.downcast_ref().map_or(EXIT_FAILURE, WorkerError::exit_code)
}
