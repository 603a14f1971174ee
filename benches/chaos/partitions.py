#!/usr/bin/env python3
"""Cuts, loses, delays and chokes what the parts of a cluster tell each other, and troubles its etcd, while streams run.

Two hosts with a rank and a spare each, two routers, three members of etcd, clients: each in a network namespace of its own.
Every stream must give the text that it gives undisturbed. Needs root.

    make chaos                        all cells
    partitions.py --cells etcd        those whose names say so
"""

import asyncio
import contextlib
import os
import signal
import threading
import time

from hosts import MEMBERS, Spread, arguments, around, play, ruled
from network import CUT, Rule
from streams import flowing, percentile, stalls

HOSTS = ["h0", "h1"]
STREAMS, TOKENS = 24, 400
#: Seconds of streams before a fault and after it.
AROUND_S = 1.5


# What happens in a cell: begins on entry, ends on exit.

@contextlib.contextmanager
def killed(cluster, role):
    os.kill(cluster.pid(role), signal.SIGKILL)
    yield
    if role in cluster.processes:
        cluster.restart(role)


@contextlib.contextmanager
def stopped(cluster, role):
    pid = cluster.pid(role)
    os.kill(pid, signal.SIGSTOP)
    yield
    os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def every(seconds, what):
    """Does `what` again and again, in a thread."""
    over = threading.Event()

    def loop():
        while not over.wait(seconds):
            what()

    thread = threading.Thread(target=loop)
    thread.start()
    yield
    over.set()
    thread.join()


def slowed(cluster, rank):
    """A rank that gets a twelfth of the time."""
    pid = cluster.pid(f"rank {rank}")

    def pause():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.055)
            os.kill(pid, signal.SIGCONT)

    return every(0.005, pause)


def compacted(cluster):
    def compact():
        with contextlib.suppress(OSError):
            revision = cluster.etcd("e0", "kv/range", {"key": "AA=="})["header"]["revision"]
            cluster.etcd("e0", "kv/compaction", {"revision": revision})

    return every(0.1, compact)


@contextlib.contextmanager
def both(first, second):
    with first():
        time.sleep(1)
        with second():
            yield


#: Who, what, for how many seconds, and how.
CELLS = [
    ("host of rank 0", "cut off", 5, lambda c: around(c, CUT, c.host(0))),
    ("host of rank 1", "cut off", 5, lambda c: around(c, CUT, c.host(1))),
    ("hosts of a group", "cut apart", 5, lambda c: around(c, CUT, "h0", ["h1"])),
    ("rank 0 to rank 1", "cut one way", 5, lambda c: ruled(c, CUT, [(c.host(0), c.host(1))])),
    ("rank 1 to rank 0", "cut one way", 5, lambda c: ruled(c, CUT, [(c.host(1), c.host(0))])),
    ("router", "cut off from the group", 5, lambda c: around(c, CUT, "r0", HOSTS)),
    ("router", "cut off from etcd", 10, lambda c: around(c, CUT, "r0", MEMBERS)),
    ("host of rank 0", "cut off from etcd", 15, lambda c: around(c, CUT, c.host(0), MEMBERS)),
    ("leader of etcd", "killed", 5, lambda c: killed(c, f"etcd {c.etcd_leader()}")),
    ("leader of etcd", "stopped", 5, lambda c: stopped(c, f"etcd {c.etcd_leader()}")),
    ("leader of etcd", "cut off", 5, lambda c: around(c, CUT, f"e{c.etcd_leader()}")),
    ("all of etcd", "cut apart", 60, lambda c: ruled(c, CUT, sum((c.network.around(e) for e in MEMBERS), []))),
    ("all of etcd, then rank 1", "cut apart, killed", 10, lambda c: both(
        lambda: ruled(c, CUT, sum((c.network.around(e) for e in MEMBERS), [])), lambda: killed(c, "rank 1"))),
    ("etcd, and rank 1", "compacted, killed", 5, lambda c: both(lambda: compacted(c), lambda: killed(c, "rank 1"))),
    ("host of rank 1", "5% lost", 10, lambda c: around(c, Rule(loss=0.05), c.host(1))),
    ("host of rank 1", "20 ms away", 10, lambda c: around(c, Rule(delay_s=0.02), c.host(1))),
    ("host of rank 1", "1 MB/s", 10, lambda c: around(c, Rule(bytes_per_s=1e6), c.host(1))),
    ("rank 1", "12 times slower", 15, lambda c: slowed(c, 1)),
]


async def cell(cluster, judge, who, what, seconds, fault):
    """Streams come and go all the time while the fault is on; returns a row."""
    def hold():
        with fault(cluster):
            time.sleep(seconds)

    await asyncio.to_thread(cluster.spread)
    async with flowing(judge, AROUND_S) as streams:
        at = time.time()
        await asyncio.to_thread(hold)
    lost, refused = judge.lost(streams), sum(stream.refusals for stream in streams)
    open_then, of_all = stalls(streams, at, at + seconds)
    row = (who, what, seconds, len(streams), len(lost), refused, percentile(open_then, 0.5), max(of_all, default=0.0))
    print(f"{who:24} {what:22} lost {len(lost)} of {len(streams)}, {refused} refused at first, "
          f"stall p50 {row[6]:.2f} s, longest {row[7]:.2f} s", flush=True)
    for said in lost[:5]:
        print("   ", said, flush=True)
    return row


def table(rows):
    lines = ["## bard-1m, over a network", "",
             "Two hosts, two routers, three members of etcd, each in a network namespace of its own.", "",
             "A stall's median is over the streams that were open when the fault began, the longest is of all.", "",
             "| who | fault | for | streams | lost | refused at first | stall p50 | longest |", "|---|---|---|---|---|---|---|---|"]
    lines += [f"| {a} | {b} | {c} s | {d} | {e} | {f} | {g:.2f} s | {h:.2f} s |" for a, b, c, d, e, f, g, h in rows]
    return "\n".join(lines) + "\n"


def main():
    options = arguments(__doc__).parse_args()
    cells = [each for each in CELLS if options.cells in f"{each[0]} {each[1]}"]
    play(Spread, HOSTS, (STREAMS, TOKENS), cell, cells, table, options.table, spares=1)


if __name__ == "__main__":
    main()
