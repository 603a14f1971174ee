//! An authority for tests: real certificates, in files. Other crates' tests take this file in by its path.
#![allow(dead_code, reason = "no test needs all of it")]

use std::path::PathBuf;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};

/// An authority with a folder of its own.
pub(crate) struct Authority {
    dir: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new one, whose certificate is in [`ca`](Self::ca).
    pub(crate) fn new() -> Self {
        let (dir, key) = (tempfile::tempdir().unwrap(), KeyPair::generate().unwrap());
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        // A name of its own: OpenSSL takes a certificate whose issuer is called like its holder for a self-signed one.
        params.distinguished_name.push(DnType::CommonName, "authority of a test");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        std::fs::write(dir.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { dir, issuer: Issuer::new(params, key) }
    }

    /// Its certificate.
    pub(crate) fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// A certificate for these names and its key, in files that begin with the first name; those of an earlier one are
    /// replaced.
    pub(crate) fn issue(&self, names: &[&str]) -> (PathBuf, PathBuf) {
        let names_owned: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        self.write(names, &CertificateParams::new(names_owned).unwrap())
    }

    /// One that was good in the year 2001.
    pub(crate) fn issue_expired(&self, name: &str) -> (PathBuf, PathBuf) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(2001, 12, 31);
        self.write(&[name], &params)
    }

    fn write(&self, names: &[&str], params: &CertificateParams) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let file = |end: &str| self.dir.path().join(format!("{}.{end}", names[0]));
        std::fs::write(file("pem"), cert.pem()).unwrap();
        std::fs::write(file("key"), key.serialize_pem()).unwrap();
        (file("pem"), file("key"))
    }

    /// A file in its folder.
    pub(crate) fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}
