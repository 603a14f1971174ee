//! How etcd is spoken to: in the open, under TLS, with a name and a password.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};

use crate::error::CoordError;

/// How etcd is spoken to; by default in the open and without a name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EtcdAccess {
    /// TLS, if etcd speaks it.
    pub tls: Option<EtcdTls>,
    /// Who asks, if etcd wants to know.
    pub login: Option<EtcdLogin>,
}

/// PEM files for TLS with etcd. They are read again when a connection has to be made anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdTls {
    /// Certificates of the authority of etcd's members.
    pub ca: PathBuf,
    /// Our own certificate and its key, if etcd wants to see one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name that the members' certificates are made for; without it, the hosts of their endpoints.
    pub name: Option<String>,
}

/// A user of etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdLogin {
    /// Its name.
    pub user: String,
    /// The file that holds its password, in one line.
    pub password_file: PathBuf,
}

/// What stood in the files.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Contents {
    tls: Vec<Vec<u8>>,
    password: String,
}

impl EtcdAccess {
    pub(crate) fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    /// `reason`, and what to do about it where that is known.
    pub(crate) fn explain(&self, reason: String) -> String {
        match self.advice(&reason) {
            Some(advice) => format!("{reason}: {advice}"),
            None => reason,
        }
    }

    /// The words are rustls's and etcd's own.
    fn advice(&self, reason: &str) -> Option<&'static str> {
        let open = "nobody speaks TLS there: leave out --etcd-ca, or name etcd's port for TLS";
        let nameless = self.tls.as_ref().is_some_and(|tls| tls.identity.is_none());
        // What etcd answers, an alert or a sentence in the clear, may be lost with the connection.
        const BROKEN: [&str; 4] =
            ["broken pipe", "onnection closed", "onnection reset", "onnection was not ready"];
        if self.tls.is_some() && BROKEN.iter().any(|words| reason.contains(words)) {
            return Some(match nameless {
                true => {
                    "if etcd wants to see a certificate, name one with --etcd-cert and --etcd-key; \
                     if nobody speaks TLS there, leave out --etcd-ca"
                }
                false => {
                    "if etcd does not take our certificate, its --trusted-ca-file must hold --etcd-cert's \
                     authority; if nobody speaks TLS there, leave out --etcd-ca"
                }
            });
        }
        let certificate = match nameless {
            true => "etcd wants to see a certificate: name one with --etcd-cert and --etcd-key",
            false => {
                "etcd does not take our certificate: its --trusted-ca-file must hold --etcd-cert's authority"
            }
        };
        let known: [(&str, &'static str); 10] = [
            ("UnknownIssuer", "no authority in --etcd-ca has made etcd's certificate"),
            ("BadSignature", "no authority in --etcd-ca has made etcd's certificate"),
            (
                "not valid for name",
                "etcd's certificate must be made for the host of its endpoint, or for the name of --etcd-tls-name",
            ),
            ("InvalidContentType", open),
            ("tls handshake eof", open),
            ("fatal alert", certificate),
            ("user name is empty", "etcd wants to know who asks: name --etcd-user and --etcd-password-file"),
            ("authentication failed", "look at --etcd-user and at what stands in --etcd-password-file"),
            ("authentication is not enabled", "leave out --etcd-user, or enable it at etcd"),
            ("permission denied", "grant the user of --etcd-user to read and write all keys below /galerne/"),
        ];
        known.into_iter().find(|(words, _)| reason.contains(words)).map(|(_, advice)| advice)
    }

    pub(crate) async fn read(&self) -> Result<Arc<Contents>, CoordError> {
        let mut contents = Contents::default();
        if let Some(EtcdTls { ca, identity, .. }) = &self.tls {
            let identity = identity.iter().flat_map(|(cert, key)| [cert, key]);
            for file in std::iter::once(ca).chain(identity) {
                contents.tls.push(tokio::fs::read(file).await.map_err(|error| wrong(file, &error))?);
            }
        }
        if let Some(EtcdLogin { password_file, .. }) = &self.login {
            let text = tokio::fs::read_to_string(password_file).await;
            let text = text.map_err(|error| wrong(password_file, &error))?;
            text.trim_end_matches(['\r', '\n']).clone_into(&mut contents.password);
        }
        Ok(Arc::new(contents))
    }

    /// Adds to `options` what the files say.
    pub(crate) fn apply(&self, contents: &Contents, mut options: ConnectOptions) -> ConnectOptions {
        if let [ca, identity @ ..] = &contents.tls[..] {
            let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(ca));
            if let [cert, key] = identity {
                tls = tls.identity(Identity::from_pem(cert, key));
            }
            if let Some(name) = self.tls.as_ref().and_then(|tls| tls.name.as_ref()) {
                tls = tls.domain_name(name);
            }
            options = options.with_tls(tls);
        }
        if let Some(EtcdLogin { user, .. }) = &self.login {
            options = options.with_user(user, &contents.password).with_auto_token_refresh(true);
        }
        options
    }
}

fn wrong(file: &Path, error: &std::io::Error) -> CoordError {
    CoordError::Access { file: file.display().to_string(), reason: error.to_string() }
}
