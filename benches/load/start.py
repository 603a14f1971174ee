#!/usr/bin/env python3
"""What starting costs: from the start of `galerne up` to the first token, and the memory of its rank at its peak.

    python3 benches/load/start.py GALERNE CHECKPOINT [RUNS] [-- FLAGS OF `galerne up` …]

Asks for one streamed completion every 5 ms until one is answered. Beside the best and the median of the runs stand what
the rank says of its weights (bytes, and the time that it read and packed for), its peak resident memory after the answer,
what `cat` takes to read the same files, which are in the page cache by then, and what it takes to touch as much fresh
memory: both have to be paid. Needs the standard library only.
"""
import ctypes, http.client, json, mmap, os, re, socket, statistics, subprocess, sys, tempfile, threading, time

PAUSE_S = 0.005
TIMEOUT_S = 120.0
TOKENS = 8


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def first_token(process, port, until):
    """Asks until an answer begins; returns when its first token came."""
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True})
    while time.monotonic() < until and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        try:
            connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            if answer.status == 200 and answer.readline().startswith(b"data: {"):
                came = time.monotonic()
                answer.read()
                return came
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(PAUSE_S)
    sys.exit("no answer in time")


def spent(pid):
    """Peak resident memory in MiB and processor seconds of the rank, the only child of `galerne up`."""
    tasks = os.listdir(f"/proc/{pid}/task")
    rank = " ".join(open(f"/proc/{pid}/task/{task}/children").read() for task in tasks).split()[0]
    status, stat = open(f"/proc/{rank}/status").read(), open(f"/proc/{rank}/stat").read()
    ticks = sum(map(int, stat.rpartition(")")[2].split()[11:13]))
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024, ticks / os.sysconf("SC_CLK_TCK")


def run(galerne, model, flags):
    http_port, grpc, admin = free_port(), free_port(), free_port()
    command = [galerne, "up", "--model", model, "--http", f"127.0.0.1:{http_port}", "--grpc", f"127.0.0.1:{grpc}",
               "--admin", f"127.0.0.1:{admin}", *flags]
    with tempfile.TemporaryFile("w+") as log:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=os.environ | {"GALERNE_LOG": "info"})
        try:
            token_s = first_token(process, http_port, began + TIMEOUT_S) - began
            peak, cpu_s = spent(process.pid)
        finally:
            process.terminate()
            process.wait()
        log.seek(0)
        told = re.search(r"weights loaded.*?\bbytes=(\d+).*?\bms=(\d+)", re.sub(r"\x1b\[[0-9;]*m", "", log.read()))
    weights_mib, load_s = (int(told.group(1)) / 2**20, int(told.group(2)) / 1e3) if told else (float("nan"),) * 2
    return token_s, load_s, peak, weights_mib, cpu_s


def pages_s(mib):
    """What it takes to touch fresh memory of that size with a thread a processor: the system clears it first."""
    threads = os.cpu_count()
    part = int(mib * 2**20 / threads)
    memory = [mmap.mmap(-1, part, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(threads)]
    [part.madvise(mmap.MADV_HUGEPAGE) for part in memory]
    touch = lambda memory: ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 0, part)
    workers = [threading.Thread(target=touch, args=(part,)) for part in memory]
    began = time.monotonic()
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    return time.monotonic() - began


def cat_s(model):
    files = [model] if os.path.isfile(model) else [entry.path for entry in os.scandir(model)]
    began = time.monotonic()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - began


def main():
    arguments, _, flags = " ".join(sys.argv[1:]).partition(" -- ")
    galerne, model, *runs = arguments.split()
    runs = int(runs[0]) if runs else 5
    cat_s(model)
    cats, pages, rows = [], [], []
    for _ in range(runs):
        cats.append(cat_s(model))
        rows.append(run(galerne, model, flags.split()))
        pages.append(pages_s(rows[-1][3]))
    tokens, loads, peaks, weights, cpus = zip(*rows)
    told = lambda seconds: f"{min(seconds):.3f} s best, {statistics.median(seconds):.3f} s median"
    print(f"{model} {flags}: {runs} runs")
    print(f"  first token   {told(tokens)}")
    print(f"  weights       {told(loads)}, of which {weights[0]:.1f} MiB are held")
    print(f"  rank's CPU    {told(cpus)}, the answer included")
    print(f"  cat           {told(cats)}")
    print(f"  fresh memory  {told(pages)}")
    print(f"  peak memory   {max(peaks):.1f} MiB, {100 * max(peaks) / weights[0] - 100:+.1f}% of the weights")


main()
