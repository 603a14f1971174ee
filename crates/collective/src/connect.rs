use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;

use crate::abort::Bell;
use crate::meet::{Met, meet};
use crate::mesh::{Link, Mesh};
use crate::monitor::Monitor;
use crate::segment::Segment;
use crate::spin::Spin;
use crate::stream::Stream;
use crate::{AbortHandle, CollectiveError, Config, CpuCollective, handshake};

/// Where one rank process is met by its peers. It outlives epochs: every [`connect`] borrows it.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    address: SocketAddr,
}

/// Listens on a free port of `bind`.
pub fn listen(bind: IpAddr) -> io::Result<Listener> {
    let socket = TcpListener::bind((bind, 0))?;
    socket.set_nonblocking(true)?;
    let address = socket.local_addr()?;
    Ok(Listener { socket, address })
}

impl Listener {
    /// The address it is bound to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Meets all peers of the epoch, or fails within `config.meet_timeout`. Blocks; `abort` ends it from another
/// thread.
pub fn connect(
    config: &Config,
    listener: &Listener,
    abort: &AbortHandle,
) -> Result<CpuCollective, CollectiveError> {
    config.check()?;
    join(config, listener, abort).map_err(|cause| {
        let cause = abort.raise(cause);
        abort.detach();
        cause
    })
}

fn join(config: &Config, listener: &Listener, abort: &AbortHandle) -> Result<CpuCollective, CollectiveError> {
    let token = |rank| handshake::token(&config.secret, config.epoch, rank);
    let own =
        Segment::create(&token(config.rank)).map_err(CollectiveError::system("create shared memory"))?;
    let own = Arc::new(own);
    let bell = Bell::new(own.clone()).map_err(CollectiveError::system("create an event"))?;
    let bell = Arc::new(bell);
    abort.attach(bell.clone());

    let met = meet(config, &listener.socket, own.address(), &bell, abort)?;
    let mut links = Vec::with_capacity(met.len());
    let mut controls = Vec::with_capacity(met.len());
    for (rank, peer) in met.into_iter().enumerate() {
        links.push(match peer {
            None => Link::Own,
            Some(Met { control, data, memory }) => {
                controls.push((rank, control));
                match data {
                    Some(data) => Link::Stream(Stream::new(data)),
                    None => Link::Memory(
                        Segment::open(memory, &token(rank))
                            .map_err(|reason| CollectiveError::Memory { rank, reason: Arc::new(reason) })?,
                    ),
                }
            }
        });
    }

    let neighbours = (0..config.peers.len()).filter(|rank| config.shares_memory(*rank)).count();
    let spin = Spin::new(neighbours * config.threads.max(1));
    let monitor = Monitor::start(config.rank, controls, bell.clone(), abort.clone())
        .map_err(CollectiveError::system("start the monitor thread"))?;
    let mesh = Mesh::new(config.rank, links, bell, abort.clone(), config.timeout, spin);
    Ok(CpuCollective::new(config, mesh, abort.clone(), monitor))
}
