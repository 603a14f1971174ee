//! `galerne model fetch`: a checkpoint from a model hub, or one file from anywhere.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::Args;
use galerne_checkpoint::Checkpoint;
use indicatif::ProgressBar;
use serde::Deserialize;

use super::download::Client;
use super::manifest::{self, Entry};
use super::{bytes, verify};

/// Files of one repository that are looked at.
const FILES_MAX: usize = 10_000;

/// Fetches a checkpoint: OWNER/NAME from the Hugging Face hub, or one file by its URL.
///
/// An interrupted download goes on where it ended. Every file is held against the SHA-256 that the hub tells for it,
/// and a manifest (SHA256SUMS) is written beside them. Of a repository that holds the weights in several forms, one
/// is taken: safetensors of Hugging Face's layout, else Mistral's own, else the GGUF file that --file names.
#[derive(Args)]
pub(super) struct Fetch {
    /// OWNER/NAME, OWNER/NAME@REVISION, or http(s)://….
    source: String,
    /// Folder to put the files into; by default the model's name.
    #[arg(long, value_name = "FOLDER")]
    to: Option<PathBuf>,
    /// Only this file of the repository: one of several GGUF files, say.
    #[arg(long, value_name = "NAME")]
    file: Option<String>,
    /// The hub.
    #[arg(long, env = "HF_ENDPOINT", default_value = "https://huggingface.co", value_name = "URL")]
    hub: String,
    /// Token for models that ask for one; better in the environment than among the arguments.
    #[arg(long, env = "HF_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    token: Option<String>,
}

/// A file to fetch.
#[derive(Debug)]
struct Wanted {
    /// Where it goes below the folder.
    name: String,
    url: String,
    bytes: Option<u64>,
    sha256: Option<String>,
}

/// What the hub tells of a file.
#[derive(Deserialize)]
struct Listed {
    r#type: String,
    path: String,
    size: u64,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    /// SHA-256 of the content.
    oid: String,
}

impl Fetch {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let client = Client::new(self.token.clone());
        let (name, wanted) =
            if self.source.contains("://") { self.one_file()? } else { self.repository(&client)? };
        let folder = self.to.unwrap_or_else(|| name.into());
        fs::create_dir_all(&folder)
            .map_err(|error| anyhow::anyhow!("cannot make {}: {error}", folder.display()))?;
        let total = wanted.iter().map(|file| file.bytes.unwrap_or(0)).sum();
        println!(
            "{} file(s), {}, into {}",
            wanted.len(),
            if total > 0 { bytes(total) } else { "size unknown".to_owned() },
            folder.display()
        );
        let bar = verify::progress(total);
        let entries = wanted
            .iter()
            .map(|file| fetch(&client, file, &folder, &bar))
            .collect::<anyhow::Result<Vec<_>>>()?;
        bar.finish_and_clear();
        manifest::write(&folder.join(manifest::NAME), entries)?;
        let single = wanted.iter().find(|file| file.name.ends_with(".gguf"));
        let model = single.map_or_else(|| folder.clone(), |file| folder.join(&file.name));
        let checkpoint = Checkpoint::open(&model)?;
        println!("{} is here: galerne up --model {}", checkpoint.name(), model.display());
        Ok(())
    }

    /// A file by its URL; its folder is where we are.
    fn one_file(&self) -> anyhow::Result<(String, Vec<Wanted>)> {
        let path = self.source.split(['?', '#']).next().unwrap_or_default();
        let name = path.rsplit('/').next().unwrap_or_default().to_owned();
        ensure!(manifest::is_inside(&name), "{} does not end in a file's name", self.source);
        Ok((".".to_owned(), vec![Wanted { name, url: self.source.clone(), bytes: None, sha256: None }]))
    }

    fn repository(&self, client: &Client) -> anyhow::Result<(String, Vec<Wanted>)> {
        let (repository, revision) = self.source.split_once('@').unwrap_or((&self.source, "main"));
        let good = |part: &str| {
            !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let (owner, name) = repository
            .split_once('/')
            .filter(|(owner, name)| good(owner) && good(name))
            .with_context(|| format!("{:?} is neither OWNER/NAME nor a URL", self.source))?;
        ensure!(revision.split('/').all(good), "{revision:?} is no revision");
        let hub = self.hub.trim_end_matches('/');
        let listing =
            client.text(&format!("{hub}/api/models/{owner}/{name}/tree/{revision}?recursive=true"))?;
        let listing: Vec<Listed> =
            serde_json::from_str(&listing).context("the hub's listing is not what it should be")?;
        ensure!(
            listing.len() <= FILES_MAX,
            "the repository lists {} files, more than {FILES_MAX}",
            listing.len()
        );
        let files: Vec<Listed> = listing
            .into_iter()
            .filter(|file| file.r#type == "file" && manifest::is_inside(&file.path))
            .collect();
        let names: Vec<&str> = files.iter().map(|file| &*file.path).collect();
        let chosen = choose(&names, self.file.as_deref())?;
        let wanted = files.iter().filter(|file| chosen.contains(&&*file.path)).map(|file| Wanted {
            name: file.path.clone(),
            url: format!("{hub}/{owner}/{name}/resolve/{revision}/{}", file.path),
            bytes: Some(file.size),
            sha256: file.lfs.as_ref().map(|lfs| lfs.oid.to_lowercase()),
        });
        Ok((name.to_owned(), wanted.collect()))
    }
}

/// The files that make one checkpoint.
fn choose<'a>(names: &[&'a str], only: Option<&str>) -> anyhow::Result<Vec<&'a str>> {
    if let Some(only) = only {
        let found = names.iter().find(|name| **name == only);
        return Ok(vec![
            *found
                .with_context(|| format!("the repository has no file {only}: it has {}", names.join(", ")))?,
        ]);
    }
    let top = || names.iter().copied().filter(|name| !name.contains('/'));
    let weights = |prefix: &str| -> Vec<&'a str> {
        top()
            .filter(|name| {
                name.starts_with(prefix)
                    && (name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json"))
            })
            .collect()
    };
    let mut chosen = weights("model");
    if chosen.is_empty() {
        chosen = weights("consolidated");
    }
    if chosen.is_empty() {
        let files: Vec<_> = top().filter(|name| name.ends_with(".gguf")).collect();
        return match files.as_slice() {
            [one] => Ok(vec![*one]),
            [] => bail!("the repository has neither safetensors nor GGUF files"),
            several => {
                bail!("the repository has several GGUF files; name one with --file: {}", several.join(", "))
            }
        };
    }
    let text = |name: &&str| {
        let json = name.ends_with(".json") && !name.ends_with(".index.json");
        json || name.starts_with("tokenizer.model") || name.ends_with(".jinja")
    };
    chosen.extend(top().filter(text));
    Ok(chosen)
}

/// Fetches a file unless it is there, and holds it against what the hub tells of it.
fn fetch(client: &Client, file: &Wanted, folder: &Path, bar: &ProgressBar) -> anyhow::Result<Entry> {
    let path = folder.join(&file.name);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    bar.set_message(file.name.clone());
    if path.is_file() {
        bar.inc(fs::metadata(&path)?.len());
    } else {
        let part = folder.join(format!("{}.part", file.name));
        client.file(&file.url, &part, bar)?;
        let size = fs::metadata(&part)?.len();
        if let Some(expected) = file.bytes.filter(|expected| *expected != size) {
            fs::remove_file(&part)?;
            bail!("{} has {size} bytes instead of {expected}: fetch it again", file.name);
        }
        fs::rename(&part, &path)?;
    }
    let sha256 = manifest::hash(&path, &mut |_| {})?;
    if file.sha256.as_ref().is_some_and(|expected| *expected != sha256) {
        fs::remove_file(&path)?;
        bail!(
            "{} is not what the hub says it is (its SHA-256 differs): it was removed, fetch it again",
            file.name
        );
    }
    Ok(Entry { name: file.name.clone(), sha256 })
}

#[cfg(test)]
mod tests {
    use super::choose;

    #[test]
    fn one_form_of_the_weights_is_chosen() {
        let both = [
            "README.md",
            "config.json",
            "consolidated.safetensors",
            "model-00001-of-2.safetensors",
            "model.safetensors.index.json",
            "params.json",
            "tokenizer.json",
            "tokenizer.model.v3",
            "onnx/model.safetensors",
        ];
        let chosen = choose(&both, None).unwrap();
        assert_eq!(
            chosen,
            [
                "model-00001-of-2.safetensors",
                "model.safetensors.index.json",
                "config.json",
                "params.json",
                "tokenizer.json",
                "tokenizer.model.v3"
            ]
        );
        assert_eq!(choose(&["a.gguf", "README.md"], None).unwrap(), ["a.gguf"]);
        assert_eq!(choose(&["a.gguf", "b.gguf"], Some("b.gguf")).unwrap(), ["b.gguf"]);
        for (names, only, says) in [
            (&["a.gguf", "b.gguf"][..], None, "name one with --file: a.gguf, b.gguf"),
            (&["README.md"], None, "neither safetensors nor GGUF"),
            (&["a.gguf"], Some("c.gguf"), "no file c.gguf"),
        ] {
            let error = choose(names, only).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
