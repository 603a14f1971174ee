#!/usr/bin/env python3
"""Kills and stops parts of a cluster while streams run, and counts what was lost.

Each cell of the table is a role and a fault. Before the first, every prompt is answered undisturbed; afterwards each stream
must give the same text, whatever died meanwhile. Everything runs on loopback and ends with this script.

    make chaos            all cells, and many kills with many streams
    run.py --quick        a cut of it
"""

import argparse
import asyncio
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
GALERNE = ROOT / "target/release/galerne"
ETCD = ROOT / ".cache/bin/etcd"
BARD = ROOT / "tests/golden/bard-1m"
DEMO = ROOT / ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf"
HTTP, GRPC, ETCD_PORT, ETCD_PEER, ADMIN = 18411, 18412, 18413, 18414, 18415
#: The second router's ports lie so far behind those of the first.
SECOND = 10
START_S = 120
#: No stream may take longer: one that does hangs.
STREAM_S = 180


class Cluster:
    """etcd, a router and one worker a host, each a process of its own."""

    def __init__(self, model, hosts, tp, spares, groups=1, options=()):
        self.folder = tempfile.TemporaryDirectory()
        self.log = open(pathlib.Path(self.folder.name) / "log", "wb")
        self.model, self.hosts, self.tp, self.spares, self.groups, self.options = model, hosts, tp, spares, groups, options
        self.processes = {}
        self.start_etcd()
        for group in range(groups):
            for host in range(hosts):
                self.start_worker(group, host)
        for router in range(2):
            self.start_router(router)

    def spawn(self, name, *command):
        environment = dict(os.environ, GALERNE_ADMIN="127.0.0.1:0", GALERNE_LOG="info")
        self.processes[name] = subprocess.Popen(
            [str(part) for part in command], stdout=self.log, stderr=self.log, env=environment
        )

    def start_etcd(self):
        client, peer = f"http://127.0.0.1:{ETCD_PORT}", f"http://127.0.0.1:{ETCD_PEER}"
        self.spawn(
            "etcd", ETCD, "--name", "one", "--log-level", "error", "--data-dir", f"{self.folder.name}/etcd",
            "--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer,
            "--initial-advertise-peer-urls", peer, "--initial-cluster", f"one={peer}",
        )

    def start_worker(self, group, host):
        self.spawn(
            f"worker g{group} h{host}", GALERNE, "worker", "--tp", self.tp, "--ranks", self.tp // self.hosts,
            "--spares", self.spares, "--group", f"g{group}", "--host", f"h{host}", "--sequences-max", 256, "--threads", 1,
            "--etcd", f"http://127.0.0.1:{ETCD_PORT}", "--model", self.model, *self.options,
        )

    def start_router(self, number):
        http, grpc, admin = (f"127.0.0.1:{port + SECOND * number}" for port in (HTTP, GRPC, ADMIN))
        self.spawn(
            f"router {number}", GALERNE, "router", "--http", http, "--grpc", grpc, "--admin", admin,
            "--etcd", f"http://127.0.0.1:{ETCD_PORT}", "--model", self.model,
        )

    def fleet(self):
        command = [str(GALERNE), "status", "--json", "--grpc", f"127.0.0.1:{GRPC}"]
        told = subprocess.run(command, capture_output=True, text=True)
        return json.loads(told.stdout)["groups"] if told.returncode == 0 else []

    def until_ready(self, ranks=None):
        """Waits until all groups serve with all their ranks."""
        due = time.time() + START_S
        while time.time() < due:
            groups = [g for g in self.fleet() if g["state"] == "ready"]
            members = [sum(r["state"] == "ready" for r in g["ranks"]) for g in groups]
            if len(groups) == self.groups and all(m >= (ranks or self.tp) for m in members):
                return
            time.sleep(0.05)
        sys.exit(f"the cluster is not ready after {START_S} s:\n{self.text()[-3000:]}")

    def pid(self, role):
        """The process of `rank K`, `spare`, `host` or a name."""
        group = self.fleet()[0]
        ready = [rank["pid"] for rank in group["ranks"] if rank["state"] == "ready"]
        if role.startswith("rank "):
            return ready[int(role[5:])]
        if role == "spare":
            return next(rank["pid"] for rank in group["ranks"] if rank["state"] == "waiting")
        return self.processes[role].pid

    def text(self):
        self.log.flush()
        return (pathlib.Path(self.folder.name) / "log").read_text(errors="replace")

    def restart(self, name):
        """Starts again what does not come back by itself."""
        process = self.processes[name]
        process.kill()
        process.wait()
        if name == "etcd":
            self.start_etcd()
        elif name.startswith("router "):
            self.start_router(int(name[7:]))
        else:
            _, group, host = name.split()
            self.start_worker(int(group[1:]), int(host[1:]))

    def end(self):
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        self.folder.cleanup()


class Refused(Exception):
    """The request was not taken: its client is told to come back."""


class Stream:
    """One answer: its text, when its pieces came, and what went wrong. Where it may, it begins again at the other router when its
    own breaks off, under the same name."""

    def __init__(self, number, tokens, repeats=False):
        self.number, self.tokens, self.repeats, self.port = number, tokens, repeats, HTTP
        self.text, self.error, self.times, self.refusals = "", None, [], 0

    async def run(self):
        body = {
            "prompt": f"{self.number % 17}: The {['king', 'queen', 'fool', 'ghost'][self.number % 4]} of number {self.number}",
            "max_tokens": self.tokens, "stream": True, "ignore_eos": True,
            "temperature": [0, 0.8][self.number % 2], "seed": self.number,
        }
        try:
            await asyncio.wait_for(self.read(json.dumps(body).encode()), STREAM_S)
        except Refused:
            self.text, self.times, self.refusals = "", [], self.refusals + 1
            await asyncio.sleep(0.2)
            return await self.run()
        except (OSError, asyncio.TimeoutError, ValueError) as error:
            if self.repeats and self.port == HTTP:
                self.text, self.port = "", HTTP + SECOND
                return await self.run()
            self.error = f"{type(error).__name__} {error}"
        return self

    async def read(self, body):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        name = f"x-request-id: stream-{self.number}\r\n" if self.repeats else ""
        head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\n{name}connection: close\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        received = b""
        while piece := await reader.read(1 << 16):
            received += piece
            self.times.append(time.time())
        writer.close()
        if received.startswith((b"HTTP/1.1 503", b"HTTP/1.1 429")) and b"no_group_ready" in received:
            raise Refused
        finished = False
        for line in received.split(b"\n"):
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                finished = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(event["error"]["message"])
            self.text += event["choices"][0]["text"]
        if not finished:
            raise ValueError("the stream ended without a word: " + received[:200].decode(errors="replace"))

    def stall(self, since):
        """The longest wait for the next piece that was going on at `since` or began within 3 s of it."""
        gaps = [b - a for a, b in zip(self.times, self.times[1:]) if b > since and a < since + 3]
        return max(gaps, default=0.0)


async def together(streams):
    return await asyncio.gather(*(stream.run() for stream in streams))


def percentile(values, share):
    ordered = sorted(values) or [0.0]
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Judge:
    """Holds streams against their undisturbed texts."""

    def __init__(self, count, tokens):
        self.count, self.tokens, self.texts = count, tokens, {}

    async def learn(self):
        for stream in await together(self.streams()):
            if stream.error:
                sys.exit(f"an undisturbed stream failed: {stream.error}")
            self.texts[stream.number] = stream.text

    def streams(self, repeats=False):
        return [Stream(number, self.tokens, repeats) for number in range(self.count)]

    def lost(self, streams):
        """What every lost or changed stream says."""
        wrong = lambda s: s.error or (None if s.text == self.texts[s.number] else "another text")
        return [f"{s.number}: {wrong(s)}" for s in streams if wrong(s)]


FAULTS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


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
    lost = judge.lost(streams)
    stalls = [stream.stall(at) for stream in streams]
    row = (role, fault, len(streams), len(lost), percentile(stalls, 0.5), percentile(stalls, 0.99))
    print(f"{role:14} {fault:5} lost {len(lost)} of {len(streams)}, stall p50 {row[4]:.2f} s, p99 {row[5]:.2f} s", flush=True)
    for said in lost[:5]:
        print("   ", said, flush=True)
    return row


async def storm(cluster, judge, kills, pause):
    """Kills rank after rank while as many streams as there are run all the time."""
    done, refused, lost, stop = 0, 0, [], False

    async def client(number):
        nonlocal done, refused
        while not stop:
            stream = await Stream(number, judge.tokens).run()
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
         ("worker g0 h1", "kill"), ("router 0", "kill"), ("router 0", "stop"), ("etcd", "kill"), ("etcd", "stop")]


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
        cluster = Cluster(model, hosts=2, tp=2, spares=1)
        try:
            cluster.until_ready()
            judge = Judge(streams, tokens)
            began = time.time()
            asyncio.run(judge.learn())
            delay = min(2.0, (time.time() - began) / 3)
            rows = [asyncio.run(cell(cluster, judge, role, fault, delay)) for role, fault in ROLES]
            total = asyncio.run(storm(cluster, judge, kills, 2.0)) if model == BARD else None
        finally:
            if failed or os.environ.get("CHAOS_LOG"):
                pathlib.Path(os.environ.get("CHAOS_LOG", "/dev/null")).write_text(cluster.text())
            cluster.end()
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
