//! How the ranks of an epoch find each other: every rank dials the lower ones and is dialled by the higher ones,
//! all at once and without blocking. Whoever cannot prove that it belongs to the epoch is dropped, and disturbs
//! nobody.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::abort::Bell;
use crate::dial::{Dial, Fixed, Identity};
use crate::handshake::{self, Claim, HELLO_BYTES, Nonce, Purpose};
use crate::notice::{self, Heard};
use crate::segment::Address;
use crate::wait::timespec;
use crate::{AbortHandle, CollectiveError, Config};

/// Connections that have not proved yet who they are. One more, and the oldest is dropped.
const HANDSHAKES_MAX: usize = 100;

/// How long one may take to prove it.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);

/// A peer that was met.
#[derive(Debug)]
pub(crate) struct Met {
    pub(crate) control: TcpStream,
    /// To a rank of another host.
    pub(crate) data: Option<TcpStream>,
    pub(crate) memory: Address,
}

/// What is known of a peer so far.
#[derive(Debug, Default)]
struct Meeting {
    control: Option<TcpStream>,
    data: Option<TcpStream>,
    memory: Option<Address>,
}

/// Somebody who dialled.
struct Guest {
    socket: TcpStream,
    challenge: Nonce,
    hello: Fixed<HELLO_BYTES>,
    deadline: Instant,
}

struct Room<'a> {
    config: &'a Config,
    listener: &'a TcpListener,
    identity: Identity<'a>,
    dials: Vec<Dial>,
    guests: VecDeque<Guest>,
    /// By rank; this rank's own stays empty.
    met: Vec<Meeting>,
}

/// Meets all peers: by rank, `None` for this one. `memory` is this rank's segment.
pub(crate) fn meet(
    config: &Config,
    listener: &TcpListener,
    memory: Address,
    bell: &Bell,
    abort: &AbortHandle,
) -> Result<Vec<Option<Met>>, CollectiveError> {
    let purposes = |peer: usize| {
        let data = (!config.shares_memory(peer)).then_some(Purpose::Data);
        [Some(Purpose::Control), data].into_iter().flatten()
    };
    let dials = (0..config.rank)
        .flat_map(|to| purposes(to).map(move |purpose| (to, purpose)))
        .map(|(to, purpose)| Dial::new(to, config.peers[to].address, purpose))
        .collect();
    let mut room = Room {
        config,
        listener,
        identity: Identity { secret: &config.secret, epoch: config.epoch, rank: config.rank, memory },
        dials,
        guests: VecDeque::new(),
        met: config.peers.iter().map(|_| Meeting::default()).collect(),
    };
    room.gather(bell, abort).inspect_err(|cause| room.send_away(cause))?;
    Ok(room.met.into_iter().map(Meeting::complete).collect())
}

impl Meeting {
    fn complete(self) -> Option<Met> {
        Some(Met { control: self.control?, data: self.data, memory: self.memory? })
    }
}

impl Room<'_> {
    fn gather(&mut self, bell: &Bell, abort: &AbortHandle) -> Result<(), CollectiveError> {
        let deadline = Instant::now() + self.config.meet_timeout;
        loop {
            abort.check()?;
            self.admit().map_err(CollectiveError::system("accept a rank's connection"))?;
            self.hear_guests()?;
            self.dial()?;
            self.hear_peers()?;
            let Some(missing) = self.first_missing() else { return Ok(()) };
            let now = Instant::now();
            if now >= deadline {
                return Err(CollectiveError::NotMet {
                    rank: missing,
                    address: self.config.peers[missing].address,
                    epoch: self.config.epoch,
                    waited: self.config.meet_timeout,
                });
            }
            self.wait(bell, now, deadline)?;
        }
    }

    /// Challenges everyone who waits at the door.
    fn admit(&mut self) -> io::Result<()> {
        loop {
            let socket = match self.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if is_of_the_connection(&error) => continue,
                Err(error) => return Err(error),
            };
            let challenge = nonce()?;
            socket.set_nonblocking(true)?;
            // The first bytes on a connection always find room in its buffer; if not, the guest is gone.
            if (&socket).write_all(&challenge).is_ok() {
                if self.guests.len() == HANDSHAKES_MAX {
                    self.guests.pop_front();
                }
                let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
                self.guests.push_back(Guest { socket, challenge, hello: Fixed::default(), deadline });
            }
        }
    }

    fn hear_guests(&mut self) -> Result<(), CollectiveError> {
        let now = Instant::now();
        for _ in 0..self.guests.len() {
            let Some(mut guest) = self.guests.pop_front() else { break };
            match guest.hello.fill(&guest.socket) {
                Ok(true) => self.welcome(guest)?,
                Ok(false) if now < guest.deadline => self.guests.push_back(guest),
                Ok(false) => tracing::debug!("dropped a connection that did not say who it is in time"),
                Err(error) => tracing::debug!("dropped a connection during its handshake: {error}"),
            }
        }
        Ok(())
    }

    /// Takes in whoever proves to be an expected rank.
    fn welcome(&mut self, guest: Guest) -> Result<(), CollectiveError> {
        let secret = self.identity.secret;
        let Some(claim) = handshake::read_hello(secret, &guest.challenge, &guest.hello.bytes) else {
            tracing::debug!("refused a connection that does not know the epoch's secret");
            return Ok(());
        };
        if !self.is_expected(&claim) {
            tracing::debug!(
                epoch = claim.epoch,
                from = claim.from,
                to = claim.to,
                "refused a rank's connection"
            );
            return Ok(());
        }
        let welcome = handshake::welcome(secret, &guest.challenge, &guest.hello.bytes, self.identity.memory);
        if (&guest.socket).write_all(&welcome).is_ok() {
            self.enter(claim.from.into(), claim.purpose, guest.socket, claim.memory)?;
        }
        Ok(())
    }

    fn is_expected(&self, claim: &Claim) -> bool {
        let from = usize::from(claim.from);
        claim.epoch == self.config.epoch
            && usize::from(claim.to) == self.config.rank
            && (self.config.rank + 1..self.config.peers.len()).contains(&from)
            && (claim.purpose == Purpose::Control || !self.config.shares_memory(from))
    }

    fn dial(&mut self) -> Result<(), CollectiveError> {
        let now = Instant::now();
        for index in 0..self.dials.len() {
            let Some((socket, memory)) = self.dials[index].advance(&self.identity, now) else { continue };
            let (to, purpose) = (self.dials[index].to, self.dials[index].purpose);
            self.enter(to, purpose, socket, memory)?;
        }
        Ok(())
    }

    fn enter(
        &mut self,
        rank: usize,
        purpose: Purpose,
        socket: TcpStream,
        memory: Address,
    ) -> Result<(), CollectiveError> {
        socket.set_nodelay(true).map_err(CollectiveError::system("set TCP_NODELAY"))?;
        let peer = &mut self.met[rank];
        peer.memory = Some(memory);
        match purpose {
            Purpose::Control => peer.control = Some(socket),
            Purpose::Data => peer.data = Some(socket),
        }
        Ok(())
    }

    /// A peer that came and went ends the meeting: its epoch cannot be completed any more.
    fn hear_peers(&self) -> Result<(), CollectiveError> {
        for (rank, peer) in self.met.iter().enumerate() {
            if let Some(control) = &peer.control {
                match notice::receive(control, rank, self.config.rank) {
                    Heard::Nothing => {}
                    Heard::Closed => return Err(CollectiveError::AbortedBy { rank }),
                    Heard::Failed(cause) => return Err(cause),
                }
            }
        }
        Ok(())
    }

    fn first_missing(&self) -> Option<usize> {
        self.met.iter().enumerate().position(|(rank, peer)| {
            rank != self.config.rank
                && (peer.control.is_none() || (peer.data.is_none() && !self.config.shares_memory(rank)))
        })
    }

    /// Until something comes, a guest's time is up, a dial is due again, or the epoch is over.
    fn wait(&self, bell: &Bell, now: Instant, deadline: Instant) -> Result<(), CollectiveError> {
        let mut polled =
            vec![PollFd::new(&bell.over, PollFlags::IN), PollFd::new(self.listener, PollFlags::IN)];
        let mut until = deadline;
        for guest in &self.guests {
            polled.push(PollFd::new(&guest.socket, PollFlags::IN));
            until = until.min(guest.deadline);
        }
        for dial in &self.dials {
            polled.extend(dial.awaited().map(|(socket, events)| PollFd::new(socket, events)));
            until = until.min(dial.due().unwrap_or(deadline));
        }
        let controls = self.met.iter().filter_map(|peer| peer.control.as_ref());
        polled.extend(controls.map(|control| PollFd::new(control, PollFlags::IN)));
        match poll(&mut polled, Some(&timespec(until.saturating_duration_since(now)))) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(CollectiveError::system("wait for the other ranks")(error)),
        }
    }

    /// Tells those who came why the meeting failed.
    fn send_away(&self, cause: &CollectiveError) {
        for control in self.met.iter().filter_map(|peer| peer.control.as_ref()) {
            notice::send(control, self.config.rank, cause);
        }
    }
}

/// Errors of `accept` that concern one connection only (accept(2)).
fn is_of_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionReset, HostUnreachable, Interrupted, NetworkDown, NetworkUnreachable,
    };
    matches!(
        error.kind(),
        ConnectionAborted
            | ConnectionReset
            | HostUnreachable
            | Interrupted
            | NetworkDown
            | NetworkUnreachable
    )
}

pub(crate) fn nonce() -> io::Result<Nonce> {
    let mut nonce = [0; size_of::<Nonce>()];
    getrandom::fill(&mut nonce)?;
    Ok(nonce)
}
