"""Clients that read streams, and the judge who knows what they must read."""

import asyncio
import contextlib
import json
import sys
import time

#: No stream may take longer: one that does hangs.
STREAM_S = 180


class Refused(Exception):
    """The request was not taken: its client is told to come back."""


class Stream:
    """One answer: its text, when its pieces came, and what went wrong. Given several routers, it begins again at the next one when
    its own breaks off, under the same name."""

    def __init__(self, number, tokens, *routers):
        self.number, self.tokens, self.routers = number, tokens, list(routers)
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
            if len(self.routers) > 1:
                self.text = ""
                del self.routers[0]
                return await self.run()
            self.error = f"{type(error).__name__} {error}"
        return self

    async def read(self, body):
        reader, writer = await asyncio.open_connection(*self.routers[0])
        name = f"x-request-id: stream-{self.number}-{id(self)}\r\n"
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

    def stall(self, since, until):
        """The longest wait for the next piece, of those that were going on between the two times."""
        gaps = [b - a for a, b in zip(self.times, self.times[1:]) if b > since and a < until]
        return max(gaps, default=0.0)


async def together(streams):
    return await asyncio.gather(*(stream.run() for stream in streams))


@contextlib.asynccontextmanager
async def flowing(judge, around_s, repeats=False):
    """Streams that come and go all the time, from some seconds before what is done within until as long after it."""
    streams, stop = [], False

    async def client(number):
        while not stop:
            streams.append(await judge.stream(number, repeats).run())

    clients = [asyncio.ensure_future(client(number)) for number in range(judge.count)]
    await asyncio.sleep(around_s)
    yield streams
    await asyncio.sleep(around_s)
    stop = True
    await asyncio.gather(*clients)


def stalls(streams, since, until):
    """The longest waits between two times: of the streams that were open at the first, and of all."""
    waits = {stream: stream.stall(since, until) for stream in streams if stream.times}
    return [wait for stream, wait in waits.items() if stream.times[0] < since < stream.times[-1]], list(waits.values())


def percentile(values, share):
    ordered = sorted(values) or [0.0]
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Judge:
    """Holds streams against their undisturbed texts."""

    def __init__(self, cluster, count, tokens):
        self.cluster, self.count, self.tokens, self.texts = cluster, count, tokens, {}

    async def learn(self):
        for stream in await together(self.streams()):
            if stream.error:
                sys.exit(f"an undisturbed stream failed: {stream.error}")
            self.texts[stream.number] = stream.text

    def stream(self, number, repeats=False):
        return Stream(number, self.tokens, *self.cluster.faces()[: 1 + repeats])

    def streams(self, repeats=False):
        return [self.stream(number, repeats) for number in range(self.count)]

    def lost(self, streams):
        """What every lost or changed stream says."""
        wrong = lambda s: s.error or (None if s.text == self.texts[s.number] else "another text")
        return [f"{s.number}: {wrong(s)}" for s in streams if wrong(s)]
