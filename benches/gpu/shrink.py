"""Files made small enough to be carried to a machine with a GPU: NCCL for one architecture, the first layers of a GGUF file."""
import array
import shutil
import struct
import subprocess

FATBIN_MAGIC = 0xBA55ED50
#: Bytes of a GGUF number by its type; 8 is text, 9 an array.
GGUF_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
GGUF_ALIGNMENT = 32


def slim_nccl(source, out, sm):
    """A copy of libnccl.so.2 in which code for other architectures, and what only linkers read, is zero: addresses stay, and it
    compresses to a twentieth. For tests, never to be shipped."""
    shutil.copyfile(source, out)
    subprocess.run(["strip", "--strip-debug", out], check=True)
    where = dict(sections(out))
    data = bytearray(out.read_bytes())
    if "__nv_relfatbin" in where:
        offset, size = where["__nv_relfatbin"]
        data[offset : offset + size] = bytes(size)
    at, size = where[".nv_fatbin"]
    end, kept = at + size, 0
    while at + 16 <= end:
        magic, _, header, body = struct.unpack_from("<IHHQ", data, at)
        if magic != FATBIN_MAGIC:
            at += 8
            continue
        entry, at = at + header, at + header + body
        while entry + 32 <= at:
            head, payload = struct.unpack_from("<IQ", data, entry + 4)
            if not head:
                break
            if struct.unpack_from("<I", data, entry + 28)[0] == sm:
                kept += payload
            else:
                data[entry + head : entry + head + payload] = bytes(payload)
            entry += head + payload
    if not kept:
        raise SystemExit(f"{source} holds no code for sm_{sm}")
    out.write_bytes(data)


def sections(path):
    """Name, and place in the file, of each section."""
    told = subprocess.run(["readelf", "-SW", path], check=True, capture_output=True, text=True).stdout
    for line in told.splitlines():
        words = line.replace("[ ", "[").split()
        if len(words) > 6 and words[0].startswith("[") and words[0] != "[Nr]":
            yield words[1], (int(words[4], 16), int(words[5], 16))


class Gguf:
    """Reads a file from its beginning on."""

    def __init__(self, data):
        self.data, self.at = data, 8

    def number(self, form):
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def text(self):
        length = self.number("<Q")
        self.at += length
        return bytes(self.data[self.at - length : self.at])

    def skip(self, kind):
        if kind == 8:
            self.text()
        elif kind == 9:
            inner, count = self.number("<I"), self.number("<Q")
            for _ in range(count):
                self.skip(inner)
        else:
            self.at += GGUF_BYTES[kind]


#: Kinds of GGUF numbers.
Q4_1, Q8_0, BF16 = 3, 8, 30


def bf16(values):
    """The nearest bf16 of each, of two as near the even one."""
    words = array.array("I", array.array("f", values).tobytes())
    return [(word + 0x7FFF + (word >> 16 & 1)) >> 16 for word in words]


def widened(content, kind):
    """Blocks of 32 numbers as bf16."""
    out = array.array("H")
    if kind == Q8_0:
        for scale, *numbers in struct.iter_unpack("<e32b", content):
            out.extend(bf16([scale * number for number in numbers]))
    else:
        for scale, least, packed in struct.iter_unpack("<ee16s", content):
            each = bf16([scale * number + least for number in range(16)])
            out.extend([each[byte & 15] for byte in packed] + [each[byte >> 4] for byte in packed])
    return out.tobytes()


def cut_gguf(source, out, layers, vocab):
    """The first layers of a model, and the first tokens of its vocabulary, without a tokenizer; in bf16, as a GPU holds it."""
    data = source.read_bytes()
    assert data[:4] == b"GGUF"
    file = Gguf(data)
    tensor_count, key_count = file.number("<Q"), file.number("<Q")
    keys = []
    for _ in range(key_count):
        start = file.at
        name, kind = file.text(), file.number("<I")
        value = file.at
        file.skip(kind)
        counts = {b"block_count": layers, b"vocab_size": vocab}.get(name.split(b".")[-1])
        if counts is not None:
            keys.append(data[start:value] + struct.pack("<I", counts))
        elif not name.startswith(b"tokenizer."):
            keys.append(data[start : file.at])
    tensors = []
    for _ in range(tensor_count):
        name = file.text()
        dims = [file.number("<Q") for _ in range(file.number("<I"))]
        tensors.append((name, dims, file.number("<I"), file.number("<Q")))
    first = -(-file.at // GGUF_ALIGNMENT) * GGUF_ALIGNMENT
    ends = sorted([offset for *_, offset in tensors] + [len(data) - first])
    table, body, kept = b"", bytearray(), 0
    for name, dims, kind, offset in tensors:
        if name.startswith(b"blk.") and int(name.split(b".")[1]) >= layers:
            continue
        content = data[first + offset : first + ends[ends.index(offset) + 1]]
        if name in (b"token_embd.weight", b"output.weight"):
            content = content[: len(content) // dims[1] * vocab]
            dims = [dims[0], vocab]
        if kind in (Q4_1, Q8_0):
            # What aligns the next tensor stands behind the blocks.
            block = {Q4_1: 20, Q8_0: 34}[kind]
            content, kind = widened(content[: len(content) // block * block], kind), BF16
        body.extend(bytes(-len(body) % GGUF_ALIGNMENT))
        table += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims))
        table += b"".join(struct.pack("<Q", dim) for dim in dims) + struct.pack("<IQ", kind, len(body))
        body.extend(content)
        kept += 1
    head = data[:8] + struct.pack("<QQ", kept, len(keys)) + b"".join(keys) + table
    out.write_bytes(head + bytes(-len(head) % GGUF_ALIGNMENT) + body)
