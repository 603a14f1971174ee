#!/usr/bin/env python3
"""Clients that hang up at random moments, thousands of them: nothing may stay behind.

After each batch all KV blocks must be free within a second, and in the end the processes hold no more memory, file descriptors,
threads or tasks than after the first batches. A heap swings by some MiB from batch to batch and a leak never comes back: so what
is compared is the trend of the medians of many batches. Everything runs on loopback and ends with this script.

For some minutes instead, a third of the clients read to the end, and every few seconds something is killed, stopped or restarted:
the second rank, the second router, etcd. Those are new each time; what is compared are the processes that outlive all of it. A rank
holds more while it is alone: so each tenth of the time ends without faults, and with all ranks there is measured.

    make leaks            10,000 clients
    leaks.py --clients N --seed S
    leaks.py --minutes M  with faults
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import pathlib
import random
import re
import signal
import statistics
import sys
import time
import urllib.request

from cluster import ADMIN, BARD, HTTP, SECOND, Cluster, ready_ranks
from streams import Stream

BATCH = 200
#: Seconds in which all blocks of those who have hung up must be free.
FREE_S = 1.0
#: What may be held more in the end than in the beginning: allocators keep some.
BYTES_MORE_MAX, FILES_MORE_MAX, THREADS_MORE_MAX, TASKS_MORE_MAX = 1 << 20, 4, 2, 4
#: Batches before anything is compared, and batches whose median is.
WARM_BATCHES = 10
WINDOW_BATCHES = 10
#: The same of a long run: windows that it is cut into, of which the first are for warming up, and the share of each with faults.
WINDOWS = 12
WARM_WINDOWS = 2
FAULTY_SHARE = 0.6
#: Batches that a group has all ranks for, until its memory for keys and values is all in use again.
SETTLE_BATCHES = 5
#: Seconds between faults, and for which what is stopped stands still.
FAULT_S = 15
STOPPED_S = 1.5


async def client(dice):
    """Sends a request, perhaps not all of it, reads for a while, perhaps nothing, and hangs up, perhaps with a reset."""
    body = json.dumps({
        "prompt": " ".join(dice.choice(["king", "queen", "fool", "ghost"]) for _ in range(dice.randrange(1, 120))),
        "max_tokens": dice.randrange(1, 400), "stream": dice.random() < 0.8, "ignore_eos": True, "n": dice.choice([1, 1, 1, 3]),
        "temperature": dice.choice([0, 1.0]),
    }).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    message = head.encode() + body
    reader, writer = await asyncio.open_connection("127.0.0.1", HTTP)
    writer.write(message[: dice.randrange(1, len(message))] if dice.random() < 0.1 else message)
    try:
        await asyncio.wait_for(reader.read(1 << dice.randrange(0, 14)), dice.random() * 2)
        await asyncio.sleep(dice.random() * dice.choice([0, 0.05, 1]))
    except (asyncio.TimeoutError, OSError):
        pass
    if dice.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()


def told(path):
    """What the first router says of itself."""
    with urllib.request.urlopen(f"http://127.0.0.1:{ADMIN}{path}", timeout=5) as reply:
        return reply.read().decode()


def busy():
    """What the metrics say is still held."""
    text = told("/metrics")
    names = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
    found = {name: sum(float(value) for value in re.findall(rf"^{name}{{[^\n]*}} ([\d.e+-]+)$", text, re.M)) for name in names}
    return {name: value for name, value in found.items() if value > 0}


def held(cluster):
    """Bytes, file descriptors, threads and tasks of each process of the cluster, children included; tasks of the first router."""
    found = {}
    for name, process in cluster.processes.items():
        if name.startswith("etcd"):
            continue
        children = (pid for listed in pathlib.Path(f"/proc/{process.pid}/task").glob("*/children") for pid in listed.read_text().split())
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, TypeError):  # it is dying
            for pid in [process.pid, *children]:
                status = pathlib.Path(f"/proc/{pid}/status").read_text()
                rss = int(re.search(r"^RssAnon:\s+(\d+)", status, re.M)[1]) << 10
                threads = int(re.search(r"^Threads:\s+(\d+)", status, re.M)[1])
                tasks = json.loads(told("/debug/state"))["runtime"]["tasks"] if name == "router 0" else 0
                found[f"{name} {pid}"] = (rss, len(os.listdir(f"/proc/{pid}/fd")), threads, tasks)
    return found


def medians(batches):
    """The median of bytes, descriptors, threads and tasks of each process that was there in all of these batches."""
    return {name: [statistics.median(each) for each in zip(*(batch[name] for batch in batches))]
            for name in batches[0] if all(name in batch for batch in batches)}


def trend(values):
    """By how much values that are equally far apart grow from the first to the last: the median of the slopes between any two (Sen, 1968)."""
    slopes = [(b - a) / (j - i) for (i, a), (j, b) in itertools.combinations(enumerate(values), 2)]
    return statistics.median(slopes) * (len(values) - 1)


def compared(windows):
    """What is held more in the end than in the beginning, and what is wrong with that."""
    windows = [medians(batches) for batches in windows if batches]
    if len(windows) < 2:
        return [f"nothing was compared: that takes {WARM_BATCHES + 2 * WINDOW_BATCHES} batches, or more minutes"]
    wrong = []
    for name in sorted(set.intersection(*(set(window) for window in windows))):
        rss, files, threads, tasks = (list(values) for values in zip(*(window[name] for window in windows)))
        more = [trend(values) for values in (rss, files, threads, tasks)]
        print(f"{name:24} {more[0] / 1024:+.0f} KiB, {files[-1]:.0f} descriptors ({more[1]:+.0f}), {threads[-1]:.0f} threads ({more[2]:+.0f}), "
              f"{tasks[-1]:.0f} tasks ({more[3]:+.0f}); KiB meanwhile: {', '.join(f'{bytes / 1024:.0f}' for bytes in rss)}")
        if any(a > b for a, b in zip(more, (BYTES_MORE_MAX, FILES_MORE_MAX, THREADS_MORE_MAX, TASKS_MORE_MAX))):
            wrong.append(f"{name} holds more than it did")
    return wrong


async def run(cluster, clients, dice):
    after, slowest, wrong = [], 0.0, []
    for batch in range(-(-clients // BATCH)):
        await asyncio.gather(*(client(random.Random(dice.random())) for _ in range(BATCH)))
        gone = time.time()
        while (left := await asyncio.to_thread(busy)) and time.time() - gone < 10 * FREE_S:
            await asyncio.sleep(0.02)
        slowest = max(slowest, time.time() - gone)
        if left:
            wrong.append(f"batch {batch}: still held after {10 * FREE_S} s: {left}")
        if batch >= WARM_BATCHES:
            after.append(held(cluster))
        print(f"\r{(batch + 1) * BATCH} clients, free after {slowest:.2f} s at most ", end="", flush=True)
    print()
    if slowest > FREE_S:
        wrong.append(f"blocks were free after {slowest:.2f} s only")
    if after and after[0].keys() != after[-1].keys():
        wrong.append(f"processes came or went: {sorted(after[0].keys() ^ after[-1].keys())}")
    return wrong + compared([after[at : at + WINDOW_BATCHES] for at in range(0, len(after) - WINDOW_BATCHES + 1, WINDOW_BATCHES)])


class Faults:
    """Kills, stops and restarts, one after another, until it is told to end or to rest; never the rank that stays."""

    def __init__(self, cluster, dice):
        self.cluster, self.dice, self.count, self.over, self.rests = cluster, dice, 0, False, False
        self.stays = cluster.pid("rank 0")

    def other(self):
        """The process of the other rank, if it is there."""
        pids = [rank["pid"] for group in self.cluster.fleet() for rank in group["ranks"]]
        return next((pid for pid in pids if pid != self.stays), None)

    def mended(self):
        """Whether a group of all ranks serves."""
        return [(group["state"], ready_ranks(group)) for group in self.cluster.fleet()] == [("ready", self.cluster.tp)]

    def once(self):
        what = self.dice.choice(["kill", "kill", "stop", "router 1", "etcd 0", "etcd stop"])
        pid = self.cluster.pid("etcd 0") if what == "etcd stop" else self.other()
        if what in ("router 1", "etcd 0"):
            self.cluster.restart(what)
        elif pid and what == "kill":
            os.kill(pid, signal.SIGKILL)
        elif pid:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(STOPPED_S)
            os.kill(pid, signal.SIGCONT)
        self.count += 1

    async def run(self):
        while not self.over:
            await asyncio.sleep(FAULT_S)
            if not self.rests:
                with contextlib.suppress(ProcessLookupError):
                    await asyncio.to_thread(self.once)


async def outlive(cluster, minutes, dice):
    faults = Faults(cluster, dice)
    fault, began, took = asyncio.create_task(faults.run()), time.time(), 60 * minutes
    windows, settled, lost, read, batch = [[] for _ in range(WINDOWS)], 0, [], 0, 0
    while (passed := (time.time() - began) / took) < 1:
        routers = [("127.0.0.1", HTTP), ("127.0.0.1", HTTP + SECOND)]
        streams = [Stream(number, dice.randrange(1, 300), *routers) for number in range(BATCH // 3)]
        hang_up = (client(random.Random(dice.random())) for _ in range(BATCH - len(streams)))
        await asyncio.gather(*(stream.run() for stream in streams), *hang_up)
        read, batch = read + len(streams), batch + 1
        lost += [stream.error for stream in streams if stream.error]
        faults.rests = passed * WINDOWS % 1 > FAULTY_SHARE
        settled = settled + 1 if faults.rests and await asyncio.to_thread(faults.mended) else 0
        if settled > SETTLE_BATCHES and not await asyncio.to_thread(busy):
            windows[int(passed * WINDOWS)].append(held(cluster))
        print(f"\r{batch * BATCH} clients, {faults.count} faults, {len(lost)} of {read} streams lost, {took * (1 - passed):.0f} s left ",
              end="", flush=True)
    faults.over = True
    await fault
    print()
    return [f"lost: {said}" for said in lost] + compared(windows[WARM_WINDOWS:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    # So little KV memory that all of it is soon taken from the system.
    cluster = Cluster(BARD, hosts=2 if options.minutes else 1, tp=2, spares=0, options=["--kv-blocks", 512])
    try:
        cluster.until_ready()
        dice = random.Random(options.seed)
        if options.minutes:
            wrong = asyncio.run(outlive(cluster, options.minutes, dice))
        else:
            wrong = asyncio.run(run(cluster, options.clients, dice))
    finally:
        cluster.end()
    for said in wrong:
        print(said)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
