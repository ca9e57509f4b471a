"""The peer: fine-tuning with transformers and PEFT at their best settings, in our figures' terms.

    python bench/peft.py --data GSM8K.jsonl --tokenizer demo/base [--compile] [--json FILE]

bf16 base with random weights made on the device, bf16 LoRA r 16 on all linear modules, no dropout,
sdpa attention, fused AdamW, no gradient checkpointing, no clipping; optionally torch.compile, which
takes minutes to start. Three settings: full rows 4×2048; GSM8K padded to 1024; GSM8K packed into
rows of 2048, where examples see the earlier ones of their row (the fastest way to pack). Padding is
on the right and labels leave it out, so no mask is needed and attention takes its fast path. Needs
torch, transformers and peft. Prints a table, and with --json appends one object a figure.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time

# This folder would hide the library of the same name.
del sys.path[0]

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

SHAPES = {
    "llama3-8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        rope_parameters=dict(rope_type="default", rope_theta=500000.0),
    ),
    "tiny": dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=4096,
    ),
}
WARM_STEPS = 3
EXAMPLES_PER_STEP = 64  # of GSM8K, as F2 says.
MICRO_ROWS = 8192


def model_on(device, shape):
    config = LlamaConfig(max_position_embeddings=8192, use_cache=False, **SHAPES[shape])
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    return model.to(device).train()


class Settings:
    """Yields optimizer steps: lists of micro-batches, and how many real tokens they hold."""

    def __init__(self, args, vocab):
        self.device, self.vocab = args.device, vocab
        self.length = 64 if args.quick else 2048
        self.padded_to = 512 if args.quick else 1024
        self.rows = 1 if args.quick else MICRO_ROWS // 2048
        self.examples = self.read(args) if args.data else []

    def read(self, args):
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        examples = []
        with open(args.data) as file:
            for line in file:
                messages = json.loads(line)["messages"]
                text = tokenizer.apply_chat_template(messages, tokenize=False)
                examples.append(tokenizer(text, add_special_tokens=False)["input_ids"])
                if args.quick and len(examples) == 200:
                    break
        return examples

    def full_rows(self):
        while True:
            ids = torch.randint(0, self.vocab, (self.rows, self.length), device=self.device)
            yield [dict(input_ids=ids, labels=ids)], ids.numel()

    def padded(self):
        at_once = max(1, MICRO_ROWS // 1024)
        per_step = at_once if len(self.examples) < 1000 else EXAMPLES_PER_STEP
        while True:
            for start in range(0, len(self.examples) - per_step + 1, per_step):
                chosen = self.examples[start : start + per_step]
                micro = [chosen[i : i + at_once] for i in range(0, per_step, at_once)]
                real = sum(min(len(example), self.padded_to) for example in chosen)
                yield [self.pad(examples) for examples in micro], real

    def pad(self, examples):
        shape = (len(examples), self.padded_to)
        ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        for row, example in enumerate(examples):
            cut = torch.tensor(example[: self.padded_to])
            ids[row, : len(cut)] = labels[row, : len(cut)] = cut
        return dict(input_ids=ids.to(self.device), labels=labels.to(self.device))

    def packed(self):
        stream = [token for example in self.examples for token in example]
        mean = len(stream) / len(self.examples)
        size = self.rows * self.length
        # As many whole micro-batches as come nearest to F2's examples per optimizer step.
        count = 1 if size < 8192 else max(1, round(EXAMPLES_PER_STEP * mean / size))
        while True:
            for start in range(0, len(stream) - count * size + 1, count * size):
                ids = torch.tensor(stream[start : start + count * size], device=self.device)
                micro = ids.view(count, self.rows, self.length)
                yield [dict(input_ids=rows, labels=rows) for rows in micro], count * size


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def measure(model, steps, args):
    """Real tokens per second over whole optimizer steps, and the median step."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-4, weight_decay=0.0, fused=args.device == "cuda")
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, tokens, begin = [], 0, None
    for number, (micro, real) in enumerate(steps):
        if number == WARM_STEPS:
            wait(args.device)
            begin = last = time.perf_counter()
        for batch in micro:
            (model(**batch).loss / len(micro)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if begin is None:
            continue
        wait(args.device)
        now = time.perf_counter()
        times.append(now - last)
        tokens += real
        last = now
        if now - begin >= args.seconds:
            break
    times.sort()
    return tokens / (last - begin), times[len(times) // 2], len(times)


def commit():
    if os.environ.get("LOQUETIER_COMMIT"):
        return os.environ["LOQUETIER_COMMIT"]
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return git.stdout.strip() or "unknown"


def report(args, name, value, step, steps):
    memory = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else 0.0
    print(f"{name:<24} {value:>9.0f} tokens/s  step {step * 1e3:.1f} ms, {steps} steps, "
          f"{memory:.1f} GiB", flush=True)
    if args.json and not args.quick:
        figure = {
            "id": name,
            "value": round(value, 1),
            "unit": "tokens/s",
            "ceiling": None,
            "peer": None,
            "command": "bench/peft.py " + " ".join(sys.argv[1:]),
            "commit": commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        }
        with open(args.json, "a") as file:
            file.write(json.dumps(figure) + "\n")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="chats as JSONL; without, only full rows are measured")
    parser.add_argument("--tokenizer", default="demo/base")
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each setting, at least")
    parser.add_argument("--compile", action="store_true", help="full and packed rows compiled")
    parser.add_argument("--json", help="append the figures to this file")
    parser.add_argument("--quick", action="store_true", help="tiny and short: only that it runs")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.seconds = "tiny", 0.0
    return args


def main():
    args = arguments()
    model = model_on(args.device, args.shape)
    settings = Settings(args, SHAPES[args.shape]["vocab_size"])
    runs = [("PEFT-F1", settings.full_rows)]
    if args.data:
        runs += [("PEFT-F2-padded", settings.padded), ("PEFT-F2-packed", settings.packed)]
    for name, steps in runs:
        report(args, name, *measure(model, steps(), args))
    if args.compile:
        compiled = torch.compile(model, dynamic=False)
        for name, steps in runs:
            if name != "PEFT-F2-padded":
                report(args, f"{name}-compile", *measure(compiled, steps(), args))


main()
