//! Which cores a rank's threads compute on, and in which node's memory they find their weights.
//!
//! Ranks of one host divide its cores, neighbours in one memory node as far as possible. Where the cores are this process's
//! own (somebody has named them, or the system lets it run on some only, as Kubernetes' static CPU manager does) every
//! thread stays on one of them. Elsewhere other processes may need any core, so threads only stay in their node, where there
//! are several; on a laptop nothing is bound.

use std::fmt;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::str::FromStr;

/// Most CPUs that are looked at, as many as the system's own set has room for.
const CPUS_MAX: usize = 1024;

/// One hardware thread of the machine. The order: node by node, core by core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Cpu {
    node: usize,
    /// Socket, and core within it: alike for the hardware threads of one core.
    core: (usize, usize),
    id: usize,
}

/// Cores that a rank may compute on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cores {
    /// Everything that the process may use, in order.
    all: Vec<Cpu>,
    /// The share of it.
    own: Range<usize>,
    /// No other program computes there.
    ours: bool,
    /// How many ranks have this same share, of cores too few for one each.
    ranks: usize,
}

/// CPUs by number, as systems and people write them: `0-3,8`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(Vec<usize>);

/// Where one thread runs, and near which memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Home {
    /// The CPUs among which the system may choose.
    cpus: Vec<usize>,
    node: usize,
}

impl Cores {
    /// Those of this machine that are `named`, or else all that this process may run on. `None` where the system does not
    /// tell, or none is left.
    pub fn of_machine(named: Option<&CpuList>) -> Option<Self> {
        Self::read(Path::new("/sys/devices/system"), &allowed()?, named)
    }

    fn read(system: &Path, allowed: &[usize], named: Option<&CpuList>) -> Option<Self> {
        let text = |path: String| fs::read_to_string(system.join(path)).ok();
        let list = |path: String| Some(text(path)?.trim().parse::<CpuList>().ok()?.0);
        let number = |path: String| text(path)?.trim().parse().ok();
        let online = list("cpu/online".into())?;
        let nodes = list("node/online".into()).unwrap_or_default();
        let cpus_of = |node: usize| list(format!("node/node{node}/cpulist")).unwrap_or_default();
        let nodes: Vec<(usize, Vec<usize>)> = nodes.into_iter().map(|node| (node, cpus_of(node))).collect();
        let cpu = |id: usize| Cpu {
            node: nodes.iter().find(|(_, cpus)| cpus.contains(&id)).map_or(0, |(node, _)| *node),
            core: (
                number(format!("cpu/cpu{id}/topology/physical_package_id")).unwrap_or(0),
                number(format!("cpu/cpu{id}/topology/core_id")).unwrap_or(id),
            ),
            id,
        };
        let may = |id: &usize| allowed.contains(id) && named.is_none_or(|named| named.0.contains(id));
        let mut all: Vec<Cpu> = online.iter().copied().filter(may).map(cpu).collect();
        all.sort();
        let ours = named.is_some() || online.iter().any(|id| !allowed.contains(id));
        (!all.is_empty()).then_some(Self { own: 0..all.len(), all, ours, ranks: 1 })
    }

    /// Hardware threads.
    pub fn count(&self) -> usize {
        self.own.len()
    }

    /// The `part`-th of `parts` shares: whole cores while there are enough of them, else hardware threads; if those are too
    /// few, all share everything.
    ///
    /// # Panics
    /// If `part` is not below `parts`.
    #[must_use]
    pub fn share(&self, part: usize, parts: usize) -> Self {
        assert!(part < parts, "share {part} of {parts}");
        let cores = cores(&self.all[self.own.clone()]);
        let first_of = |part: usize| {
            let begin = match cores.len() >= parts {
                true => cores[..cores.len() * part / parts].iter().map(|core| core.len()).sum(),
                false => self.count() * part / parts,
            };
            self.own.start + begin
        };
        match self.count() >= parts {
            true => Self { own: first_of(part)..first_of(part + 1), ..self.clone() },
            false => Self { ranks: self.ranks * parts, ..self.clone() },
        }
    }

    /// Whether so many threads, with those of the ranks that have the same share, outnumber its cores.
    pub(crate) fn are_crowded_by(&self, threads: usize) -> bool {
        threads * self.ranks > self.count()
    }

    /// Where `threads` threads run: each core has one before any has two, and those of a node follow each other.
    pub(crate) fn homes(&self, threads: usize) -> Vec<Home> {
        let own = &self.all[self.own.clone()];
        let mut by_turn: Vec<(usize, Cpu)> =
            cores(own).into_iter().flat_map(|core| core.iter().copied().enumerate()).collect();
        by_turn.sort();
        let mut taken: Vec<Cpu> = by_turn.into_iter().map(|(_, cpu)| cpu).cycle().take(threads).collect();
        taken.sort();
        let alone = self.ours && !self.are_crowded_by(threads);
        let beside = |cpu: &Cpu| -> Vec<usize> {
            self.all.iter().filter(|other| other.node == cpu.node).map(|other| other.id).collect()
        };
        let home = |cpu: &Cpu| Home { cpus: if alone { vec![cpu.id] } else { beside(cpu) }, node: cpu.node };
        taken.iter().map(home).collect()
    }
}

/// The hardware threads of each core.
fn cores(cpus: &[Cpu]) -> Vec<&[Cpu]> {
    cpus.chunk_by(|a, b| (a.node, a.core) == (b.node, b.core)).collect()
}

/// The nodes of consecutive homes, and which share of them all each has, `(node, from … to)` in homes.
pub(crate) fn nodes(homes: &[Home]) -> Vec<(usize, Range<usize>)> {
    let mut end = 0;
    let run = |homes: &[Home]| {
        end += homes.len();
        (homes[0].node, end - homes.len()..end)
    };
    homes.chunk_by(|a, b| a.node == b.node).map(run).collect()
}

impl fmt::Display for Cores {
    /// As a list, and whether threads stay where they are.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ids: Vec<usize> = self.all[self.own.clone()].iter().map(|cpu| cpu.id).collect();
        ids.sort_unstable();
        let how = if self.ours && self.ranks == 1 { "a thread each" } else { "shared with others" };
        write!(f, "{} ({how})", CpuList(ids))
    }
}

impl CpuList {
    /// How many they are.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, run) in self.0.chunk_by(|a, b| a + 1 == *b).enumerate() {
            let comma = if at > 0 { "," } else { "" };
            match run {
                [one] => write!(f, "{comma}{one}")?,
                _ => write!(f, "{comma}{}-{}", run[0], run[run.len() - 1])?,
            }
        }
        Ok(())
    }
}

impl FromStr for CpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no list of CPUs below {CPUS_MAX}, such as 0-3,8");
        let mut ids = Vec::new();
        for run in text.split(',') {
            let (first, last) = run.split_once('-').unwrap_or((run, run));
            let number = |text: &str| text.parse().ok().filter(|&id: &usize| id < CPUS_MAX).ok_or_else(wrong);
            ids.extend(number(first)?..=number(last)?);
        }
        ids.sort_unstable();
        ids.dedup();
        if ids.is_empty() { Err(wrong()) } else { Ok(Self(ids)) }
    }
}

/// The CPUs on which this process may run; what its threads have been bound to changes nothing.
#[cfg(target_os = "linux")]
fn allowed() -> Option<Vec<usize>> {
    // SAFETY: a set of zeros is empty; the call fills the one that it is given, of that size.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let process = libc::getpid();
        (libc::sched_getaffinity(process, size_of::<libc::cpu_set_t>(), &mut set) == 0).then_some(set)?
    };
    // SAFETY: below the number that the set has room for.
    Some((0..CPUS_MAX).filter(|&id| unsafe { libc::CPU_ISSET(id, &set) }).collect())
}

#[cfg(not(target_os = "linux"))]
fn allowed() -> Option<Vec<usize>> {
    None
}

impl Home {
    /// Has the calling thread run here, from now on; where the system refuses, it runs where it did.
    #[cfg(target_os = "linux")]
    pub(crate) fn bind(&self) {
        // SAFETY: a set of zeros is empty; all numbers are below what it has room for; the call reads it.
        let bound = unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            self.cpus.iter().for_each(|&id| libc::CPU_SET(id, &mut set));
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
        };
        let _ = bound; // only speed
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn bind(&self) {}
}

#[cfg(test)]
mod tests;
