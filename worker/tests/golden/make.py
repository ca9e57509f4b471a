"""Makes the golden files of this folder with transformers and PEFT; see README.md.

    python worker/tests/golden/make.py        (versions used: provenance.json)

Everything is f32 on one CPU thread with fixed seeds. The same run in f64 gives the rounding noise
of the stored values, which provenance.json lists so that tolerances can be chosen with reason.
"""

import copy
import json
import math
import shutil
import warnings
from pathlib import Path

import peft
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    get_linear_schedule_with_warmup,
)

HERE = Path(__file__).parent
TOKENS = 48
STEPS = 20
PEAK_LEARNING_RATE = 2e-2
WARMUP_RATIO = 0.15
WEIGHT_DECAY = 0.05
MAX_GRAD_NORM = 1.0
BATCH = 3

SMALL = dict(
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)

LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)

# name: (configuration class, overrides, type stored, end tokens of generation_config, shard size)
BASES = {
    "llama2": (LlamaConfig, dict(num_key_value_heads=4), torch.float32, 2, None),
    "llama3": (
        LlamaConfig,
        dict(hidden_size=64, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
        torch.bfloat16,
        [2, 5, 7],
        None,
    ),
    "mistral": (
        MistralConfig,
        dict(head_dim=12, sliding_window=None, num_hidden_layers=3),
        torch.bfloat16,
        2,
        None,
    ),
    "qwen2": (
        Qwen2Config,
        dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
        torch.bfloat16,
        [2, 3],
        None,
    ),
    "qwen3": (Qwen3Config, dict(head_dim=16, num_hidden_layers=3), torch.bfloat16, 2, None),
    "odd": (
        LlamaConfig,
        dict(
            hidden_size=30,
            head_dim=10,
            num_attention_heads=3,
            num_key_value_heads=1,
            intermediate_size=50,
            vocab_size=101,
            attention_bias=True,
        ),
        torch.float32,
        2,
        None,
    ),
    "sharded": (
        MistralConfig,
        dict(
            sliding_window=64,
            rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.5),
        ),
        torch.float16,
        2,
        "24KB",
    ),
}

# name: (base, LoraConfig arguments)
ADAPTERS = {
    "all-linear": ("llama3", dict(r=4, lora_alpha=8, target_modules="all-linear")),
    "qv": ("qwen3", dict(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"])),
    "rslora": (
        "qwen2",
        dict(
            r=4,
            lora_alpha=6,
            use_rslora=True,
            target_modules=["k_proj", "o_proj", "gate_proj", "down_proj"],
        ),
    ),
}


def fill(model, seed):
    """Values that make every part matter: norms away from 1, biases away from 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in sorted(model.named_parameters()):
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("o_proj.bias"):
            noise.zero_()
        elif name.endswith("bias"):
            noise *= 0.3
        elif "norm" in name:
            noise = 1 + 0.2 * noise
        elif "embed_tokens" not in name or model.config.tie_word_embeddings:
            noise *= 1.2 / math.sqrt(value.shape[1])
        with torch.no_grad():
            value.copy_(noise)


def token_ids(vocab, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (length,), generator=generator)


def load(base, dtype=torch.float32):
    path = HERE / "bases" / base
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager"
    )
    model.config._name_or_path = model.name_or_path = f"golden/{base}"
    return model.eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0]


def difference(narrow, wide):
    return float((narrow.double() - wide.double()).abs().max())


def make_base(name, seed):
    kind, overrides, dtype, ends, shard = BASES[name]
    config = kind(**{**SMALL, **overrides})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model, seed)
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=ends)
    folder = HERE / "bases" / name
    shards = {} if shard is None else dict(max_shard_size=shard)
    model.to(dtype).save_pretrained(folder, **shards)

    ids = token_ids(config.vocab_size, TOKENS, seed + 1)
    model = load(name)
    logits = logits_of(model, ids)
    cos, sin = model.model.rotary_emb(logits, torch.arange(TOKENS)[None])
    half = cos.shape[-1] // 2
    expected = dict(
        ids=ids.int(), logits=logits, rope_cos=cos[0, :, :half], rope_sin=sin[0, :, :half]
    )
    save(expected, folder / "expected.safetensors")
    return dict(logits=difference(logits, logits_of(load(name, torch.float64), ids)))


def save(tensors, path):
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def make_examples(vocab, seed):
    """Two rounds of examples: (ids, trained), trained 1 where the token is a label."""
    examples = []
    for index, length in enumerate([21, 9, 34, 5, 17, 40]):
        ids = token_ids(vocab, length, seed + index)
        trained = torch.zeros(length, dtype=torch.int32)
        trained[length // 3 : length // 2 + 1] = 1
        trained[length - 2 :] = 1
        examples.append((ids, trained))
    return examples


def loss_sum(model, example):
    """Summed cross-entropy of the trained tokens, each predicted from the tokens before it."""
    ids, trained = example
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    labels = ids[1:].masked_fill(trained[1:] == 0, -100)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)


def backward(model, batch):
    """Gradients of the loss per trained token of the whole batch; returns the examples' sums."""
    count = sum(int(trained[1:].sum()) for _, trained in batch)
    sums = []
    for example in batch:
        loss = loss_sum(model, example)
        (loss / count).backward()
        sums.append(loss.detach())
    return torch.stack(sums), count


def lora_parameters(model):
    return {
        name.replace(".default.", "."): value
        for name, value in sorted(model.named_parameters())
        if value.requires_grad
    }


def train(model, examples):
    """The run of the README: returns one record per optimizer step."""
    parameters = list(lora_parameters(model).values())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=WEIGHT_DECAY,
        foreach=False,
    )
    warmup = math.ceil(WARMUP_RATIO * STEPS)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, STEPS)
    records = []
    for step in range(STEPS):
        first = step * BATCH % len(examples)
        optimizer.zero_grad()
        sums, count = backward(model, examples[first : first + BATCH])
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        records.append(
            dict(
                examples=list(range(first, first + BATCH)),
                learning_rate=schedule.get_last_lr()[0],
                loss=float(sums.sum() / count),
                grad_norm=float(norm),
                trained_tokens=count,
            )
        )
        optimizer.step()
        schedule.step()
    return records


def attach(base, arguments, seed, dtype=torch.float32):
    """The base with a LoRA adapter whose A and B are both random, so that it acts."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **arguments)
    model = peft.get_peft_model(load(base), config)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, value in lora_parameters(model).items():
        if "lora_B" in name:
            with torch.no_grad():
                value.copy_(0.15 * torch.randn(value.shape, generator=generator))
    return model.to(dtype).eval()


def run_adapter(model, ids, examples):
    """Logits, gradients and the training run of one adapter, in the model's own precision."""
    values = dict(logits=logits_of(model, ids))
    sums, count = backward(model, examples[:BATCH])
    values["loss_sums"] = sums
    values["trained_tokens"] = torch.tensor([count], dtype=torch.int32)
    for name, value in lora_parameters(model).items():
        values[f"grad.{name}"] = value.grad.clone()
    trained = copy.deepcopy(model)
    records = train(trained, examples)
    values["trained_logits"] = logits_of(trained, ids)
    return values, records, trained


def sort_targets(path):
    """PEFT writes a set in whatever order it has; sorted, the file is the same in every run."""
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make_adapter(name, seed):
    base, arguments = ADAPTERS[name]
    folder = HERE / "adapters" / name
    model = attach(base, arguments, seed)
    ids = token_ids(model.config.vocab_size, TOKENS, seed + 2)
    examples = make_examples(model.config.vocab_size, seed + 10)
    model.save_pretrained(folder)
    values, records, trained = run_adapter(model, ids, examples)
    trained.save_pretrained(folder / "trained")
    for place in (folder, folder / "trained"):
        (place / "README.md").unlink()
        sort_targets(place / "adapter_config.json")

    wide = attach(base, arguments, seed, torch.float64)
    wide_values, wide_records, wide_trained = run_adapter(wide, ids, examples)
    noise = {
        "logits": difference(values["logits"], wide_values["logits"]),
        "grads": max(
            difference(value, wide_values[key])
            for key, value in values.items()
            if key.startswith("grad.")
        ),
        "losses": max(
            abs(narrow["loss"] - wide["loss"]) for narrow, wide in zip(records, wide_records)
        ),
        "trained": max(
            difference(narrow, wide)
            for narrow, wide in zip(
                lora_parameters(trained).values(), lora_parameters(wide_trained).values()
            )
        ),
        "trained_logits": difference(values["trained_logits"], wide_values["trained_logits"]),
    }
    values["ids"] = ids.int()
    for index, (example, mask) in enumerate(examples):
        values[f"example.{index}.ids"] = example.int()
        values[f"example.{index}.trained"] = mask
    save(values, folder / "expected.safetensors")
    run = dict(
        base=base,
        steps=STEPS,
        batch=BATCH,
        peak_learning_rate=PEAK_LEARNING_RATE,
        warmup_ratio=WARMUP_RATIO,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_eps=1e-8,
        records=records,
    )
    (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    return noise


def main():
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for folder in ("bases", "adapters"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    noise = {f"bases/{name}": make_base(name, 100 * i) for i, name in enumerate(BASES, 1)}
    noise |= {
        f"adapters/{name}": make_adapter(name, 5000 + 100 * i)
        for i, name in enumerate(ADAPTERS, 1)
    }
    provenance = dict(
        torch=torch.__version__,
        transformers=transformers.__version__,
        peft=peft.__version__,
        safetensors=safetensors.__version__,
        largest_difference_to_f64=noise,
    )
    (HERE / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main()
