//! The file of API keys:
//!
//! ```toml
//! [[key]]
//! tenant = "acme"
//! sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
//! name = "laptop of Ada"         # optional: for whoever reads the file
//! operator = true                # optional: lets in at the admin port, where other machines reach it
//!
//! [tenant.acme]                  # optional, as is each line
//! requests_per_minute = 600
//! tokens_per_minute = 1_000_000
//! requests_at_once = 64
//! ```
//!
//! A tenant may have several keys, so that one can be replaced while the other still works. The file holds no secret:
//! a key cannot be had back from its hash.

use std::collections::{BTreeMap, HashMap};
use std::io::Read as _;
use std::num::{NonZeroU32, NonZeroU64};
use std::path::Path;

use galerne_dispatch::Quota;
use galerne_types::TenantId;
use serde::Deserialize;
use subtle::ConstantTimeEq as _;

use super::key::Digest;

/// Bytes of a key file: some twenty thousand keys.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Characters of a tenant's name.
const TENANT_CHARS_MAX: usize = 64;

/// What is wrong with a key file; the text of the file is not repeated, in case a key stands in it.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It cannot be read.
    #[error("the API keys in {file} cannot be read: {reason}")]
    Read {
        /// Which file.
        file: String,
        /// Why not.
        reason: String,
    },
    /// It says something that makes no sense.
    #[error("the API keys in {file} are wrong: {what}")]
    Wrong {
        /// Which file.
        file: String,
        /// What is wrong, and where.
        what: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    #[serde(default)]
    key: Vec<Key>,
    #[serde(default)]
    tenant: BTreeMap<String, Limits>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Key {
    tenant: String,
    sha256: String,
    /// For people only.
    #[serde(rename = "name")]
    _name: Option<String>,
    #[serde(default)]
    operator: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Limits {
    requests_per_minute: Option<NonZeroU64>,
    tokens_per_minute: Option<NonZeroU64>,
    requests_at_once: Option<NonZeroU32>,
}

/// Whose a key is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Holder {
    pub(crate) tenant: TenantId,
    /// May use the admin port, too.
    pub(crate) operator: bool,
}

/// Whose each key is, and what each tenant may use.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct KeyTable {
    /// By the first bytes of the hash.
    keys: HashMap<[u8; 8], Vec<(Digest, Holder)>>,
    quotas: BTreeMap<TenantId, Quota>,
}

impl KeyTable {
    pub(crate) fn read(file: &Path) -> Result<Self, KeyFileError> {
        let name = || file.display().to_string();
        let mut text = String::new();
        let read = std::fs::File::open(file)
            .and_then(|open| open.take(FILE_BYTES_MAX + 1).read_to_string(&mut text));
        read.map_err(|error| KeyFileError::Read { file: name(), reason: error.to_string() })?;
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(KeyFileError::Wrong {
                file: name(),
                what: format!("more than {FILE_BYTES_MAX} bytes"),
            });
        }
        Self::parse(&text).map_err(|what| KeyFileError::Wrong { file: name(), what })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let Keys { key, tenant } = toml::from_str(text).map_err(|error| {
            let before = error.span().and_then(|span| text.get(..span.start));
            let line = before.map_or(0, |before| before.matches('\n').count()) + 1;
            format!("line {line}: {}", error.message().replace('\n', " "))
        })?;
        let mut table = Self::default();
        for (at, Key { tenant, sha256, _name, operator }) in key.iter().enumerate() {
            check_tenant(tenant).map_err(|why| format!("key {}: {why}", at + 1))?;
            let digest = Digest::parse(sha256)
                .ok_or_else(|| format!("key {}: sha256 must be 64 hexadecimal digits", at + 1))?;
            if table.find(digest).is_some() {
                return Err(format!("key {}: it stands in the file twice", at + 1));
            }
            let holder = Holder { tenant: tenant_id(tenant), operator: *operator };
            table.keys.entry(bucket(digest)).or_default().push((digest, holder));
        }
        for (name, limits) in &tenant {
            let Limits { requests_per_minute, tokens_per_minute, requests_at_once } = *limits;
            if !key.iter().any(|key| key.tenant == *name) {
                return Err(format!("tenant {name:?} has limits but no key"));
            }
            let quota = Quota { requests_per_minute, tokens_per_minute, requests_at_once };
            table.quotas.insert(tenant_id(name), quota);
        }
        Ok(table)
    }

    /// Whose key it is. The time that this takes tells nothing of the keys: they are compared as hashes, whose
    /// first bytes choose a bucket, and as a whole in constant time there.
    pub(crate) fn holder(&self, key: &[u8]) -> Option<Holder> {
        self.find(Digest::of(key))
    }

    pub(crate) fn quotas(&self) -> &BTreeMap<TenantId, Quota> {
        &self.quotas
    }

    fn find(&self, digest: Digest) -> Option<Holder> {
        let entries = self.keys.get(&bucket(digest))?;
        entries.iter().find(|(known, _)| known.0.ct_eq(&digest.0).into()).map(|(_, holder)| *holder)
    }
}

fn bucket(Digest([a, b, c, d, e, f, g, h, ..]): Digest) -> [u8; 8] {
    [a, b, c, d, e, f, g, h]
}

/// The same number for the same name at every router, and never that of callers without a key.
fn tenant_id(name: &str) -> TenantId {
    TenantId(u64::from_le_bytes(bucket(Digest::of(name.as_bytes()))).max(1))
}

fn check_tenant(name: &str) -> Result<(), String> {
    let fits = (1..=TENANT_CHARS_MAX).contains(&name.chars().count());
    if fits && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')) {
        return Ok(());
    }
    Err(format!("a tenant's name has 1 to {TENANT_CHARS_MAX} letters, digits, dots, dashes and underscores"))
}

/// What a key file says of a new key, to be appended to it.
///
/// # Errors
/// When the tenant's name is none.
pub fn key_entry(tenant: &str, sha256: &str, name: Option<&str>, operator: bool) -> Result<String, String> {
    check_tenant(tenant)?;
    let name = name.map_or(String::new(), |name| format!("name = {}\n", toml_string(name)));
    let operator = if operator { "operator = true\n" } else { "" };
    Ok(format!("[[key]]\ntenant = \"{tenant}\"\nsha256 = \"{sha256}\"\n{name}{operator}"))
}

/// A TOML basic string.
fn toml_string(text: &str) -> String {
    let escaped = text.chars().map(|c| match c {
        '"' | '\\' => format!("\\{c}"),
        c if c.is_control() => format!("\\u{:04x}", u32::from(c)),
        c => c.to_string(),
    });
    format!("\"{}\"", escaped.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::ApiKey;

    #[test]
    fn what_is_made_for_a_file_is_understood_from_it() {
        let (key, other) = (ApiKey::random().unwrap(), ApiKey::random().unwrap());
        let mut text = key_entry("acme", &key.sha256(), Some("the \"first\"\n\\one"), false).unwrap();
        text += &key_entry("acme", &other.sha256(), None, true).unwrap();
        text += "[tenant.acme]\nrequests_per_minute = 60\ntokens_per_minute = 1_000\nrequests_at_once = 2\n";
        let table = KeyTable::parse(&text).unwrap();
        let Holder { tenant, operator } = table.holder(key.reveal().as_bytes()).unwrap();
        assert!(!operator);
        assert_eq!(table.holder(other.reveal().as_bytes()), Some(Holder { tenant, operator: true }));
        assert_eq!(table.holder(b"galerne-"), None);
        let quota = table.quotas()[&tenant];
        assert_eq!(quota.tokens_per_minute.map(NonZeroU64::get), Some(1000));
        assert_eq!(tenant, TenantId(11_549_694_032_862_194_562), "a name's number is the same for ever");
    }

    #[test]
    fn what_is_wrong_is_said_without_the_files_text() {
        let digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let key =
            |tenant: &str, sha256: &str| format!("[[key]]\ntenant = \"{tenant}\"\nsha256 = \"{sha256}\"\n");
        let twice = key("acme", digest) + &key("other", digest);
        for (text, says) in [
            (key("acme", "galerne-5ec2e7"), "key 1: sha256 must be 64 hexadecimal digits"),
            (key("a/b", digest), "key 1: a tenant's name has 1 to 64 letters"),
            (twice, "key 2: it stands in the file twice"),
            ("[tenant.acme]\nrequests_per_minute = 1".to_owned(), "tenant \"acme\" has limits but no key"),
            ("\n[tenant.acme]\nrequests_per_minute = 0".to_owned(), "line 3: "),
            ("\n\nkeys = galerne-5ec2e7".to_owned(), "line 3: "),
            ("[[key]]\nsecret = \"galerne-5ec2e7\"".to_owned(), "unknown field `secret`"),
        ] {
            let wrong = KeyTable::parse(&text).unwrap_err();
            assert!(wrong.contains(says), "{wrong}");
            assert!(!wrong.contains("5ec2e7"), "{wrong}");
        }
        assert_eq!(KeyTable::parse("").unwrap(), KeyTable::default(), "no keys: nobody may enter");
    }
}
