"""A cluster of processes on this machine: etcd, routers and workers."""

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


def ready_ranks(group):
    """Its ranks that are ready."""
    return sum(rank["state"] == "ready" for rank in group["ranks"])


class Cluster:
    """etcd, routers and one worker a host, each a process of its own."""

    #: Members of etcd, and routers.
    members, routers = 1, 2
    #: Its processes stop at failpoints that are asked for.
    stops = False

    def __init__(self, model, hosts, tp, spares, groups=1, ranks=None, options=()):
        self.folder = tempfile.TemporaryDirectory()
        self.log = open(pathlib.Path(self.folder.name) / "log", "wb")
        self.model, self.hosts, self.tp, self.spares, self.groups, self.options = model, hosts, tp, spares, groups, options
        self.ranks, self.processes = ranks or tp // hosts, {}
        self.failpoints = pathlib.Path(self.folder.name) / "failpoints"
        self.failpoints.mkdir()
        for member in range(self.members):
            self.start_etcd(member)
        for group in range(groups):
            for host in range(hosts):
                self.start_worker(group, host)
        for router in range(self.routers):
            self.start_router(router)

    def address(self, place):
        """Where `place` is reached: a worker's host `h0`, a router's `r0`, an etcd member's `e0`."""
        return "127.0.0.1"

    def on(self, place):
        """What a command begins with that runs at `place`."""
        return []

    def spawn(self, name, place, *command):
        environment = dict(os.environ, GALERNE_ADMIN="127.0.0.1:0", GALERNE_LOG="info")
        if self.stops:
            environment["GALERNE_FAILPOINTS"] = str(self.failpoints)
        self.processes[name] = subprocess.Popen(
            [str(part) for part in [*self.on(place), *command]], stdout=self.log, stderr=self.log, env=environment
        )

    def endpoints(self):
        return ",".join(f"http://{self.address(f'e{member}')}:{ETCD_PORT}" for member in range(self.members))

    def start_etcd(self, member):
        address = lambda member, port: f"http://{self.address(f'e{member}')}:{port}"
        client, peer = address(member, ETCD_PORT), address(member, ETCD_PEER)
        self.spawn(
            f"etcd {member}", f"e{member}", ETCD, "--name", f"e{member}", "--log-level", "error",
            "--data-dir", f"{self.folder.name}/etcd-{member}",
            "--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer,
            "--initial-advertise-peer-urls", peer,
            "--initial-cluster", ",".join(f"e{each}={address(each, ETCD_PEER)}" for each in range(self.members)),
        )

    def start_worker(self, group, host):
        self.spawn(
            f"worker g{group} h{host}", f"h{host}", GALERNE, "worker", "--tp", self.tp, "--ranks", self.ranks,
            "--spares", self.spares, "--group", f"g{group}", "--host", f"h{host}", "--bind", self.address(f"h{host}"),
            "--sequences-max", 256, "--threads", 1, "--etcd", self.endpoints(), "--model", self.model, *self.options,
        )

    def start_router(self, number):
        http, grpc, admin = (f"{self.address(f'r{number}')}:{port + SECOND * number}" for port in (HTTP, GRPC, ADMIN))
        self.spawn(
            f"router {number}", f"r{number}", GALERNE, "router", "--http", http, "--grpc", grpc, "--admin", admin,
            "--etcd", self.endpoints(), "--model", self.model, "--no-auth",
        )

    def faces(self):
        """Where the routers speak HTTP."""
        return [(self.address(f"r{number}"), HTTP + SECOND * number) for number in range(self.routers)]

    def fleet(self):
        command = [str(GALERNE), "status", "--json", "--grpc", f"{self.address('r0')}:{GRPC}"]
        told = subprocess.run(command, capture_output=True, text=True)
        return json.loads(told.stdout)["groups"] if told.returncode == 0 else []

    def until(self, what, holds):
        """Waits until something holds of the fleet's groups."""
        due = time.time() + START_S
        while time.time() < due:
            if holds(self.fleet()):
                return
            time.sleep(0.05)
        sys.exit(f"{what} after {START_S} s:\n{self.text()[-3000:]}")

    def until_ready(self, ranks=None):
        """Waits until all groups serve with all their ranks."""
        def holds(groups):
            ready = [g for g in groups if g["state"] == "ready"]
            return len(ready) == self.groups and all(ready_ranks(g) >= (ranks or self.tp) for g in ready)

        self.until("the cluster is not ready", holds)

    def until_sized(self, ranks):
        """Waits until the first group serves with so many ranks."""
        self.until(f"there are no {ranks} ranks", lambda groups: bool(groups) and (
            groups[0]["state"], groups[0]["world_size"], ready_ranks(groups[0])) == ("ready", ranks, ranks))

    def pid(self, role):
        """The process of `rank K`, `spare`, `host` or a name."""
        group = self.fleet()[0]
        ready = [rank["pid"] for rank in group["ranks"] if rank["state"] == "ready"]
        if role.startswith("rank "):
            return ready[int(role[5:])]
        if role == "spare":
            return next(rank["pid"] for rank in group["ranks"] if rank["state"] == "waiting")
        return self.processes[role].pid

    def at(self, point):
        """Who has stopped at a failpoint since it was asked for, or `None`."""
        for met in self.failpoints.glob(f"{point}.*"):
            pid = int(met.suffix[1:])
            if pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T":
                return pid
        return None

    def ask(self, point):
        """The next process that comes to this failpoint is to stop there."""
        for met in self.failpoints.glob(f"{point}.*"):
            met.unlink()
        (self.failpoints / point).touch()

    def text(self):
        self.log.flush()
        return (pathlib.Path(self.folder.name) / "log").read_text(errors="replace")

    def restart(self, name):
        """Starts again what does not come back by itself."""
        process = self.processes[name]
        process.kill()
        process.wait()
        if name.startswith("etcd "):
            self.start_etcd(int(name[5:]))
        elif name.startswith("router "):
            self.start_router(int(name[7:]))
        else:
            _, group, host = name.split()
            self.start_worker(int(group[1:]), int(host[1:]))

    def end(self):
        """Ends all of it; what it has logged goes to the file that CHAOS_LOG names."""
        if os.environ.get("CHAOS_LOG"):
            pathlib.Path(os.environ["CHAOS_LOG"]).write_text(self.text())
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        self.folder.cleanup()
