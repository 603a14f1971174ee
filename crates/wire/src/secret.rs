//! The epoch's secret in a request's metadata: who shows it can read the cluster's etcd.

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

#[cfg(test)]
mod tests {
    use super::*;

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
