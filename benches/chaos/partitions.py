#!/usr/bin/env python3
"""Cuts, loses, delays and chokes what the parts of a cluster tell each other, and troubles its etcd, while streams run.

Two hosts with a rank and a spare each, two routers, three members of etcd, clients: each in a network namespace of its own.
Every stream must give the text that it gives undisturbed. Needs root.

    make chaos                        all cells
    partitions.py --cells etcd        those whose names say so
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import threading
import time

from hosts import MEMBERS, ROUTERS, Spread, around, ruled
from network import CUT, Network, Rule
from streams import Judge, percentile

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
    streams, stop = [], False

    async def client(number):
        while not stop:
            streams.append(await judge.stream(number).run())

    await asyncio.to_thread(cluster.spread)
    clients = [asyncio.ensure_future(client(number)) for number in range(judge.count)]
    await asyncio.sleep(AROUND_S)
    at = time.time()

    def hold():
        with fault(cluster):
            time.sleep(seconds)

    await asyncio.to_thread(hold)
    await asyncio.sleep(AROUND_S)
    stop = True
    await asyncio.gather(*clients)
    lost, refused = judge.lost(streams), sum(stream.refusals for stream in streams)
    stall = {stream: stream.stall(at, at + seconds) for stream in streams if stream.times}
    open_then = [wait for stream, wait in stall.items() if stream.times[0] < at < stream.times[-1]]
    row = (who, what, seconds, len(streams), len(lost), refused, percentile(open_then, 0.5), max(stall.values(), default=0.0))
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="", help="only cells in whose names this stands")
    parser.add_argument("--table", help="file at whose end the table is written")
    options = parser.parse_args()
    network = Network([*HOSTS, *ROUTERS, *MEMBERS, "clients"], own="clients")
    cluster = None
    try:
        cluster = Spread(network, hosts=len(HOSTS), spares=1)
        cluster.until_ready()
        judge = Judge(cluster, STREAMS, TOKENS)
        asyncio.run(judge.learn())
        rows = [asyncio.run(cell(cluster, judge, *each)) for each in CELLS if options.cells in f"{each[0]} {each[1]}"]
    finally:
        if cluster:
            cluster.end()
        network.end()
    if options.table:
        with open(options.table, "a") as file:
            file.write("\n" + table(rows))
    sys.exit(any(row[4] for row in rows))


if __name__ == "__main__":
    main()
