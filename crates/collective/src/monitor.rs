use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};

use crate::abort::Bell;
use crate::notice::{self, Heard};
use crate::{AbortHandle, CollectiveError};

/// A thread that listens on the control connections: the moment a peer dies or gives up, it ends the epoch here;
/// when the epoch ends here, it tells the peers.
#[derive(Debug)]
pub(crate) struct Monitor {
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// `controls` are the connections to the peers, with their ranks.
    pub(crate) fn start(
        rank: usize,
        controls: Vec<(usize, TcpStream)>,
        bell: Arc<Bell>,
        abort: AbortHandle,
    ) -> io::Result<Self> {
        let thread = thread::Builder::new().name("collective".to_owned()).spawn(move || {
            let cause = listen(rank, controls.iter().collect(), &bell, &abort);
            for (_, control) in &controls {
                notice::send(control, rank, &cause);
            }
        })?;
        Ok(Self { thread: Some(thread) })
    }
}

impl Drop for Monitor {
    /// The epoch is over: waits until the peers are told.
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the collective's monitor panicked");
        }
    }
}

/// Returns why the epoch ended.
fn listen(
    rank: usize,
    mut controls: Vec<&(usize, TcpStream)>,
    bell: &Bell,
    abort: &AbortHandle,
) -> CollectiveError {
    loop {
        if let Some(cause) = abort.cause() {
            return cause;
        }
        let mut polled = vec![PollFd::new(&bell.over, PollFlags::IN)];
        polled.extend(controls.iter().map(|(_, control)| PollFd::new(control, PollFlags::IN)));
        // Without a timeout: the epoch's end rings the bell.
        if let Err(error) = poll(&mut polled, None)
            && error != rustix::io::Errno::INTR
        {
            return abort.raise(CollectiveError::system("watch the peers")(error));
        }
        controls.retain(|(peer, control)| match notice::receive(control, *peer, rank) {
            Heard::Nothing => true,
            Heard::Closed => {
                abort.close(*peer);
                false
            }
            Heard::Failed(cause) => {
                abort.raise(cause);
                false
            }
        });
    }
}
