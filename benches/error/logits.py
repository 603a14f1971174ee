"""Logits of our engine, and how far some are from others."""
import subprocess

import numpy


class Ours:
    """The logits of one prompt after the other, `[tokens][vocab]`, of `examples/logits` with these arguments."""

    def __init__(self, arguments, prompts, vocab):
        self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.vocab = vocab
        self.process.stdin.write("".join(" ".join(map(str, prompt)) + "\n" for prompt in prompts).encode())
        self.process.stdin.close()

    def next(self, tokens):
        return numpy.frombuffer(self.process.stdout.read(tokens * self.vocab * 4), dtype="<f4").reshape(tokens, -1)


def pieces_of(model, text, tokens, pieces):
    """A file's text as prompts of so many tokens; `model` is llama.cpp's."""
    with open(text, "rb") as file:
        ids = model.tokenize(file.read(), add_bos=False)
    return [ids[at : at + tokens] for at in range(0, len(ids), tokens)][:pieces]


def log_softmax(rows):
    rows = rows.astype(numpy.float64)
    rows = rows - rows.max(axis=1, keepdims=True)
    return rows - numpy.log(numpy.exp(rows).sum(axis=1, keepdims=True))


def compare(rows, reference):
    """Of every position: error, divergence, whether the first choice is another one."""
    errors = rows - reference
    errors = errors - errors.mean(axis=1, keepdims=True)
    share = numpy.sqrt((errors**2).mean(axis=1)) / reference.std(axis=1)
    logp = log_softmax(reference)
    divergence = (numpy.exp(logp) * (logp - log_softmax(rows))).sum(axis=1)
    return numpy.stack([share, divergence, rows.argmax(axis=1) != reference.argmax(axis=1)])


def tell(name, parts):
    all_ = numpy.concatenate(parts, axis=1)
    (error, divergence, other), sure = all_.mean(axis=1), all_.std(axis=1) / numpy.sqrt(all_.shape[1])
    print(
        f"{name:16} error {error:.4f} ± {sure[0]:.4f} of the spread (worst {all_[0].max():.3f}), divergence "
        f"{divergence:.5f} ± {sure[1]:.5f} nats, another first choice at {100 * other:.1f} ± {100 * sure[2]:.1f}%"
    )
