"""Hosts of a cluster as network namespaces, joined by a switch that can lose, delay, choke and cut. Needs root, nothing else."""

import ctypes
import fcntl
import heapq
import itertools
import multiprocessing
import os
import random
import select
import struct
import subprocess
import time

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
#: Bytes of a frame. So large that a Python switch keeps up.
MTU = 9000
#: Seconds of traffic that may wait for a choked line; more is dropped.
QUEUE_S = 0.5


class Rule:
    """What happens to frames between two hosts: a share of them is lost, they take so long, so many bytes pass a second."""

    def __init__(self, loss=0.0, delay_s=0.0, bytes_per_s=None):
        self.loss, self.delay_s, self.bytes_per_s = loss, delay_s, bytes_per_s


CUT = Rule(loss=1.0)


class Network:
    """One network namespace for each name, and one of them for this process itself. Gone with `end`."""

    def __init__(self, names, own):
        self.names = {name: f"chaos-{os.getpid()}-{name}" for name in names}
        self.addresses = {name: f"10.213.0.{1 + number}" for number, name in enumerate(names)}
        self.rules = {}
        ports = {}
        for name, space in self.names.items():
            ip("netns", "add", space)
            enter(space)
            ports[name] = port(f"{self.addresses[name]}/24")
        enter(self.names[own])
        self.control, theirs = multiprocessing.Pipe()
        self.switch = multiprocessing.get_context("fork").Process(target=switch, args=(ports, theirs), daemon=True)
        self.switch.start()

    def set(self, rule, *pairs):
        """Frames from one host to the other of each pair obey `rule`, or none."""
        for pair in pairs:
            self.rules[pair] = rule
        self.control.send(self.rules)

    def heal(self):
        self.rules = {}
        self.control.send(self.rules)

    def around(self, name, others=None):
        """All pairs of `name` with `others`, or with all: both ways."""
        return [pair for other in others or self.names if other != name for pair in ((name, other), (other, name))]

    def end(self):
        self.switch.terminate()
        self.switch.join()
        for space in self.names.values():
            ip("netns", "delete", space)


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)


def enter(space):
    """This thread, and those that it starts from now on, live in network namespace `space`."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{space}") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {space}; this needs root")


def port(address):
    """The network card of the namespace this thread is in; what it sends can be read here."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TAP | IFF_NO_PI))
    ip("link", "set", "lo", "up")
    ip("addr", "add", address, "dev", "eth0")
    ip("link", "set", "eth0", "mtu", str(MTU), "up")
    return tap


def switch(ports, control):
    """Passes frames on between the ports by the addresses it has seen, under rules that come by `control`."""
    dice, rules, late, free_at = random.Random(1), {}, [], {}
    home, order, poll = {}, itertools.count(), select.poll()
    names = {tap: name for name, tap in ports.items()}
    for descriptor in [*names, control.fileno()]:
        poll.register(descriptor, select.POLLIN)

    def send(frame, source, target):
        rule = rules.get((source, target))
        if rule is None:
            return put(ports[target], frame)
        if dice.random() < rule.loss:
            return
        now = time.monotonic()
        due = now + rule.delay_s
        if rule.bytes_per_s:
            begun = max(now, free_at.get((source, target), 0.0))
            if begun - now > QUEUE_S:
                return
            free_at[source, target] = begun + len(frame) / rule.bytes_per_s
            due += free_at[source, target] - now
        heapq.heappush(late, (due, next(order), ports[target], frame))

    while True:
        wait = 1000 * max(0.0, late[0][0] - time.monotonic()) if late else None
        for descriptor, _ in poll.poll(wait):
            if descriptor not in names:
                rules = control.recv()
                continue
            source = names[descriptor]
            for _ in range(64):
                try:
                    frame = os.read(descriptor, MTU + 64)
                except BlockingIOError:
                    break
                home[frame[6:12]] = source
                target = home.get(frame[:6])
                for each in [target] if target else [name for name in ports if name != source]:
                    send(frame, source, each)
        while late and late[0][0] <= time.monotonic():
            _, _, tap, frame = heapq.heappop(late)
            put(tap, frame)


def put(tap, frame):
    try:
        os.write(tap, frame)
    except OSError:
        pass  # The card's queue is full: as on any network, the frame is lost.
