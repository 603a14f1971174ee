use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::CheckpointError;
use crate::source::{io_error, read_json, read_text};
use crate::text::{MistralVersion, SentencePieceFile, TextAssets, TokenizerAsset};

const TEMPLATE_BYTES_MAX: u64 = 1 << 20;
/// It repeats every added token, which may be thousands.
const TOKENIZER_CONFIG_BYTES_MAX: u64 = 4 << 20;

#[derive(Deserialize, Default)]
struct TokenizerConfig {
    chat_template: Option<Templates>,
    bos_token: Option<TokenText>,
    eos_token: Option<TokenText>,
    add_bos_token: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a chat template or a list of named ones")]
enum Templates {
    One(String),
    Named(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

#[derive(Deserialize)]
struct TemplateFile {
    chat_template: Templates,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a token's text or an object with its `content`")]
enum TokenText {
    Plain(String),
    Added { content: String },
}

impl Templates {
    /// The one called `default`, or the first.
    fn choose(self) -> Option<String> {
        match self {
            Self::One(template) => Some(template),
            Self::Named(mut named) => {
                let default = named.iter().position(|named| named.name == "default").unwrap_or(0);
                (!named.is_empty()).then(|| named.swap_remove(default).template)
            }
        }
    }
}

impl TokenText {
    fn into_text(self) -> String {
        match self {
            Self::Plain(text) | Self::Added { content: text } => text,
        }
    }
}

/// What a folder says about text; `mistral` if its configuration says that the model is Mistral's. A template in a file of its own wins, as in the reference implementation.
pub(super) fn read(folder: &Path, mistral: bool) -> Result<TextAssets, CheckpointError> {
    let config = folder.join("tokenizer_config.json");
    let config: TokenizerConfig = read_json(&config, TOKENIZER_CONFIG_BYTES_MAX)?.unwrap_or_default();
    let mut chat_template = read_text(&folder.join("chat_template.jinja"), TEMPLATE_BYTES_MAX)?;
    if chat_template.is_none() {
        let file: Option<TemplateFile> = read_json(&folder.join("chat_template.json"), TEMPLATE_BYTES_MAX)?;
        chat_template =
            file.map(|file| file.chat_template).or(config.chat_template).and_then(Templates::choose);
    }
    let tokenizer = folder.join("tokenizer.json");
    Ok(TextAssets {
        tokenizer: if tokenizer.is_file() { TokenizerAsset::Json(tokenizer) } else { TokenizerAsset::None },
        sentencepiece: find_sentencepiece(folder, mistral)?,
        chat_template,
        bos_token: config.bos_token.map(TokenText::into_text),
        eos_token: config.eos_token.map(TokenText::into_text),
        add_bos: config.add_bos_token.unwrap_or(false),
    })
}

/// Mistral publishes `tokenizer.model` with or without its version behind it, and mistral-common ships them as
/// `mistral_instruct_tokenizer_DATE.model.v3`. A name with a version says more than one without, and the later
/// version is the model's.
fn find_sentencepiece(folder: &Path, mistral: bool) -> Result<Option<SentencePieceFile>, CheckpointError> {
    const VERSIONS: [(&str, MistralVersion); 3] = [
        (".model.v1", MistralVersion::V1),
        (".model.v2", MistralVersion::V2),
        (".model.v3", MistralVersion::V3),
    ];
    let mut best: Option<(Option<MistralVersion>, PathBuf)> = None;
    for entry in std::fs::read_dir(folder).map_err(|source| io_error(folder, "list it", source))? {
        let path = entry.map_err(|source| io_error(folder, "list it", source))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let version = VERSIONS.iter().find(|(suffix, _)| name.ends_with(suffix)).map(|&(_, version)| version);
        if (version.is_some() || name == "tokenizer.model") && path.is_file() {
            best = best.max(Some((version, path)));
        }
    }
    Ok(best.map(|(version, path)| SentencePieceFile { path, version, mistral }))
}
