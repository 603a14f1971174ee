//! How long ranks that share the GPU take to bring each other the pieces of a sum, by message: NCCL's all-gather, and memory that all
//! have mapped. Between GPUs of their own both are other figures; that of a signal is then a trip over NVLink.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use galerne_collective::Collective as _;
use galerne_collective::nccl::Communicator;
use galerne_model::gpu::{Buffer, Device, DeviceError, GpuWeights, Peers, Turn};
use serde_json::json;

use crate::device::Gpus;
use crate::local::Local;
use crate::ranks::{TIMEOUT, Way, load_group, open};
use crate::{Outcome, Report};

/// Numbers of a token of the 7 B model, and tokens of a sum.
const TOKEN: usize = 4096;
const TOKENS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
/// Exchanges of a graph, and graphs that are measured.
const IN_GRAPH: usize = 20;
const GRAPHS: usize = 20;
const FLOAT_BYTES: usize = size_of::<f32>();

pub(crate) fn run(gpus: &Gpus, path: &Path, report: &mut Report) -> Outcome<()> {
    let checkpoint = open(path)?;
    let tokens: &[usize] = if gpus.emulate { &[1, 3] } else { &TOKENS };
    for world_size in [2, 4] {
        let weights = load_group(gpus, &checkpoint, world_size)?;
        // There is no NCCL for a GPU that is none.
        let ways: &[Way] = if gpus.emulate { &[Way::Memory] } else { &[Way::Nccl, Way::Memory] };
        for &way in ways {
            report.attempt("sums", &format!("{world_size} ranks by {way:?}"), |report| {
                for (&tokens, us) in tokens.iter().zip(measured(way, &weights, tokens)?) {
                    let name = format!("{world_size} ranks, {tokens} tokens, by {way:?}");
                    report.tell(&json!({
                        "part": "sums", "name": name, "way": format!("{way:?}"), "ranks": world_size, "tokens": tokens,
                        "bytes": tokens * TOKEN * FLOAT_BYTES, "us": us,
                    }));
                }
                Ok(())
            });
        }
    }
    Ok(())
}

/// Microseconds of an exchange for each number of tokens, as the slowest rank sees them.
fn measured(way: Way, weights: &[Arc<GpuWeights>], tokens: &[usize]) -> Outcome<Vec<f64>> {
    let ends = Local::group(weights[0].shards().virtual_shards(), weights.len());
    thread::scope(|scope| {
        let ranks = ends.into_iter().zip(weights).map(|rank| scope.spawn(move || at_rank(way, rank, tokens)));
        let ranks: Vec<_> = ranks.collect();
        let mut slowest = vec![0.0f64; tokens.len()];
        for rank in ranks {
            let found = rank.join().map_err(|_| "a rank has panicked")??;
            slowest.iter_mut().zip(found).for_each(|(most, us)| *most = most.max(us));
        }
        Ok(slowest)
    })
}

/// By what pieces travel.
enum Exchange {
    Nccl(Communicator),
    Memory(Peers),
}

/// A rank's pieces, and room for those of all.
struct Buffers {
    pieces: Buffer,
    gathered: Buffer,
}

impl Exchange {
    fn put(&mut self, device: &dyn Device, of: &Buffers, len: usize, number: usize) -> Outcome<()> {
        match self {
            Self::Memory(peers) => Ok(peers.share(&of.pieces, len, Turn::sum(number, 0)).map(drop)?),
            Self::Nccl(nccl) => {
                let (from, to) = (of.pieces.address(), of.gathered.address());
                // SAFETY: both are memory of the device until it is idle, and long enough.
                unsafe { nccl.all_gather(from, to, len * FLOAT_BYTES, device.stream())? };
                Ok(())
            }
        }
    }

    /// So many of them after each other, which the device remembers.
    fn graph(&mut self, device: &dyn Device, of: &Buffers, len: usize) -> Outcome<()> {
        let mut failed = None;
        let replayed = device.replay(len as u64, &mut || {
            (0..IN_GRAPH).try_for_each(|number| self.put(device, of, len, number)).map_err(|error| {
                failed = Some(error);
                DeviceError::GivenUp
            })
        });
        failed.map_or(Ok(()), Err)?;
        Ok(replayed?)
    }
}

fn at_rank(way: Way, (mut end, weights): (Local, &Arc<GpuWeights>), tokens: &[usize]) -> Outcome<Vec<f64>> {
    let device = weights.device();
    let longest = tokens.iter().max().map_or(0, |tokens| tokens * TOKEN);
    let room = |ranks: usize| Buffer::zeroed(device, ranks * longest * FLOAT_BYTES);
    let of = Buffers { pieces: room(1)?, gathered: room(weights.shards().world_size())? };
    let mut exchange = match way {
        Way::Memory => {
            let peers = Way::peers(weights, &mut end, TIMEOUT)?;
            Exchange::Memory(peers.ok_or("a rank does not reach the others' memory")?)
        }
        Way::Nccl | Way::Host => Exchange::Nccl(Way::communicator(weights, &mut end, TIMEOUT)?),
    };
    let mut found = Vec::new();
    for tokens in tokens {
        exchange.graph(&**device, &of, tokens * TOKEN)?;
        wait(&**device)?;
        let start = Instant::now();
        for _ in 0..GRAPHS {
            exchange.graph(&**device, &of, tokens * TOKEN)?;
        }
        wait(&**device)?;
        found.push(start.elapsed().as_secs_f64() * 1e6 / (GRAPHS * IN_GRAPH) as f64);
    }
    device.forget(); // NCCL waits for graphs that name it
    end.barrier()?;
    if let Exchange::Nccl(nccl) = exchange {
        nccl.close()?;
    }
    Ok(found)
}

fn wait(device: &dyn Device) -> Outcome<()> {
    while !device.is_idle()? {
        std::hint::spin_loop();
    }
    Ok(())
}
