#!/usr/bin/env python3
"""Clients that hang up at random moments, thousands of them: nothing may stay behind.

After each batch all KV blocks must be free within a second, and in the end the processes hold no more memory, file descriptors
or threads than after the first batches. A heap swings by some MiB from batch to batch and a leak never comes back: so the least
of the last batches is compared with the least of the first. Everything runs on loopback and ends with this script.

    make leaks            10,000 clients
    leaks.py --clients N --seed S
"""

import argparse
import asyncio
import json
import os
import random
import re
import sys
import time
import urllib.request

from cluster import ADMIN, BARD, HTTP, Cluster

BATCH = 200
#: Seconds in which all blocks of those who have hung up must be free.
FREE_S = 1.0
#: What may be held more in the end than after the first batches: allocators keep some.
BYTES_MORE_MAX = 1 << 20
#: Batches before anything is compared, and batches whose least is.
WARM_BATCHES = 10
WINDOW_BATCHES = 10


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


def metrics():
    with urllib.request.urlopen(f"http://127.0.0.1:{ADMIN}/metrics", timeout=5) as reply:
        return reply.read().decode()


def busy():
    """What the metrics say is still held."""
    text = metrics()
    names = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
    found = {name: sum(float(value) for value in re.findall(rf"^{name}{{[^\n]*}} ([\d.e+-]+)$", text, re.M)) for name in names}
    return {name: value for name, value in found.items() if value > 0}


def held(cluster):
    """Bytes, file descriptors and threads of each process of the cluster, children included."""
    found = {}
    for name, process in cluster.processes.items():
        if name.startswith("etcd"):
            continue
        pids = [process.pid] + [int(pid) for task in os.listdir(f"/proc/{process.pid}/task")
                                for pid in open(f"/proc/{process.pid}/task/{task}/children").read().split()]
        for pid in pids:
            status = open(f"/proc/{pid}/status").read()
            rss = int(re.search(r"^RssAnon:\s+(\d+)", status, re.M)[1]) << 10
            threads = int(re.search(r"^Threads:\s+(\d+)", status, re.M)[1])
            found[f"{name} {pid}"] = (rss, len(os.listdir(f"/proc/{pid}/fd")), threads)
    return found


def least(batches):
    """The least bytes, descriptors and threads of each process that was there in all of these batches."""
    return {name: [min(each) for each in zip(*(batch[name] for batch in batches))]
            for name in batches[0] if all(name in batch for batch in batches)}


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
    if len(after) < 2 * WINDOW_BATCHES:
        return wrong + [f"nothing was compared: that takes {(WARM_BATCHES + 2 * WINDOW_BATCHES) * BATCH} clients"]
    first, last = least(after[:WINDOW_BATCHES]), least(after[-WINDOW_BATCHES:])
    if first.keys() != last.keys():
        wrong.append(f"processes came or went: {sorted(first.keys() ^ last.keys())}")
    for name in sorted(first.keys() & last.keys()):
        now = last[name]
        more = [a - b for a, b in zip(now, first[name])]
        print(f"{name:24} {now[0] >> 10} KiB ({more[0] / 1024:+.0f}), {now[1]} descriptors ({more[1]:+}), {now[2]} threads ({more[2]:+})")
        if more[0] > BYTES_MORE_MAX or more[1] > 4 or more[2] > 2:
            wrong.append(f"{name} holds more than it did")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    # So little KV memory that all of it is soon taken from the system.
    cluster = Cluster(BARD, hosts=1, tp=2, spares=0, options=["--kv-blocks", 512])
    try:
        cluster.until_ready()
        wrong = asyncio.run(run(cluster, options.clients, random.Random(options.seed)))
    finally:
        cluster.end()
    for said in wrong:
        print(said)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
