#!/usr/bin/env python3
"""Train bard-1m: a one-million-parameter Mistral (GQA, sliding window) on Shakespeare, small enough to live in a repository.

    python3 train_bard.py OUT_DIR [--minutes 12]

Text: the public-domain works as the Python package aiperf 0.13.0 carries them. Needs torch, transformers and tokenizers.
Writes a Hugging Face checkpoint in bf16 with tokenizer.json (byte-level BPE, 1,024 tokens). Two cores, minutes.
"""
import argparse, glob, json, math, os, subprocess, sys, tempfile, time, zipfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MistralConfig, MistralForCausalLM

MEMBER = "aiperf/dataset/generator/assets/shakespeare.txt"


def text():
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([sys.executable, "-m", "pip", "-q", "download", "--no-deps", "-d", tmp, "aiperf==0.13.0"], check=True)
        return zipfile.ZipFile(glob.glob(tmp + "/aiperf-*.whl")[0]).read(MEMBER).decode()


def tokenizer(corpus):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(corpus.splitlines(keepends=True), trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return t


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out"), p.add_argument("--minutes", type=float, default=12)
    a = p.parse_args()
    os.makedirs(a.out, exist_ok=True)
    corpus = text()
    tok = tokenizer(corpus)
    ids = torch.tensor(sum((e.ids[1:] for e in tok.encode_batch(corpus.split("\n\n") if "\n\n" in corpus else [corpus])), []))
    torch.manual_seed(1623)
    config = MistralConfig(vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=8,
                           num_key_value_heads=4, head_dim=16, max_position_embeddings=2048, sliding_window=64, rms_norm_eps=1e-5,
                           rope_theta=10000.0, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
    model = MistralForCausalLM(config)
    print(f"{sum(x.numel() for x in model.parameters()):,} parameters, {len(ids):,} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    start, step, length, batch, loss = time.time(), 0, 256, 16, None
    while (done := (time.time() - start) / (60 * a.minutes)) < 1:
        for g in optimizer.param_groups:
            g["lr"] = 3e-3 * min(1, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        at = torch.randint(0, len(ids) - length, (batch,))
        x = torch.stack([torch.cat([torch.tensor([1]), ids[i:i + length - 1]]) for i in at])
        loss = model(x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            print(f"step {step}  loss {loss.item():.3f}  {100 * done:.0f}%", flush=True)
    model.to(torch.bfloat16).save_pretrained(a.out)
    tok.save(os.path.join(a.out, "tokenizer.json"))
    json.dump({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"},
              open(os.path.join(a.out, "tokenizer_config.json"), "w"), indent=1)
    print(f"{step} steps, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
