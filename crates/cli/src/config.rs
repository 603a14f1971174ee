//! One TOML file for every command: its tables are commands, its keys are their flags.
//!
//! What the file says takes the place of a flag's default, so the environment overrides the file, and the command line
//! overrides both. Keys at the top are the flags that every command has:
//!
//! ```toml
//! log = "info"
//! [up]
//! model = "/models/mistral-7b"
//! tp = 4
//! ```

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, Subcommand};
use toml::{Table, Value};

/// Names the file where the command line does not.
const PATH_VARIABLE: &str = "GALERNE_CONFIG";

/// Begins the environment variable of each flag: `--kv-blocks` is `GALERNE_KV_BLOCKS`.
const VARIABLE_PREFIX: &str = "GALERNE_";

/// What a file may have, far above what there are flags.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Checks a configuration file, or shows where settings come from.
#[derive(Args)]
pub(crate) struct ConfigCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Reads FILE as every command would and says what is wrong with it, if anything is.
    Check {
        /// The file; by default what --config or GALERNE_CONFIG names.
        file: Option<PathBuf>,
    },
}

impl ConfigCommand {
    pub(crate) fn run(self, root: &Command, named: Option<PathBuf>) -> anyhow::Result<()> {
        let Action::Check { file } = self.action;
        let path = file.or(named);
        let path = path.context("no file to check: name one, or set --config or GALERNE_CONFIG")?;
        let file = File::read(&path, root)?;
        together(root, &file.settings, "", None)
            .map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
        println!("{}: {} setting(s), all understood", path.display(), count(&file.settings));
        Ok(())
    }
}

/// Parses `arguments` with what the environment and the file that they name say.
///
/// # Errors
/// A sentence for a file that cannot be read, or that sets what does not exist or cannot be. Wrong arguments end the
/// process the way clap does it.
pub(crate) fn parse(command: Command, arguments: &[OsString]) -> anyhow::Result<ArgMatches> {
    let command = with_variables(command, true);
    let Some(path) = named_file(arguments) else { return Ok(command.get_matches_from(arguments)) };
    let file = File::read(&path, &command)?;
    // What the command line and the environment set; the file must not contradict it.
    let first = relaxed(command.clone()).ignore_errors(true).try_get_matches_from(arguments).ok();
    if let Some(first) = &first {
        let wrong = together(&command, &file.settings, "", Some(first));
        wrong.map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
    }
    Ok(apply(command, &file.settings, first.as_ref()).get_matches_from(arguments))
}

/// The file that the command line or else the environment names.
pub(crate) fn named_file(arguments: &[OsString]) -> Option<PathBuf> {
    let mut arguments = arguments.iter().take_while(|argument| *argument != "--");
    while let Some(argument) = arguments.next() {
        if argument == "--config" {
            return arguments.next().map(PathBuf::from);
        }
        if let Some(path) = argument.to_str().and_then(|argument| argument.strip_prefix("--config=")) {
            return Some(path.into());
        }
    }
    std::env::var_os(PATH_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from)
}

struct File {
    settings: Table,
}

impl File {
    /// Reads and checks a file, whichever command is meant to run.
    fn read(path: &Path, root: &Command) -> anyhow::Result<Self> {
        let shown = path.display();
        let bytes =
            std::fs::metadata(path).map_err(|error| anyhow::anyhow!("cannot read {shown}: {error}"))?.len();
        ensure!(
            bytes <= FILE_BYTES_MAX,
            "{shown} has {bytes} bytes; a configuration has at most {FILE_BYTES_MAX}"
        );
        let text =
            std::fs::read_to_string(path).map_err(|error| anyhow::anyhow!("cannot read {shown}: {error}"))?;
        let settings: Table = text.parse().map_err(|error: toml::de::Error| {
            let line = error.span().map_or(1, |span| text[..span.start].lines().count().max(1));
            anyhow::anyhow!("{shown}, line {line}, is not TOML: {}", error.message())
        })?;
        check(root, &settings, "").map_err(|error| anyhow::anyhow!("{shown}: {error}"))?;
        Ok(Self { settings })
    }
}

/// Whether `command` has all that `table` sets, and can be set so. `place` is the table's name.
fn check(command: &Command, table: &Table, place: &str) -> anyhow::Result<()> {
    for (key, value) in table {
        let name = if place.is_empty() { key.clone() } else { format!("{place}.{key}") };
        if let Value::Table(inner) = value {
            let Some(sub) = command.find_subcommand(key).filter(|sub| !sub.is_hide_set()) else {
                let known = command.get_subcommands().filter(|sub| !sub.is_hide_set()).map(Command::get_name);
                bail!("[{name}] is no command{}", nearest(key, known));
            };
            check(sub, inner, &name)?;
            continue;
        }
        let Some(arg) = flag(command, key) else {
            let known = command.get_arguments().filter_map(Arg::get_long);
            bail!("{name} is no setting of {}{}", command.get_name(), nearest(key, known));
        };
        if matches!(arg.get_action(), ArgAction::SetTrue) && !value.is_bool() {
            bail!("{name} must be true or false");
        }
        let excluded = command.get_arg_conflicts_with(arg);
        if let Some(other) = excluded.iter().filter_map(|arg| arg.get_long()).find(|long| has(table, long)) {
            bail!("{name} and {other} exclude each other: keep one");
        }
        let alone =
            Command::new("check").no_binary_name(true).arg(with_default(alone(arg), &values(&name, value)?));
        let parsed = alone.try_get_matches_from(std::iter::empty::<OsString>());
        parsed.map_err(|error| anyhow::anyhow!("{name}: {}", reason(&error)))?;
    }
    Ok(())
}

/// Whether what `table` sets goes together: a flag may need another one, and most have one value. What the command line
/// and the environment set counts, too: `explicit` is of the command that runs. Without it, all commands are looked at.
fn together(
    command: &Command,
    table: &Table,
    place: &str,
    explicit: Option<&ArgMatches>,
) -> anyhow::Result<()> {
    let flags =
        command.get_arguments().filter(|arg| !arg.is_positional()).map(|arg| arg.clone().required(false));
    let own = Command::new("check").no_binary_name(true).disable_help_flag(true).args(flags);
    let variables = own.clone().ignore_errors(true).try_get_matches_from(std::iter::empty::<OsString>()).ok();
    let first = explicit.or(variables.as_ref());
    let set = first.map(explicit_ids).unwrap_or_default();
    let mut given: Vec<OsString> = Vec::new();
    let valued = own.get_arguments().filter(|arg| arg.get_action().takes_values());
    for arg in valued.filter(|arg| set.contains(arg.get_id().as_str())) {
        let raw = first.and_then(|first| first.get_raw(arg.get_id().as_str())).into_iter().flatten();
        given.extend(written(arg, raw.map(ToOwned::to_owned)));
    }
    for (key, value) in table {
        if let Value::Table(inner) = value {
            let inside = explicit.and_then(|matches| matches.subcommand_matches(key));
            let runs = explicit.is_none() || inside.is_some();
            if let Some(sub) = command.find_subcommand(key).filter(|_| runs) {
                let name = if place.is_empty() { key.clone() } else { format!("{place}.{key}") };
                together(sub, inner, &name, inside)?;
            }
            continue;
        }
        let Some(arg) = flag(command, key).filter(|arg| !set.contains(arg.get_id().as_str())) else {
            continue;
        };
        let excluded = |other: &&Arg| set.contains(other.get_id().as_str()) && exclude(command, arg, other);
        if !command.get_arguments().any(|other| excluded(&other)) && *value != Value::Boolean(false) {
            given.extend(written(arg, values(key, value)?.into_iter().map(OsString::from)));
        }
    }
    let place = if place.is_empty() { String::new() } else { format!("[{place}]: ") };
    own.try_get_matches_from(given).map(|_| ()).map_err(|error| anyhow::anyhow!("{place}{}", reason(&error)))
}

/// A flag as the command line would have it.
fn written(arg: &Arg, values: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let long = OsString::from(format!("--{}", arg.get_long().unwrap_or_default()));
    if !arg.get_action().takes_values() {
        return vec![long];
    }
    let with = |value: OsString| [long.as_os_str(), "=".as_ref(), value.as_os_str()].into_iter().collect();
    values.map(with).collect()
}

/// What clap says, without how the command is used.
fn reason(error: &clap::Error) -> String {
    let says = error.to_string();
    let lines: Vec<_> = says.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    lines.join(" ").trim_start_matches("error: ").to_owned()
}

/// `command`, whose defaults are what `table` says, except where `explicit` has something that excludes it.
fn apply(mut command: Command, table: &Table, explicit: Option<&ArgMatches>) -> Command {
    let set = explicit.map(explicit_ids).unwrap_or_default();
    for (key, value) in table {
        if let Value::Table(inner) = value {
            let inside = explicit.and_then(|matches| matches.subcommand_matches(key));
            command = command.mut_subcommand(key, |sub| apply(sub, inner, inside));
            continue;
        }
        let Some(arg) = flag(&command, key) else { continue };
        if command
            .get_arguments()
            .any(|other| set.contains(other.get_id().as_str()) && exclude(&command, arg, other))
        {
            continue;
        }
        let (id, values) = (arg.get_id().clone(), values(key, value).unwrap_or_default());
        command = command.mut_arg(id, |arg| with_default(arg, &values));
    }
    command
}

fn exclude(command: &Command, one: &Arg, other: &Arg) -> bool {
    let among = |arg, other: &Arg| {
        command.get_arg_conflicts_with(arg).iter().any(|arg| arg.get_id() == other.get_id())
    };
    among(one, other) || among(other, one)
}

/// What was set by an argument or a variable, rather than by default.
fn explicit_ids(matches: &ArgMatches) -> BTreeSet<String> {
    let set = |id: &&clap::Id| {
        matches!(matches.value_source(id.as_str()), Some(ValueSource::CommandLine | ValueSource::EnvVariable))
    };
    matches.ids().filter(set).map(|id| id.as_str().to_owned()).collect()
}

/// The flag that a key names; `_` and `-` are the same in keys.
fn flag<'a>(command: &'a Command, key: &str) -> Option<&'a Arg> {
    let long = key.replace('_', "-");
    let known =
        |arg: &&Arg| arg.get_long() == Some(&long) && !matches!(&*long, "config" | "help" | "version");
    command.get_arguments().find(known)
}

fn has(table: &Table, long: &str) -> bool {
    table.keys().any(|key| key.replace('_', "-") == long)
}

/// An argument without its relations to others.
fn alone(arg: &Arg) -> Arg {
    let mut alone = Arg::new("value")
        .long(arg.get_long().unwrap_or_default().to_owned())
        .action(arg.get_action().clone())
        .value_parser(arg.get_value_parser().clone());
    if let Some(names) = arg.get_value_names() {
        alone = alone.value_names(names.to_vec());
    }
    if let Some(delimiter) = arg.get_value_delimiter() {
        alone = alone.value_delimiter(delimiter);
    }
    alone
}

fn with_default(arg: Arg, values: &[String]) -> Arg {
    arg.required(false).default_values(values.iter().map(|value| value.as_str().to_owned()))
}

/// A value as the command line would write it.
fn values(name: &str, value: &Value) -> anyhow::Result<Vec<String>> {
    let one = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Float(number) => Ok(number.to_string()),
        Value::Boolean(truth) => Ok(truth.to_string()),
        _ => bail!("{name} must be a string, a number, true or false, or a list of strings"),
    };
    match value {
        Value::Array(values) => values.iter().map(one).collect(),
        value => Ok(vec![one(value)?]),
    }
}

/// Gives every flag that has none an environment variable.
pub(crate) fn with_variables(command: Command, root: bool) -> Command {
    let with = |arg: Arg| match arg.get_long() {
        Some(long) if arg.get_env().is_none() && !matches!(long, "help" | "version") => {
            let variable = format!("{VARIABLE_PREFIX}{}", long.replace('-', "_").to_uppercase());
            arg.env(variable).hide_env(true)
        }
        _ => arg,
    };
    let command = command.mut_args(with).mut_subcommands(|sub| with_variables(sub, false));
    if root { command.after_help(AFTER_HELP) } else { command }
}

const AFTER_HELP: &str = "Every flag of a command can also be set in the environment (--kv-blocks is \
GALERNE_KV_BLOCKS) and in the TOML file of --config ([up] kv-blocks = 512). A flag goes before the environment, the \
environment before the file. `galerne config check FILE` says what is wrong with one.";

/// `command` and all below it, with nothing required.
fn relaxed(command: Command) -> Command {
    command.mut_args(|arg| arg.required(false)).mut_subcommands(relaxed)
}

fn count(table: &Table) -> usize {
    table.values().map(|value| value.as_table().map_or(1, count)).sum()
}

/// What was probably meant.
fn nearest<'a>(wrong: &str, known: impl Iterator<Item = &'a str>) -> String {
    let wrong = wrong.replace('_', "-");
    let near = known.map(|name| (distance(&wrong, name), name)).min();
    near.filter(|(distance, _)| *distance <= 2)
        .map_or(String::new(), |(_, name)| format!(": did you mean {name}?"))
}

/// Insertions, deletions and substitutions between two words (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command() -> Command {
        let arg = |name: &'static str| Arg::new(name).long(name);
        let number = clap::value_parser!(u16).range(1..=16);
        let serve = Command::new("serve")
            .arg(arg("model").required(true))
            .arg(arg("tp").value_parser(number).default_value("1"))
            .arg(arg("kv-memory").conflicts_with("kv-blocks"))
            .arg(arg("kv-blocks"))
            .arg(arg("etcd").value_delimiter(',').action(clap::ArgAction::Append))
            .arg(arg("no-auth").action(clap::ArgAction::SetTrue))
            .arg(arg("cert").requires("key"))
            .arg(arg("key").requires("cert"));
        let root = Command::new("galerne").arg(arg("log").global(true).default_value("warn"));
        root.arg(arg("config").global(true)).subcommand(serve)
    }

    fn parsed(file: &str, arguments: &[&str]) -> ArgMatches {
        let table: Table = file.parse().unwrap();
        check(&command(), &table, "").unwrap();
        let arguments: Vec<_> = ["galerne", "serve"].iter().chain(arguments).collect();
        let first = relaxed(command()).ignore_errors(true).try_get_matches_from(&arguments).unwrap();
        let matches = apply(command(), &table, Some(&first)).try_get_matches_from(&arguments).unwrap();
        matches.subcommand_matches("serve").unwrap().clone()
    }

    #[test]
    fn the_file_fills_in_what_the_command_line_leaves_open() {
        let file = "log = 'info'\n[serve]\nmodel = 'm'\ntp = 4\netcd = ['a', 'b']\nno_auth = true";
        let matches = parsed(file, &["--tp", "2"]);
        assert_eq!(matches.get_one::<String>("model").unwrap(), "m");
        assert_eq!(matches.get_one::<u16>("tp"), Some(&2));
        assert_eq!(matches.get_many::<String>("etcd").unwrap().collect::<Vec<_>>(), ["a", "b"]);
        assert!(matches.get_flag("no-auth"));
        assert_eq!(matches.get_one::<String>("log").unwrap(), "info");
    }

    #[test]
    fn what_excludes_an_argument_gives_way_to_it() {
        let matches = parsed("[serve]\nmodel = 'm'\nkv-memory = 5", &["--kv-blocks", "7"]);
        assert_eq!(matches.get_one::<String>("kv-memory"), None);
        assert_eq!(matches.get_one::<String>("kv-blocks").unwrap(), "7");
    }

    #[test]
    fn wrong_settings_are_named() {
        for (file, says) in [
            ("[srve]", "[srve] is no command: did you mean serve?"),
            ("[serve]\nmodle = 'm'", "serve.modle is no setting of serve: did you mean model?"),
            ("[serve]\ntp = 99", "serve.tp: invalid value '99' for '--tp <"),
            ("[serve]\ntp = 'two'", "serve.tp: invalid value 'two'"),
            ("[serve]\nmodel = 1979-05-27", "serve.model must be a string"),
            ("[serve]\nkv-memory = 1\nkv-blocks = 2", "serve.kv-memory and kv-blocks exclude each other"),
            ("config = 'other.toml'", "config is no setting of galerne"),
            ("[serve]\nno-auth = 'perhaps'", "serve.no-auth must be true or false"),
        ] {
            let error = check(&command(), &file.parse().unwrap(), "").unwrap_err().to_string();
            assert!(error.contains(says), "{file}: {error}");
        }
    }

    #[test]
    fn settings_that_need_others_or_come_twice_are_refused_unless_the_command_line_helps() {
        let wrong = |file: &str, arguments: Option<&[&str]>| {
            let first = arguments.map(|arguments| {
                let arguments = ["galerne"].iter().chain(arguments);
                relaxed(command()).ignore_errors(true).try_get_matches_from(arguments).unwrap()
            });
            together(&command(), &file.parse().unwrap(), "", first.as_ref())
                .err()
                .map(|error| error.to_string())
        };
        let half = "[serve]\nmodel = 'm'\ncert = 'c.pem'";
        let says = "[serve]: the following required arguments were not provided: --key <key>";
        assert_eq!(wrong(half, None).as_deref(), Some(says));
        assert_eq!(wrong(half, Some(&["serve"])).as_deref(), Some(says));
        assert_eq!(wrong(half, Some(&["serve", "--key", "k.pem"])), None);
        assert_eq!(wrong(half, Some(&[])), None, "another command does not care");
        assert_eq!(wrong("[serve]\ncert = 'c.pem'\nkey = 'k.pem'\nno-auth = false", None), None);
        let twice = wrong("[serve]\nmodel = ['a', 'b']", None).unwrap();
        assert!(twice.contains("'--model <model>' cannot be used multiple times"), "{twice}");
        assert_eq!(
            wrong("[serve]\netcd = ['a', 'b']\nkv-memory = 5", Some(&["serve", "--kv-blocks", "7"])),
            None
        );
    }
}
