"""A cluster each part of which has a host of its own, as a network namespace, and what is done to it, cell by cell."""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import urllib.request

from cluster import BARD, ETCD_PORT, Cluster
from network import Network
from streams import Judge

ROUTERS, MEMBERS = ["r0", "r1"], ["e0", "e1", "e2"]


class Spread(Cluster):
    """Workers on hosts `h0`, `h1` and so on, two routers, three members of etcd."""

    members = len(MEMBERS)

    def __init__(self, network, **options):
        self.network = network
        super().__init__(BARD, tp=2, **options)

    def address(self, place):
        return self.network.addresses[place]

    def on(self, place):
        return ["ip", "netns", "exec", self.network.names[place]]

    def host(self, rank):
        """The host of a rank, by its number in the group."""
        ready = [rank["id"] for rank in self.fleet()[0]["ranks"] if rank["state"] == "ready"]
        return ready[rank].split("/")[0]

    def spread(self):
        """Has a rank of the group on each host again: a host whose spare was needed holds both."""
        self.until_ready()
        while self.host(0) == self.host(1):
            os.kill(self.pid("rank 1"), signal.SIGKILL)
            time.sleep(1)
            self.until_ready()

    def etcd(self, member, path, body):
        request = urllib.request.Request(f"http://{self.address(member)}:{ETCD_PORT}/v3/{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=2) as reply:
            return json.load(reply)

    def etcd_leader(self):
        """The number of etcd's leader, as soon as all members know one."""
        while True:
            with contextlib.suppress(OSError, KeyError):
                told = [self.etcd(member, "maintenance/status", {}) for member in MEMBERS]
                leaders = {status["leader"] for status in told}
                return next(number for number, status in enumerate(told) if leaders == {status["header"]["member_id"]})
            time.sleep(0.2)


@contextlib.contextmanager
def ruled(cluster, rule, pairs):
    cluster.network.set(rule, *pairs)
    yield
    cluster.network.heal()


def around(cluster, rule, name, others=None):
    return ruled(cluster, rule, cluster.network.around(name, others))


def arguments(doc):
    """What every script of cells is told."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="", help="only cells in whose names this stands")
    parser.add_argument("--table", help="file at whose end the table is written")
    return parser


def play(kind, hosts, judged, cell, cells, table, path, **options):
    """Plays the cells one after the other, each in the same cluster, and appends their table to a file. Exits with 1 if a stream was lost,
    which is what the fifth place of a row counts. `judged`: streams, and tokens of each."""
    network = Network([*hosts, *ROUTERS, *MEMBERS, "clients"], own="clients")
    cluster = None
    try:
        cluster = kind(network, hosts=len(hosts), **options)
        cluster.until_ready()
        judge = Judge(cluster, *judged)
        asyncio.run(judge.learn())
        rows = [asyncio.run(cell(cluster, judge, *each)) for each in cells]
    finally:
        if cluster:
            cluster.end()
        network.end()
    if path:
        with open(path, "a") as file:
            file.write("\n" + table(rows))
    sys.exit(any(row[4] for row in rows))
