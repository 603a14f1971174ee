#!/usr/bin/env python3
"""Readers that hardly read, connections that say garbage or nothing, frames that claim to be huge: do others notice?

Each cell runs the same streams twice, in turns: left alone, and beside the hostile clients. All must give their texts, and what
the processes hold must not grow. Everything runs on loopback and ends with this script.

    make chaos                    all cells
    hostile.py --cells reader     those whose names say so
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import socket
import struct
import sys
import time

from cluster import ADMIN, BARD, GRPC, HTTP, Cluster
from leaks import BYTES_MORE_MAX, FILES_MORE_MAX, held, told
from streams import Judge, percentile

STREAMS, TOKENS = 4, 300
#: Seconds of each turn, and turns: alone, beside, alone, beside and so on.
TURN_S, TURNS = 3.0, 8
READERS, GARBAGE_PER_S, HALF_OPEN = 100, 1000, 400
#: A port whose queue is full answers nobody.
CONNECT_S = 0.02


def garbage(dice):
    """A first message that no port expects."""
    return dice.choice([
        lambda: dice.randbytes(dice.randrange(1, 2000)),
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + dice.randbytes(200),
        lambda: b"GET / HTTP/1.1\r\nhost: " + b"a" * 100_000,
        lambda: b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 1099511627776\r\n\r\n{",
        lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + dice.randbytes(300),
        lambda: struct.pack("<Q", 1 << 62) + dice.randbytes(64),
        # A frame of HTTP/2 that says it has 16 MiB.
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00\xff\xff\xff\x00\x01\x00\x00\x00\x01",
        lambda: b"",
    ])()


def throw_garbage(ports, per_s, thrown):
    """Opens connections at this rate, port after port, says garbage and hangs up. In a process of its own."""
    dice, open_ones, began = random.Random(1), [], time.monotonic()
    for number in itertools.count(1):
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(ports[number % len(ports)])
        with contextlib.suppress(OSError):  # a port whose queue is full has not answered
            connection.send(garbage(dice))
        open_ones.append(connection)
        while len(open_ones) > 100:
            open_ones.pop(0).close()
        thrown.value = number
        time.sleep(max(0.0, number / per_s - (time.monotonic() - began)))


@contextlib.contextmanager
def beside_garbage(ports, per_s, rates):
    """Adds to `rates` how many connections a second there were."""
    began = time.monotonic()
    number = multiprocessing.Value("l", 0)
    process = multiprocessing.get_context("fork").Process(target=throw_garbage, args=(ports, per_s, number), daemon=True)
    process.start()
    try:
        yield
    finally:
        rates.append(number.value / (time.monotonic() - began))
        process.terminate()
        process.join()


@contextlib.contextmanager
def half_open(ports):
    """Connections on every port that say nothing, or half a word."""
    opened = []
    for number in range(HALF_OPEN * len(ports)):
        with contextlib.suppress(OSError):
            opened.append(socket.create_connection(ports[number % len(ports)], timeout=CONNECT_S))
            if number % 2:
                opened[-1].send(b"POST /v1/comp")
    try:
        yield
    finally:
        for connection in opened:
            connection.close()


@contextlib.contextmanager
def readers(cluster):
    """Streams whose readers take a byte a second, once the group is done with them: the last are soon cut."""
    body = json.dumps({"prompt": "The king", "max_tokens": 2000, "stream": True, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    opened = []
    for _ in range(READERS):
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        reader.connect(cluster.faces()[0])
        reader.sendall(head.encode() + body)
        opened.append(reader)
    process = multiprocessing.get_context("fork").Process(target=read_slowly, args=(opened,), daemon=True)
    process.start()
    due = time.time() + 120
    while time.time() < due and steps_go_on():
        pass
    try:
        yield
    finally:
        process.terminate()
        process.join()
        for reader in opened:
            reader.close()


def read_slowly(opened):
    while True:
        for reader in opened:
            with contextlib.suppress(OSError):
                reader.recv(1, socket.MSG_DONTWAIT)
        time.sleep(1)


def listening(pid):
    """The ports at which a process waits for connections."""
    own = {os.readlink(descriptor) for descriptor in pathlib.Path(f"/proc/{pid}/fd").iterdir()}
    sockets = [line.split() for line in pathlib.Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return [int(each[1].split(":")[1], 16) for each in sockets if each[3] == "0A" and f"socket:[{each[9]}]" in own]


def steps_go_on():
    """Whether the group computes something within a second."""
    generated = lambda: [line for line in told("/metrics").splitlines() if line.startswith("vllm:generation_tokens_total")]
    before = generated()
    time.sleep(1)
    return generated() != before


async def turn(judge):
    """Waits between pieces of all streams for a while, and what was lost."""
    streams, due = [], time.time() + TURN_S

    async def client(number):
        while time.time() < due:
            streams.append(await judge.stream(number).run())

    await asyncio.gather(*(client(number) for number in range(judge.count)))
    gaps = [b - a for stream in streams for a, b in zip(stream.times, stream.times[1:])]
    return gaps, judge.lost(streams), len(streams)


def cell(cluster, judge, name, hostile):
    cluster.until_ready()
    alone, beside, lost, count, peaks, rests = [], [], [], 0, [], []
    for number in range(TURNS):
        with hostile() if number % 2 else contextlib.nullcontext():
            gaps, wrong, streams = asyncio.run(turn(judge))
            (peaks if number % 2 else rests).append(held(cluster))
        (beside if number % 2 else alone).extend(gaps)
        lost, count = lost + wrong, count + streams
        time.sleep(1)
    rests.append(held(cluster))
    # At rest a heap gives back some MiB or none: the most that it held beside them tells.
    most = lambda samples, name: max(sample[name][0] for sample in samples)
    more = {name: (most(peaks[TURNS // 4:], name) - most(peaks[: TURNS // 4], name), now[1] - rests[1][name][1])
            for name, now in rests[-1].items()}
    grown = [f"{name} holds {rss >> 10} KiB and {files} descriptors" for name, (rss, files) in more.items()
             if rss > BYTES_MORE_MAX or files > FILES_MORE_MAX]
    row = (name, count, len(lost), *(1000 * percentile(gaps, share) for gaps in (alone, beside) for share in (0.5, 0.99)), grown)
    print(f"{name:44} lost {len(lost)} of {count}; ITL alone p50 {row[3]:.2f}, p99 {row[4]:.2f} ms, beside {row[5]:.2f}, {row[6]:.2f} ms"
          + "".join(f"; {each} more" for each in grown), flush=True)
    for said in lost[:5]:
        print("   ", said, flush=True)
    return row


def table(rows):
    lines = ["## bard-1m, beside hostile clients", "",
             f"{STREAMS} streams, {TURNS} turns of {TURN_S:.0f} s: alone and beside. ITL as the client sees it.", "",
             "| beside | streams | lost | p50 alone, beside | p99 alone, beside |", "|---|---|---|---|---|"]
    lines += [f"| {a} | {b} | {c} | {d:.2f}, {f:.2f} ms | {e:.2f}, {g:.2f} ms ({g / e:.2f}×) |" for a, b, c, d, e, f, g, _ in rows]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="", help="only cells in whose names this stands")
    parser.add_argument("--table", help="file at whose end the table is written")
    options = parser.parse_args()
    # So little KV memory that all of it is soon taken from the system.
    cluster = Cluster(BARD, hosts=1, tp=2, spares=0, options=["--kv-blocks", 512])
    rates = []
    try:
        cluster.until_ready()
        judge = Judge(cluster, STREAMS, TOKENS)
        asyncio.run(judge.learn())
        faces = [("127.0.0.1", port) for port in (HTTP, GRPC, ADMIN)]
        ranks = [("127.0.0.1", port) for rank in cluster.fleet()[0]["ranks"] for port in listening(rank["pid"])]
        cells = [
            (f"{READERS} readers of 1 B/s", lambda: readers(cluster)),
            (f"{GARBAGE_PER_S} garbage connections a second, router", lambda: beside_garbage(faces, GARBAGE_PER_S, rates)),
            (f"{GARBAGE_PER_S} garbage connections a second, ranks", lambda: beside_garbage(ranks, GARBAGE_PER_S, rates)),
            (f"{HALF_OPEN} half-open connections a port", lambda: half_open(faces + ranks)),
        ]
        rows = [cell(cluster, judge, *each) for each in cells if options.cells in each[0]]
    finally:
        cluster.end()
    if rates:
        print("garbage: " + ", ".join(f"{rate:.0f}" for rate in rates) + " connections a second")
    if options.table:
        with open(options.table, "a") as file:
            file.write("\n" + table(rows))
    sys.exit(any(row[2] or row[7] for row in rows))


if __name__ == "__main__":
    main()
