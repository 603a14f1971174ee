use std::io::{self, Read, Write};
use std::mem;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};

use crate::config::Secret;
use crate::handshake::{self, Claim, HELLO_BYTES, Nonce, Purpose, WELCOME_BYTES};
use crate::meet::nonce;
use crate::segment::Address;

/// Before the second try; twice as long before each further one.
const RETRY_MIN: Duration = Duration::from_millis(5);
const RETRY_MAX: Duration = Duration::from_millis(200);

/// A connection may take so many times the wait before its next try. Where the queue of a listener is full, or a packet
/// is lost, the system itself asks again only after a second.
const CONNECT_RETRIES: u32 = 20;

/// Who this rank is.
pub(crate) struct Identity<'a> {
    pub(crate) secret: &'a Secret,
    pub(crate) epoch: u64,
    pub(crate) rank: usize,
    pub(crate) memory: Address,
}

/// One connection on its way to a lower rank. The peer may come late, or still be at an older epoch: whatever
/// goes wrong, it is tried again. A peer that is busy is waited for in the queue of its listener.
#[derive(Debug)]
pub(crate) struct Dial {
    pub(crate) to: usize,
    pub(crate) purpose: Purpose,
    address: SocketAddr,
    stage: Stage,
    retry: Duration,
}

#[derive(Debug)]
enum Stage {
    /// To be tried (again) at this time; `None`: at once.
    Idle(Option<Instant>),
    /// Until this time.
    Connecting(TcpStream, Instant),
    /// Connected; waits for the challenge.
    Connected(TcpStream, Fixed<32>),
    /// Has answered the challenge; waits for the welcome.
    Answered(TcpStream, Box<Answer>),
    Done,
}

#[derive(Debug)]
struct Answer {
    challenge: Nonce,
    hello: [u8; HELLO_BYTES],
    welcome: Fixed<WELCOME_BYTES>,
}

impl Dial {
    pub(crate) fn new(to: usize, address: SocketAddr, purpose: Purpose) -> Self {
        Self { to, purpose, address, stage: Stage::Idle(None), retry: RETRY_MIN }
    }

    /// Goes one step if it can. Returns the authenticated connection and the peer's segment, once.
    pub(crate) fn advance(&mut self, identity: &Identity<'_>, now: Instant) -> Option<(TcpStream, Address)> {
        let stage = mem::replace(&mut self.stage, Stage::Done);
        match self.step(stage, identity, now) {
            Ok((stage, met)) => {
                self.stage = stage;
                met
            }
            Err(error) => {
                tracing::debug!(rank = self.to, address = %self.address, "not met yet: {error}");
                self.stage = Stage::Idle(Some(now + self.retry));
                self.retry = (self.retry * 2).min(RETRY_MAX);
                None
            }
        }
    }

    fn step(
        &self,
        stage: Stage,
        identity: &Identity<'_>,
        now: Instant,
    ) -> io::Result<(Stage, Option<(TcpStream, Address)>)> {
        let next = match stage {
            Stage::Idle(Some(due)) if now < due => Stage::Idle(Some(due)),
            Stage::Idle(_) => {
                Stage::Connecting(start_connecting(self.address)?, now + self.retry * CONNECT_RETRIES)
            }
            Stage::Connecting(socket, due) => {
                if is_connected(&socket)? {
                    Stage::Connected(socket, Fixed::default())
                } else if now < due {
                    Stage::Connecting(socket, due)
                } else {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Stage::Connected(socket, mut challenge) => {
                if challenge.fill(&socket)? {
                    self.answer(socket, challenge.bytes, identity)?
                } else {
                    Stage::Connected(socket, challenge)
                }
            }
            Stage::Answered(socket, mut answer) => {
                if answer.welcome.fill(&socket)? {
                    let Answer { challenge, hello, welcome } = *answer;
                    let memory = handshake::read_welcome(identity.secret, &challenge, &hello, &welcome.bytes)
                        .ok_or_else(|| io::Error::other("it does not know the epoch's secret"))?;
                    return Ok((Stage::Done, Some((socket, memory))));
                }
                Stage::Answered(socket, answer)
            }
            Stage::Done => Stage::Done,
        };
        Ok((next, None))
    }

    fn answer(&self, socket: TcpStream, challenge: Nonce, identity: &Identity<'_>) -> io::Result<Stage> {
        let claim = Claim {
            epoch: identity.epoch,
            from: identity.rank as u16,
            to: self.to as u16,
            purpose: self.purpose,
            memory: identity.memory,
        };
        let hello = handshake::hello(identity.secret, &challenge, &claim, &nonce()?);
        (&socket).write_all(&hello)?;
        Ok(Stage::Answered(socket, Box::new(Answer { challenge, hello, welcome: Fixed::default() })))
    }

    /// The socket that it waits for.
    pub(crate) fn awaited(&self) -> Option<(&TcpStream, PollFlags)> {
        match &self.stage {
            Stage::Connecting(socket, _) => Some((socket, PollFlags::OUT)),
            Stage::Connected(socket, _) | Stage::Answered(socket, _) => Some((socket, PollFlags::IN)),
            Stage::Idle(_) | Stage::Done => None,
        }
    }

    /// The time that it waits for.
    pub(crate) fn due(&self) -> Option<Instant> {
        match &self.stage {
            Stage::Idle(due) => *due,
            Stage::Connecting(_, due) => Some(*due),
            _ => None,
        }
    }
}

fn start_connecting(address: SocketAddr) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    match connect(&socket, &address) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(socket.into()),
        Err(error) => Err(error.into()),
    }
}

/// `false` while the connection is being made.
fn is_connected(socket: &TcpStream) -> io::Result<bool> {
    if let Some(error) = socket.take_error()? {
        return Err(error);
    }
    match socket.peer_addr() {
        // Where nobody listens on a port of this host, TCP may connect a socket to itself.
        Ok(peer) if peer == socket.local_addr()? => Err(io::ErrorKind::ConnectionRefused.into()),
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
        Err(error) => Err(error),
    }
}

/// A message of a fixed length on its way in.
#[derive(Debug)]
pub(crate) struct Fixed<const BYTES: usize> {
    pub(crate) bytes: [u8; BYTES],
    filled: usize,
}

impl<const BYTES: usize> Default for Fixed<BYTES> {
    fn default() -> Self {
        Self { bytes: [0; BYTES], filled: 0 }
    }
}

impl<const BYTES: usize> Fixed<BYTES> {
    /// Reads what is there, never more than belongs to the message. Whether it is complete.
    pub(crate) fn fill(&mut self, mut socket: &TcpStream) -> io::Result<bool> {
        while self.filled < BYTES {
            match socket.read(&mut self.bytes[self.filled..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => self.filled += read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}
