"""Trains the demo base: a small Llama model that answers word problems step by step.

    python demo/train_base.py --data train.jsonl --out demo/base

The result is a Hugging Face model folder. README.md beside this file says where the text comes
from and what the reported bits per byte mean.
"""

import argparse
import hashlib
import json
import math
import pathlib
import random
import time

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import LlamaConfig, LlamaForCausalLM

import chats

CONTEXT_LENGTH = 2048
HELD_OUT_SHARE = 0.05
PAD_LABEL = -100
# The arguments that decide the result, for the report.
SETTINGS = (
    "seed minutes lr weight_decay dropout swap_names batch_tokens renderings eval_every".split()
)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="JSONL: GSM8K lines or two-message chats")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=0.0, help="end earlier; 0 = no limit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch-tokens", type=int, default=32768, help="padding included")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--swap-names", type=float, default=0.5, help="share of examples")
    parser.add_argument("--renderings", type=int, default=16, help="different epochs of text")
    parser.add_argument("--eval-every", type=int, default=100, help="steps")
    return parser.parse_args()


def build_tokenizer(args, train, folder):
    """Trains the tokenizer on training text only, writes its files, loads them as users do."""
    rng = random.Random(args.seed)
    texts = [question + "\n" + answer for question, answer in train]
    texts += [json.dumps(chats.tool_conversation(rng)) for _ in range(len(train) // 40)]
    trained = chats.train_tokenizer(texts, args.vocab)
    trained.save(str(folder / "tokenizer.json"))
    config = json.dumps(chats.tokenizer_config(CONTEXT_LENGTH), indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chats.CHAT_TEMPLATE, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sample = "".join(chats.CONTROL_TOKENS + chats.TAG_TOKENS) + texts[0]
    loaded_ids = tokenizer(sample, add_special_tokens=False)["input_ids"]
    if loaded_ids != trained.encode(sample, add_special_tokens=False).ids:
        raise SystemExit("the loaded tokenizer differs from the trained one")
    return tokenizer


def render_with(tokenizer):
    """The chat template as a function of messages and tools."""
    return lambda messages, tools: tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False
    )


def encode(tokenizer, texts):
    """Token ids of rendered texts, one int64 tensor each, cut at the context length."""
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [torch.tensor(row[:CONTEXT_LENGTH]) for row in rows]


def batches(rows, budget_tokens, rng):
    """Batches of rows of similar length, at most `budget_tokens` with padding, shuffled.

    Rows are padded on the right and never share a sequence: no attention across examples.
    """
    order = sorted(rows, key=lambda row: len(row) * rng.uniform(0.9, 1.1))
    groups, group = [], []
    longest = 0
    for row in order:
        longest = max(longest, len(row))
        if group and longest * (len(group) + 1) > budget_tokens:
            groups.append(group)
            group, longest = [], len(row)
        group.append(row)
    groups.append(group)
    rng.shuffle(groups)
    for members in groups:
        yield torch.nn.utils.rnn.pad_sequence(members, True, PAD_LABEL)


def build_model(tokenizer, dropout):
    """The model in f32. Dropout acts on the embeddings and on what each block adds."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    dropped = [model.model.embed_tokens]
    for layer in model.model.layers:
        dropped += [layer.self_attn.o_proj, layer.mlp.down_proj]
    for module in dropped:
        # A hook and not a module, so that the saved model has no trace of it.
        module.register_forward_hook(lambda m, _, output: F.dropout(output, dropout, m.training))
    return model


def loss_sum(model, padded_ids, device):
    """Summed cross-entropy in nats over every token after the first, and the token count."""
    labels = padded_ids.to(device, non_blocking=True)
    ids = labels.clamp(min=0)  # padding is on the right: causal attention never sees it
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda" and model.training):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    targets = labels[:, 1:].reshape(-1)
    nats = F.cross_entropy(
        logits.float().flatten(0, 1), targets, ignore_index=PAD_LABEL, reduction="sum"
    )
    return nats, (targets != PAD_LABEL).sum()


@torch.no_grad()
def bits_per_byte(model, rows, content_bytes, device):
    """Nats of all predicted tokens, markup included, over the bytes of the content alone."""
    model.eval()
    rng = random.Random(0)
    total = sum(loss_sum(model, b, device)[0].item() for b in batches(rows, 16384, rng))
    model.train()
    return total / math.log(2) / content_bytes


def learning_rate_factor(progress, step):
    """Short linear warm-up, then a cosine to zero; `progress` goes from 0 to 1."""
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def make_optimizer(model, args):
    """AdamW; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, args.lr, (0.9, 0.98), weight_decay=args.weight_decay)


def train(model, epochs, measure, args):
    """Trains to the end of the schedule and leaves the best held-out weights in the model.

    `epochs` are the renderings of the text, used in turn. Returns (steps done, best step).
    """
    optimizer = make_optimizer(model, args)
    rng = random.Random(args.seed)
    best, best_step, best_state = math.inf, 0, None
    started, step, epoch, progress = time.time(), 0, 0, 0.0
    while progress < 1.0:
        for padded_ids in batches(epochs[epoch % len(epochs)], args.batch_tokens, rng):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * learning_rate_factor(progress, step)
            nats, count = loss_sum(model, padded_ids, args.device)
            (nats / count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            progress = step / args.steps
            if args.minutes:
                progress = max(progress, (time.time() - started) / (60 * args.minutes))
            if step % args.eval_every == 0 or progress >= 1.0:
                held_out = measure(model)
                if held_out < best:
                    best, best_step = held_out, step
                    best_state = {k: v.clone() for k, v in model.state_dict().items()}
                print(
                    f"step {step} epoch {epoch} train {(nats / count).item():.3f} nats/token "
                    f"held-out {held_out:.4f} bits/byte {time.time() - started:.0f} s",
                    flush=True,
                )
            if progress >= 1.0:
                break
        epoch += 1
    model.load_state_dict(best_state)
    return step, best_step


@torch.no_grad()
def greedy_answers(model, tokenizer, questions, device, max_tokens=320):
    """Greedy answers as text, and how many of them ended with the end-of-turn token."""
    model.eval()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    inputs = tokenizer(
        prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    ).to(device)
    outputs = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_tokens,
        do_sample=False,
    )[:, inputs["input_ids"].shape[1] :]
    stopped = (outputs == tokenizer.eos_token_id).any(1).sum().item()
    return tokenizer.batch_decode(outputs, skip_special_tokens=True), stopped


def save(model, tokenizer, folder):
    """Writes the weights in bf16 with both configs; returns the model as it will be loaded."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder, safe_serialization=True)
    return AutoModelForCausalLM.from_pretrained(folder).float()


def main():
    args = parse_args()
    started = time.time()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)

    examples = chats.load_examples(args.data)
    training, held_out = chats.split_examples(examples, HELD_OUT_SHARE, args.seed)
    tokenizer = build_tokenizer(args, training, args.out)
    render, names = render_with(tokenizer), chats.find_names(training)
    rng = random.Random(args.seed)
    epochs = []
    for _ in range(args.renderings):
        texts = chats.render_epoch(training, names, args.swap_names, render, rng)
        epochs.append(encode(tokenizer, texts))
    held_out_rows = encode(tokenizer, [render(chats.turns(*e), None) for e in held_out])
    held_out_bytes = sum(len(text.encode("utf-8")) for example in held_out for text in example)
    epoch_tokens = sum(map(len, epochs[0]))
    print(
        f"{len(training)} training and {len(held_out)} held-out examples, {len(names)} names, "
        f"vocabulary {len(tokenizer)}, {epoch_tokens} tokens an epoch, "
        f"prepared in {time.time() - started:.0f} s",
        flush=True,
    )

    model = build_model(tokenizer, args.dropout).to(args.device).train()

    def measure(measured):
        return bits_per_byte(measured, held_out_rows, held_out_bytes, args.device)

    steps, best_step = train(model, epochs, measure, args)
    model = save(model, tokenizer, args.out).to(args.device)
    torch.set_float32_matmul_precision("highest")  # the reported figure is plain f32
    asked = held_out[:20]
    answers, stopped = greedy_answers(model, tokenizer, [q for q, _ in asked], args.device)
    for (question, _), answer in list(zip(asked, answers))[:3]:
        print(f"\nQ: {question}\nA: {answer}")
    report = {
        "held_out_bits_per_byte": round(measure(model), 4),
        "held_out_examples": len(held_out),
        "held_out_bytes": held_out_bytes,
        "held_out_tokens": sum(len(row) - 1 for row in held_out_rows),
        "answers_ended": f"{stopped} of {len(asked)}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "training_examples": len(training),
        "tokens_per_epoch": epoch_tokens,
        "steps": steps,
        "best_step": best_step,
        "seconds": round(time.time() - started),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "torch": torch.__version__,
        "settings": {key: getattr(args, key) for key in SETTINGS},
        "data_sha256": hashlib.sha256(pathlib.Path(args.data).read_bytes()).hexdigest(),
    }
    (args.out / "TRAINING.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
