#!/usr/bin/env python3
"""Kills, stops and cuts off every part of a cluster at every stage of a group's life, while streams run.

Three hosts with a rank each, of which two are a group and one is its spare, two routers, three members of etcd, clients: each in
a network namespace of its own. A rank stops at the failpoint of the stage (`crates/failpoint`); there it is killed, left, or cut
off, or something else is and it goes on. Every stream must give the text that it gives undisturbed. Needs root.

    make chaos                            all cells
    stages.py --quick                     a cut of it
    stages.py --cells "rank 0 decode"     those whose names say so
"""

import asyncio
import contextlib
import datetime
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from cluster import GALERNE
from hosts import MEMBERS, ROUTERS, Spread, arguments, play
from network import CUT
from streams import flowing, percentile, stalls

HOSTS = ["h0", "h1", "h2"]
STREAMS, TOKENS = 16, 300
#: Seconds of streams before a fault and after it.
AROUND_S = 1.0
#: Seconds until what was broken is whole again; a rank that was killed is restarted by its supervisor.
HOLD_S = {"kill": 2.0, "stop": 3.0, "partition": 5.0}
#: Seconds until a cell must have come to its stage, a group must be whole, a drained group must be gone.
REACH_S, WHOLE_S, DRAIN_S = 20, 90, 3

ROLES = ["rank 0", "rank 1", "spare", "router", "etcd member", "all of etcd"]
STAGES = ["forming", "loading", "prefill", "decode", "all-reduce", "drain"]
#: Where it is dangerous to fail, and who may be there.
PLACES = [("rank 0", "written"), ("rank 0", "meeting"), ("rank 1", "meeting"), ("rank 0", "declared"), ("rank 0", "planned"),
          ("rank 0", "committed"), ("router", "relayed"), ("rank 0", "leaving"), ("rank 1", "leaving")]
CELLS = [(role, stage, fault) for stage in STAGES[:-1] for role in ROLES for fault in HOLD_S]
CELLS += [(role, place, fault) for role, place in PLACES for fault in ("kill", "stop")]
CELLS += [(role, "drain", fault) for role in ROLES for fault in HOLD_S]
QUICK = [("rank 0", "forming", "kill"), ("rank 1", "forming", "stop"), ("rank 0", "loading", "kill"), ("rank 1", "prefill", "kill"),
         ("rank 0", "decode", "partition"), ("rank 1", "all-reduce", "stop"), ("etcd member", "forming", "kill"),
         ("rank 0", "written", "kill"), ("rank 0", "declared", "kill"), ("rank 0", "committed", "kill"), ("router", "relayed", "kill"),
         ("rank 0", "drain", "kill"), ("rank 1", "drain", "kill")]


class Staged(Spread):
    """A cluster whose processes stop where they are told to."""

    stops = True

    def until_whole(self):
        """Waits until every group serves with all its ranks, and the first one has its spare."""
        due = time.time() + WHOLE_S
        while True:
            self.until_ready()
            if any(rank["state"] == "waiting" for rank in self.fleet()[0]["ranks"]):
                return
            if time.time() > due:
                sys.exit(f"there is no spare after {WHOLE_S} s:\n{self.text()[-3000:]}")
            time.sleep(0.05)

    def second_group(self):
        """Starts a group that takes over what a drained one leaves."""
        self.groups = 2
        for host in range(self.tp):
            self.start_worker(1, host)

    def drain(self):
        """Drains the first group."""
        command = [GALERNE, "drain", "g0", "--etcd", self.endpoints(), "--grace-s", DRAIN_S, "--end-timeout-s", DRAIN_S]
        self.drained = subprocess.Popen([str(part) for part in command], stdout=self.log, stderr=self.log)

    def undrain(self):
        """Starts the first group again: its workers have ended, or do now."""
        self.drained.wait()
        for host in range(len(HOSTS)):
            process = self.processes[f"worker g0 h{host}"]
            process.terminate()
            process.wait()
            self.start_worker(0, host)

    def events(self, words, since):
        """When some process has logged one of these words after a time."""
        lines = re.findall(rf"^(\S+Z) .*?(?:{'|'.join(words)})", self.text(), re.MULTILINE)
        told = (datetime.datetime.fromisoformat(line).timestamp() for line in lines)
        return sorted(at for at in told if at >= since)


def way(role, stage):
    """How a cell comes to its stage: whose death, or a drain, has the group begin anew, and the failpoint there."""
    number = int(role == "rank 1")
    if stage == "drain":
        return "drain", "draining"
    if stage in ("planned", "committed", "relayed"):
        return None, stage
    if stage in ("prefill", "decode", "all-reduce"):
        return None, f"{stage}-{number}"
    if stage in ("written", "declared"):
        return "rank 1", stage
    if stage == "loading":
        number = int(role != "rank 0")  # survivors hold their weights: who takes a place loads
        return f"rank {number}", f"loading-{number}"
    if (role, stage) == ("spare", "forming"):
        return "rank 1", "forming-1"
    return f"rank {1 - number}", f"{stage}-{number}"


def victims(cluster, role, stage, before, stopped):
    """The processes that the fault is for, and the hosts that are cut off: known before, or by who has stopped."""
    if role in ("rank 0", "rank 1"):
        pids = [before[role] if stage == "drain" else stopped]
    elif role == "spare":
        pids = [stopped if stage == "forming" else cluster.pid("spare") if stage == "loading" else before["spare"]]
    else:
        names = {"router": ["router 0"], "etcd member": [before["leader"]], "all of etcd": [f"etcd {e[1:]}" for e in MEMBERS]}[role]
        return [cluster.processes[name].pid for name in names], names, [name[0] + name.split()[1] for name in names]
    command = pathlib.Path(f"/proc/{pids[0]}/cmdline").read_bytes().decode().split("\0")
    return pids, [], [command[command.index("--host") + 1]]


def send(pid, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def strike(cluster, fault, found, stopped):
    """Breaks the victims, lets the others go on, and makes the victims whole."""
    pids, names, places = found
    if fault == "partition":
        others = [*HOSTS, *MEMBERS, *ROUTERS]  # a client does not see that its router is cut off from them
        pairs = sum((cluster.network.around(place, others if names else None) for place in places), [])
        cluster.network.set(CUT, *pairs)
    else:
        for pid in pids:
            send(pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    if fault == "partition" or stopped not in pids:
        send(stopped, signal.SIGCONT)
    time.sleep(HOLD_S[fault])
    if fault == "partition":
        cluster.network.heal()
    for pid in pids if fault == "stop" else []:
        send(pid, signal.SIGCONT)
    for name in names if fault == "kill" else []:
        cluster.restart(name)


def fail(cluster, role, stage, fault, before):
    """Comes to the stage and strikes there; returns when that was."""
    trigger, point = way(role, stage)
    cluster.ask(point)
    if trigger == "drain":
        cluster.drain()
    elif trigger:
        os.kill(before[trigger], signal.SIGKILL)
    due = time.time() + REACH_S
    while not (stopped := cluster.at(point)):
        if time.time() > due:
            sys.exit(f"nobody has come to {point} after {REACH_S} s:\n{cluster.text()[-3000:]}")
        time.sleep(0.002)
    at = time.time()
    strike(cluster, fault, victims(cluster, role, stage, before, stopped), stopped)
    return at


async def cell(cluster, judge, role, stage, fault):
    """Streams come and go all the time; returns a row."""
    if stage == "drain" and cluster.groups == 1:
        cluster.second_group()
    await asyncio.to_thread(cluster.until_whole)
    if stage == "loading":  # a spare that was a member before may hold its weights still
        os.kill(await asyncio.to_thread(cluster.pid, "spare"), signal.SIGKILL)
        await asyncio.sleep(AROUND_S)
        await asyncio.to_thread(cluster.until_whole)
    before = {name: await asyncio.to_thread(cluster.pid, name) for name in ("rank 0", "rank 1", "spare")}
    before["leader"] = f"etcd {await asyncio.to_thread(cluster.etcd_leader)}"
    async with flowing(judge, AROUND_S, repeats=role == "router") as streams:
        at = await asyncio.to_thread(fail, cluster, role, stage, fault, before)
    if stage == "drain":
        await asyncio.to_thread(cluster.undrain)
    row = measured(cluster, judge, streams, at, HOLD_S[fault])
    show = lambda seconds: "–" if seconds is None else f"{seconds:.2f} s"
    print(f"{role:12} {stage:11} {fault:10} lost {row[1]} of {row[0]}, {row[2]} refused at first, stall p50 {show(row[3])}, p99 "
          f"{show(row[4])}, noticed {show(row[5])}, serves {show(row[6])}", flush=True)
    for said in judge.lost(streams)[:5]:
        print("   ", said, flush=True)
    return [role, stage, fault, *row[:3], *(show(seconds) for seconds in row[3:])]


def measured(cluster, judge, streams, at, seconds):
    """Streams, those lost, refusals, and how long it took: stalls, until a rank ended the epoch, until a group served again."""
    waits, _ = stalls(streams, at, at + seconds)
    noticed = next(iter(cluster.events(["epoch failed", "epoch is over"], at)), None)
    serves = next(iter(cluster.events(["group serves"], noticed)), None) if noticed else None
    since = lambda when: when and when - at
    lost, refused = judge.lost(streams), sum(stream.refusals for stream in streams)
    return len(streams), len(lost), refused, percentile(waits, 0.5), percentile(waits, 0.99), since(noticed), since(serves)


def table(rows):
    lines = ["## bard-1m, by stage", "",
             "Three hosts with a rank each, N = 2 and a spare, two routers, three members of etcd, each in a network namespace of its own.",
             "A rank stops at the stage, and the fault follows within milliseconds; at forming and loading a rank was killed before,",
             "so these groups fail twice, and their stalls begin with that death. At drain a second group is there.", "",
             "A stall is the longest wait for a piece of those streams that were open when the fault came. Noticed: until the first",
             "rank ended the epoch; serves: until a group served after that. Both are from the logs; – where no epoch ended.", "",
             "| who | at | fault | streams | lost | refused at first | stall p50 | stall p99 | noticed | serves |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


def main():
    parser = arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="a cut of it")
    options = parser.parse_args()
    cells = [each for each in (QUICK if options.quick else CELLS) if options.cells in " ".join(each)]
    play(Staged, HOSTS, (STREAMS, TOKENS), cell, cells, table, options.table, spares=0, ranks=1)


if __name__ == "__main__":
    main()
