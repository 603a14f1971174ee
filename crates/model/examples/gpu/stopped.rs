//! A rank that waits on its GPU for one that does nothing any more: it must be let go in time.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use galerne_collective::Collective as _;
use galerne_model::Rank;
use serde_json::json;

use crate::device::Gpus;
use crate::local::Local;
use crate::ranks::{Way, blocks, load_group, open, options, run_on};
use crate::script::{Memory, prompt, steps};
use crate::{Outcome, Report};

/// How long a step may wait for a rank that hangs.
const TIMEOUT: Duration = Duration::from_secs(2);
/// When the epoch is ended, where somebody ends it: a monitor that saw a rank die.
const ENDED_AFTER: Duration = Duration::from_millis(500);
/// How long after either a rank may take to be out.
const OUT_MAX: Duration = Duration::from_millis(500);
const TOKENS: usize = 8;

/// Two ranks meet, and the second does nothing from then on.
pub(crate) fn check(way: Way, gpus: &Gpus, path: &Path, report: &mut Report) -> Outcome<()> {
    let checkpoint = open(path)?;
    let memory = Memory { slots: 1, blocks_per_slot: blocks(TOKENS) };
    let script = steps(vec![memory.sequence(0, &prompt(TOKENS, 1, checkpoint.config().vocab), TOKENS, 1)]);
    for (name, due) in [("a rank hangs", TIMEOUT), ("the epoch ends", ENDED_AFTER)] {
        if gpus.emulate && due == TIMEOUT {
            continue; // what is launched there has ended when the launch returns, so nobody looks at the clock
        }
        let weights = load_group(gpus, &checkpoint, 2)?;
        let (done, waiting) = mpsc::channel::<()>();
        let mut ends = Local::group(weights[0].shards().virtual_shards(), 2).into_iter().zip(&weights);
        let (Some((mut first, of_first)), Some((mut second, of_second))) = (ends.next(), ends.next()) else {
            return Err("a group of two".into());
        };
        thread::scope(|scope| -> Outcome<()> {
            scope.spawn(move || {
                let link = way.link(of_second, &mut second, TIMEOUT);
                // Until the first rank is out, and hangs up.
                let _ = waiting.recv();
                drop(link);
            });
            let done = done; // hung up on every way out
            let link = way.link(of_first, &mut first, TIMEOUT)?;
            let abort = first.abort_handle();
            let options = options(memory.blocks(), 1, TOKENS);
            let mut rank = Rank::on_gpu(Arc::clone(of_first), &options, Box::new(first), link)?;
            let start = Instant::now();
            if due == ENDED_AFTER {
                scope.spawn(move || {
                    thread::sleep(ENDED_AFTER);
                    abort.abort();
                });
            }
            let stepped = run_on(&mut rank, &script, false);
            let waited = start.elapsed();
            let closed = rank.close();
            let out = start.elapsed();
            drop(done);
            report.tell(&json!({
                "part": "stopped", "name": format!("{name}, by {way:?}"), "ok": stepped.is_err() && out <= due + OUT_MAX,
                "due_ms": due.as_secs_f64() * 1e3, "step_ms": waited.as_secs_f64() * 1e3, "out_ms": out.as_secs_f64() * 1e3,
                "says": stepped.err().map(|error| error.to_string()),
                "process_must_exit": closed.err().map(|error| error.to_string()),
            }));
            Ok(())
        })?;
    }
    Ok(())
}
