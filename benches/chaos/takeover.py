#!/usr/bin/env python3
"""How long streams wait when a rank dies: a spare takes over, the rank is started again, or the others go on without it.

The demo model, N = 2 over two hosts of one machine, a thread a rank. A stall is the longest wait between two pieces of a stream
around the kill; the ranks are killed in turn. Everything runs on loopback and ends with this script.

    make chaos                      all rows
    takeover.py --kills 24          so many kills a row
"""

import argparse
import asyncio
import os
import signal
import sys
import time

from cluster import DEMO, Cluster
from streams import Judge, percentile, together

TOKENS, STREAMS = 150, (1, 4, 8)
#: A rank that has lived so long is started again at once; one that dies sooner, later and later (`worker/src/backoff.rs`).
HEALTHY_S = 31


async def kill(cluster, judge, victim, after_s):
    """Kills in the midst of all streams; returns them and when."""
    running = asyncio.ensure_future(together(judge.streams()))
    await asyncio.sleep(after_s)
    pid = await asyncio.to_thread(cluster.pid, victim)
    at = time.time()
    os.kill(pid, signal.SIGKILL)
    if victim.startswith("worker "):
        # Its ranks die with it, and nobody starts them again.
        await asyncio.sleep(3)
        await asyncio.to_thread(cluster.restart, victim)
    return await running, at


def row(name, victims, spares, count, kills, pause_s):
    cluster = Cluster(DEMO, hosts=2, tp=2, spares=spares)
    stalls, lost = [], []
    try:
        cluster.until_ready()
        judge = Judge(cluster, count, TOKENS)
        began = time.time()
        asyncio.run(judge.learn())
        third_s = (time.time() - began) / 3
        for number in range(kills):
            time.sleep(pause_s)
            cluster.until_ready()
            streams, at = asyncio.run(kill(cluster, judge, victims[number % len(victims)], third_s))
            stalls += [stream.stall(at, at + 5) for stream in streams]
            lost += judge.lost(streams)
    finally:
        cluster.end()
    figures = [percentile(stalls, share) for share in (0.5, 0.99)] + [max(stalls)]
    print(f"{name:28} {count} streams, {kills} kills: lost {len(lost)}, stall p50 {figures[0]:.2f}, p99 {figures[1]:.2f}, "
          f"longest {figures[2]:.2f} s", flush=True)
    return f"| {name} | {count} | {kills} | {len(lost)} | " + " | ".join(f"{figure:.2f} s" for figure in figures) + " |", len(lost)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--table", help="file at whose end the table is written")
    options = parser.parse_args()
    ranks = ["rank 0", "rank 1"]
    told = [row(name, victims, spares, count, kills, pause_s) for name, victims, spares, kills, pause_s in [
        ("a spare takes over", ranks, 1, options.kills, 0),
        ("the rank is started again", ranks, 0, max(2, options.kills // 4), HEALTHY_S),
        ("the other goes on alone", ["worker g0 h1"], 0, max(2, options.kills // 4), 4),
    ] for count in STREAMS]
    if options.table:
        lines = ["## SmolLM2-135M (Q4_1), until the next token", "",
                 "| what comes | streams | kills | lost | stall p50 | p99 | longest |", "|---|---|---|---|---|---|---|"]
        with open(options.table, "a") as file:
            file.write("\n" + "\n".join(lines + [line for line, _ in told]) + "\n")
    sys.exit(any(lost for _, lost in told))


if __name__ == "__main__":
    main()
