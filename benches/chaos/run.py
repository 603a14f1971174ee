#!/usr/bin/env python3
"""Kills and stops parts of a cluster while streams run, and counts what was lost.

Each cell of the table is a role and a fault. Before the first, every prompt is answered undisturbed; afterwards each stream
must give the same text, whatever died meanwhile. Everything runs on loopback and ends with this script.

    make chaos            all cells, and many kills with many streams
    run.py --quick        a cut of it
"""

import argparse
import asyncio
import contextlib
import datetime
import os
import signal
import sys
import time

from cluster import BARD, DEMO, ROOT, Cluster
from streams import Judge, flowing, percentile, stalls, together

#: Seconds of streams around what is done to them.
AROUND_S = 1.0
FAULTS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@contextlib.contextmanager
def running(model, **options):
    cluster = Cluster(model, **options)
    try:
        cluster.until_ready()
        yield cluster
    finally:
        cluster.end()


async def cell(cluster, judge, role, fault, delay):
    """One fault in the middle of the streams; returns a row."""
    cluster.until_ready()
    running = asyncio.ensure_future(together(judge.streams(repeats=role.startswith("router"))))
    await asyncio.sleep(delay)
    victim = await asyncio.to_thread(cluster.pid, role)
    at = time.time()
    os.kill(victim, FAULTS[fault])
    own = role in cluster.processes
    if own:
        await asyncio.sleep(3 if fault == "stop" else 0.5)
        if fault == "stop":
            os.kill(victim, signal.SIGCONT)
        else:
            cluster.restart(role)
    streams = await running
    return shown(role, fault, judge.lost(streams), [stream.stall(at, at + 3) for stream in streams])


def shown(who, fault, lost, waits):
    """A row, which it prints."""
    row = (who, fault, len(waits), len(lost), percentile(waits, 0.5), percentile(waits, 0.99))
    print(f"{who:14} {fault:5} lost {row[3]} of {row[2]}, stall p50 {row[4]:.2f} s, p99 {row[5]:.2f} s", flush=True)
    for said in lost[:5]:
        print("   ", said, flush=True)
    return row


async def dwindle(cluster, judge):
    """Hosts of a group of four go until one rank is left, and come back, while streams come and go; returns a row a step."""
    steps = [("h3, h2", "kill", 2), ("h1", "kill", 1), ("h1, h2, h3", "start", 4)]
    times = [time.time()]
    async with flowing(judge, AROUND_S) as streams:
        for hosts, fault, size in steps:
            times.append(time.time())
            for worker in (f"worker g0 {host}" for host in hosts.split(", ")):
                cluster.processes[worker].kill() if fault == "kill" else cluster.restart(worker)
            await asyncio.to_thread(cluster.until_sized, size)
            await asyncio.sleep(AROUND_S)
    times.append(time.time())
    rows = [shown(f"{hosts}: N = {size}", fault, [], stalls(streams, at, until)[0])
            for (hosts, fault, size), at, until in zip(steps, times[1:], times[2:])]
    return [*rows, shown("all the while", "both", judge.lost(streams), stalls(streams, times[0], times[-1])[1])]


async def storm(cluster, judge, kills, pause):
    """Kills rank after rank while as many streams as there are run all the time."""
    done, refused, lost, stop = 0, 0, [], False

    async def client(number):
        nonlocal done, refused
        while not stop:
            stream = await judge.stream(number).run()
            done, refused = done + 1, refused + stream.refusals
            lost.extend(judge.lost([stream]))

    cluster.until_ready()
    clients = [asyncio.ensure_future(client(number)) for number in range(judge.count)]
    in_flight = 0
    for kill in range(kills):
        await asyncio.sleep(pause)
        while not (group := next((g for g in await asyncio.to_thread(cluster.fleet) if g["state"] == "ready"), None)):
            await asyncio.sleep(0.05)
        ready = [rank["pid"] for rank in group["ranks"] if rank["state"] == "ready"]
        os.kill(ready[kill % len(ready)], signal.SIGKILL)
        in_flight += judge.count
        print(f"\rkill {kill + 1} of {kills}: {done} streams done, {len(lost)} lost ", end="", flush=True)
    stop = True
    await asyncio.gather(*clients)
    print(f"\n{in_flight} streams were open at a kill, {done} streams in all, {len(lost)} lost, {refused} refused at first")
    for said in lost[:10]:
        print("   ", said)
    return kills, in_flight, done, len(lost)


def table(model, rows, total):
    lines = [f"## {model}", "", "| who | fault | streams | lost | stall p50 | stall p99 |", "|---|---|---|---|---|---|"]
    lines += [f"| {a} | {b} | {c} | {d} | {e:.2f} s | {f:.2f} s |" for a, b, c, d, e, f in rows]
    if total:
        kills, in_flight, done, lost = total
        lines += ["", f"{kills} ranks killed, {in_flight} times a stream was open at a kill, {done} streams in all: {lost} lost."]
    return "\n".join(lines) + "\n"


ROLES = [("rank 0", "kill"), ("rank 1", "kill"), ("rank 0", "stop"), ("rank 1", "stop"), ("spare", "kill"),
         ("worker g0 h1", "kill"), ("router 0", "kill"), ("router 0", "stop"), ("etcd 0", "kill"), ("etcd 0", "stop")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a cut of it, with one model and without a file")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--streams", type=int, default=200)
    options = parser.parse_args()
    kills, count = (5, 40) if options.quick else (options.kills, options.streams)
    told, failed = [], 0
    models = [(BARD, "bard-1m", count, 1500 if options.quick else 400), (DEMO, "SmolLM2-135M (Q4_1)", 8, 150)]
    for model, name, streams, tokens in models[:1] if options.quick else models:
        with running(model, hosts=2, tp=2, spares=1) as cluster:
            judge = Judge(cluster, streams, tokens)
            began = time.time()
            asyncio.run(judge.learn())
            delay = min(2.0, (time.time() - began) / 3)
            rows = [asyncio.run(cell(cluster, judge, role, fault, delay)) for role, fault in ROLES]
            total = asyncio.run(storm(cluster, judge, kills, 2.0)) if model == BARD else None
        if model == BARD:
            with running(model, hosts=4, tp=4, spares=0) as judge.cluster:
                rows += asyncio.run(dwindle(judge.cluster, judge))
        failed += sum(row[3] for row in rows) + (total[3] if total else 0)
        told.append(table(name, rows, total))
    if not options.quick:
        date = datetime.date.today().isoformat()
        cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
        head = f"# Streams that survive, {date}\n\n`make chaos` on {cpu}, {os.cpu_count()} cores: N = 2 over two hosts of one " \
               "machine with a spare each.\nA stall is the longest wait between two pieces of a stream around the fault. Where a router is " \
               "killed, clients begin again\nat another one with the same `X-Request-Id`.\n\n"
        (ROOT / f"benches/results/chaos-{date}.md").write_text(head + "\n".join(told))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
