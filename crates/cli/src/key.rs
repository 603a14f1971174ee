//! `galerne key`: API keys.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand};
use galerne_router::{ApiKey, key_entry};

/// API keys for a router's --api-keys file.
#[derive(Args)]
pub(crate) struct Key {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    New(New),
}

/// Makes a key, and prints it with its entry for the file. The key is shown this once: the file holds its hash.
#[derive(Args)]
struct New {
    /// Whose key it is: tenants share the fleet fairly, and may have limits in the file.
    #[arg(long, value_name = "NAME")]
    tenant: String,
    /// The key opens the admin port, too, where other machines reach it.
    #[arg(long)]
    operator: bool,
    /// A remark for whoever reads the file.
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// Append the entry to this file, and print the key alone.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

impl Key {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let Command::New(New { tenant, operator, name, file }) = self.command;
        let key = ApiKey::random().context("the system gives no random bytes")?;
        let entry = key_entry(&tenant, &key.sha256(), name.as_deref(), operator);
        let entry = entry.map_err(anyhow::Error::msg)?;
        let Some(file) = file else {
            println!("{}\n\nTo be appended to the file of --api-keys:\n\n{entry}", key.reveal());
            return Ok(());
        };
        let opened = std::fs::OpenOptions::new().create(true).append(true).open(&file);
        let written = opened.and_then(|mut open| open.write_all(format!("\n{entry}").as_bytes()));
        written.map_err(|error| anyhow::anyhow!("cannot append to {}: {error}", file.display()))?;
        println!("{}", key.reveal());
        Ok(())
    }
}
