use std::fmt;

use crate::nccl::Library;
use crate::nccl::library::RawId;
use crate::{Collective, CollectiveError};

/// Where the ranks of one epoch meet in NCCL. Used once: it cannot be copied, and [`connect`](super::connect) takes
/// none of an epoch for which this process has used one. Whoever knows it could join, so it is never printed.
#[derive(PartialEq, Eq)]
pub struct UniqueId {
    pub(crate) epoch: u64,
    pub(crate) raw: RawId,
}

const EPOCH_BYTES: usize = size_of::<u64>();

impl UniqueId {
    /// Rank 0 makes an id for `epoch`, and every rank gets it. `control` is that epoch's collective between the
    /// processes, so the id comes from nobody but its rank 0.
    pub fn share(
        library: &Library,
        epoch: u64,
        control: &mut dyn Collective,
    ) -> Result<Self, CollectiveError> {
        let mut message = [0; EPOCH_BYTES + size_of::<RawId>()];
        if control.rank() == 0 {
            // The others wait for it: they shall hear if there is none.
            let raw = library.unique_id().map_err(|cause| control.abort_handle().raise(cause))?;
            message[..EPOCH_BYTES].copy_from_slice(&epoch.to_le_bytes());
            message[EPOCH_BYTES..].copy_from_slice(&raw.0);
        }
        control.broadcast(0, &mut message)?;
        let mut of = [0; EPOCH_BYTES];
        of.copy_from_slice(&message[..EPOCH_BYTES]);
        let mut raw = RawId([0; size_of::<RawId>()]);
        raw.0.copy_from_slice(&message[EPOCH_BYTES..]);
        let of = u64::from_le_bytes(of);
        if of != epoch {
            return Err(control.abort_handle().raise(CollectiveError::StaleId { of, epoch }));
        }
        Ok(Self { epoch, raw })
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UniqueId(… of epoch {})", self.epoch)
    }
}
