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

    pub(crate) async fn read(&self) -> Result<Arc<Contents>, CoordError> {
        let mut contents = Contents::default();
        if let Some(EtcdTls { ca, identity }) = &self.tls {
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
