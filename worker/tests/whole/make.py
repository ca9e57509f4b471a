"""Makes bases of every family with what transformers and PEFT compute on this machine's GPU.

    python worker/tests/whole/make.py FOLDER

For each family a folder with a base in Hugging Face layout (bf16), a LoRA adapter in PEFT format,
and what was computed in float32 and in bfloat16 from the same files: logits, and the losses of 50
optimizer steps. Ours may be at most 1.25 times as far from float32 as theirs in bfloat16.
"""

import json
import math
import sys
import warnings
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

STEPS = 50
BATCH = 4
LEARNING_RATE = 1e-3
LENGTH = 200

COMMON = dict(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=2000,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
)
FAMILIES = {
    "llama2": (LlamaConfig, dict(num_attention_heads=4, num_key_value_heads=4)),
    "llama3": (LlamaConfig, dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
    "mistral": (MistralConfig, dict(head_dim=128, sliding_window=None)),
    "qwen2": (Qwen2Config, dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen3": (Qwen3Config, dict(head_dim=128)),
}


def fill(model, seed):
    """Values that make every part matter: norms away from 1, biases away from 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in sorted(model.named_parameters()):
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("bias"):
            noise *= 0.3
        elif "norm" in name:
            noise = 1 + 0.2 * noise
        elif "embed_tokens" not in name or model.config.tie_word_embeddings:
            noise *= 1.0 / math.sqrt(value.shape[1])
        with torch.no_grad():
            value.copy_(noise)


def tokens(vocab, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (length,), generator=generator)


def load(folder, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    return peft.PeftModel.from_pretrained(
        model.cuda(), folder / "adapter", is_trainable=True
    ).train()


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids[None].cuda(), use_cache=False).logits[0].float().cpu()


def train(model, examples):
    """Losses of all steps: mean over the trained tokens of each step."""
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batch = [examples[(step * BATCH + i) % len(examples)] for i in range(BATCH)]
        count = sum(len(ids) - 1 for ids in batch)
        optimizer.zero_grad()
        total = 0.0
        for ids in batch:
            ids = ids.cuda()
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
            (loss / count).backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(total / count)
    return losses


def make(folder, name, seed):
    kind, overrides = FAMILIES[name]
    config = kind(**{**COMMON, **overrides})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model, seed)
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
    )
    adapter = peft.get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(seed + 1)
    for key, value in sorted(adapter.named_parameters()):
        if "lora_B" in key:
            with torch.no_grad():
                value.copy_(0.02 * torch.randn(value.shape, generator=generator))
    adapter.save_pretrained(folder / "adapter")

    ids = tokens(config.vocab_size, LENGTH, seed + 2)
    lengths = [20 + 23 * index % 181 for index in range(12)]
    examples = [tokens(config.vocab_size, n, seed + 3 + i) for i, n in enumerate(lengths)]
    values, losses = {}, {}
    for label, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        model = load(folder, dtype)
        values[f"logits.{label}"] = logits_of(model, ids).contiguous()
        losses[label] = train(model, examples)
        values[f"trained.{label}"] = logits_of(model, ids).contiguous()
    save_file(values, folder / "expected.safetensors")
    run = dict(
        ids=ids.tolist(),
        examples=[example.tolist() for example in examples],
        batch=BATCH,
        learning_rate=LEARNING_RATE,
        losses=losses,
    )
    (folder / "run.json").write_text(json.dumps(run))
    print(name, "losses", losses["f32"][0], "to", losses["f32"][-1], flush=True)


def main():
    warnings.filterwarnings("ignore")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    target = Path(sys.argv[1])
    for index, name in enumerate(FAMILIES):
        (target / name).mkdir(parents=True, exist_ok=True)
        make(target / name, name, 1000 * (index + 1))


if __name__ == "__main__":
    main()
