//! The epoch and its secret in a request's metadata: who shows the secret can read the cluster's etcd.

use galerne_types::Epoch;
use subtle::ConstantTimeEq as _;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Request, Status};

/// Metadata key that carries an epoch's secret to a rank.
const KEY: &str = "galerne-epoch-secret";

/// Puts the secret into a request's metadata, marked as sensitive.
///
/// # Errors
/// INVALID_ARGUMENT if the secret is not ASCII.
pub fn show_secret<T>(request: &mut Request<T>, secret: &str) -> Result<(), Status> {
    let value = secret.parse::<MetadataValue<Ascii>>();
    let mut value = value.map_err(|_| Status::invalid_argument("the epoch's secret is not ASCII"))?;
    value.set_sensitive(true);
    request.metadata_mut().insert(KEY, value);
    Ok(())
}

/// Whether a request shows the secret; takes the same time however much of it is right.
pub fn shows_secret<T>(request: &Request<T>, secret: &str) -> bool {
    let shown = request.metadata().get(KEY).map_or(&[][..], |value| value.as_bytes());
    secret.as_bytes().ct_eq(shown).into()
}

/// Metadata key that carries the epoch that a router believes in to a leader.
const EPOCH_KEY: &str = "galerne-epoch";

/// Puts the epoch that the caller believes in into a request's metadata.
pub fn show_epoch<T>(request: &mut Request<T>, epoch: Epoch) {
    request.metadata_mut().insert(EPOCH_KEY, MetadataValue::from(epoch.0));
}

/// The epoch that a request's caller believes in, if it says one.
pub fn shown_epoch<T>(request: &Request<T>) -> Option<Epoch> {
    request.metadata().get(EPOCH_KEY)?.to_str().ok()?.parse().ok().map(Epoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_shown() {
        let mut request = Request::new(());
        assert_eq!(shown_epoch(&request), None);
        show_epoch(&mut request, Epoch(7));
        assert_eq!(shown_epoch(&request), Some(Epoch(7)));
    }

    #[test]
    fn only_the_right_secret_is_right() {
        let mut request = Request::new(());
        assert!(!shows_secret(&request, "5ec2e7"));
        show_secret(&mut request, "5ec2e7").unwrap();
        assert!(shows_secret(&request, "5ec2e7"));
        assert!(!shows_secret(&request, "5ec2e8") && !shows_secret(&request, ""));
        assert!(!format!("{request:?}").contains("5ec2e7"), "it does not reach logs");
        assert!(show_secret(&mut request, "é\n").is_err());
    }
}
