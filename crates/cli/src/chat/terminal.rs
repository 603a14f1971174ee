//! Lines from a person: edited, and remembered from one conversation to the next.

use std::fs::{DirBuilder, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Config, Editor};

/// Lines that are remembered.
const HISTORY_LINES_MAX: usize = 1000;

/// What a person wants next.
pub(super) enum Line {
    /// To say something.
    Text(String),
    /// Another conversation.
    New,
    /// To leave.
    End,
}

/// The terminal, while a conversation lasts.
pub(super) struct Terminal {
    editor: Editor<(), FileHistory>,
    history: Option<PathBuf>,
}

impl Terminal {
    pub(super) fn open(remember: bool) -> anyhow::Result<Self> {
        let config = Config::builder().max_history_size(HISTORY_LINES_MAX)?.auto_add_history(true).build();
        let mut editor = Editor::with_config(config).context("the terminal cannot be used")?;
        let history = if remember { history_file() } else { None };
        if let Some(path) = &history {
            editor.load_history(path).ok(); // a history that cannot be read is no reason not to talk
        }
        Ok(Self { editor, history })
    }

    /// The next line; a line that ends in a backslash goes on in the next one.
    pub(super) fn line(&mut self) -> anyhow::Result<Line> {
        let mut text = String::new();
        loop {
            let prompt = if text.is_empty() { "> " } else { "… " };
            // Other tasks go on meanwhile.
            match tokio::task::block_in_place(|| self.editor.readline(prompt)) {
                Ok(line) => match line.strip_suffix('\\') {
                    Some(begun) => text.extend([begun, "\n"]),
                    None => text.push_str(&line),
                },
                Err(ReadlineError::Eof) => return Ok(Line::End),
                Err(ReadlineError::Interrupted) => {
                    text.clear(); // Ctrl-C drops what was being written
                    continue;
                }
                Err(error) => return Err(error).context("the terminal cannot be read"),
            }
            match text.trim() {
                _ if text.ends_with('\n') => {}
                "" => text.clear(),
                "/quit" | "/exit" => return Ok(Line::End),
                "/new" => return Ok(Line::New),
                _ => return Ok(Line::Text(text)),
            }
        }
    }

    pub(super) fn close(mut self) -> anyhow::Result<()> {
        let Some(path) = self.history else { return Ok(()) };
        private(&path).and_then(|()| Ok(self.editor.save_history(&path)?)).with_context(|| {
            format!("the lines of this conversation cannot be remembered in {}", path.display())
        })
    }
}

/// Where lines are kept, after the XDG base directory specification.
fn history_file() -> Option<PathBuf> {
    let from = |variable| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let state = from("XDG_STATE_HOME").or_else(|| Some(from("HOME")?.join(".local/state")))?;
    Some(state.join("galerne/chat_history"))
}

/// Makes a file that nobody else may read, unless it is there.
fn private(path: &Path) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    Ok(())
}
