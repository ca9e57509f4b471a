"""Text of the demo base: examples, the chat template, conversations and the tokenizer.

Everything here is decided by the seed. Nothing here knows about tensors or training.
"""

import collections
import json
import random
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers import processors, trainers

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT, TOOL = "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"
CONTROL_TOKENS = [PAD, BEGIN, END, SYSTEM, USER, ASSISTANT, TOOL]
# Not "special": decoding must keep them, because a reader of tool calls looks for them in text.
TAG_TOKENS = ["<tool_call>", "</tool_call>"]

# A turn is one role token, the content, one end token; so the text of a turn is tokenised the
# same way whatever stands around it, and a prompt is always a prefix of the longer conversation.
CHAT_TEMPLATE = """\
{#- A turn is: role token, content, end token. Tools stand in the first system turn. -#}
{%- macro text(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content -%}
    {%- for part in content -%}{{- part.text -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set has_system = messages and messages[0].role in ['system', 'developer'] -%}
{%- if tools -%}
  {{- '<|system|>' -}}
  {%- if has_system -%}{{- text(messages[0].content) ~ '\\n\\n' -}}{%- endif -%}
  {{- 'Tools, one a line. Call one with <tool_call>{"name": ..., "arguments": ...}</tool_call>' -}}
  {%- for tool in tools -%}{{- '\\n' ~ (tool.function | tojson) -}}{%- endfor -%}
  {{- '<|end|>' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role in ['system', 'developer'] -%}
    {%- if not (tools and loop.first) -%}
      {{- '<|system|>' ~ text(message.content) ~ '<|end|>' -}}
    {%- endif -%}
  {%- elif message.role == 'user' -%}
    {{- '<|user|>' ~ text(message.content) ~ '<|end|>' -}}
  {%- elif message.role == 'tool' -%}
    {{- '<|tool|>' ~ text(message.content) ~ '<|end|>' -}}
  {%- elif message.role == 'assistant' -%}
    {{- '<|assistant|>' ~ text(message.content) -}}
    {%- if message.tool_calls -%}
      {%- for call in message.tool_calls -%}
        {{- '<tool_call>{"name": ' ~ (call.function.name | tojson) ~ ', "arguments": ' -}}
        {%- if call.function.arguments is string -%}
          {{- call.function.arguments -}}
        {%- else -%}
          {{- call.function.arguments | tojson -}}
        {%- endif -%}
        {{- '}</tool_call>' -}}
      {%- endfor -%}
    {%- endif -%}
    {{- '<|end|>' -}}
  {%- else -%}
    {{- raise_exception('unknown role ' ~ message.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a patient teacher of arithmetic.",
    "Answer the question step by step.",
    "Solve the problem and end with the answer.",
    "You help pupils with word problems.",
    "Show your work.",
]

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Work out an arithmetic expression",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}


def load_examples(path):
    """Reads (question, answer) pairs: chat lines, or the question/answer lines of GSM8K itself."""
    examples = []
    with open(path, encoding="utf-8") as lines:
        for line in filter(str.strip, lines):
            row = json.loads(line)
            if "messages" in row:
                question, answer = (message["content"] for message in row["messages"])
            else:
                question = row["question"]
                answer = re.sub(r"<<[^>]*>>", "", row["answer"])
                answer = re.sub(r"\n#### *", "\nThe answer is ", answer)
            examples.append((question.strip(), answer.strip()))
    return examples


def split_examples(examples, held_out_share, seed):
    """Returns (training, held-out) examples; the cut is made before anything is learned."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    held_out_count = max(1, round(len(order) * held_out_share))
    held_out = [examples[i] for i in order[:held_out_count]]
    return [examples[i] for i in order[held_out_count:]], held_out


def find_names(examples):
    """Finds first names in the training text: {name: names that take the same pronouns}.

    A name is a capitalised word never written small, often followed by what people do.
    """
    text = "\n".join(question + " " + answer for question, answer in examples)
    small_words = set(re.findall(r"\b[a-z]+\b", text))
    acts = set("has had is was wants bought buys gets got went needs sold makes made".split())
    uses, people, pronouns = collections.Counter(), collections.Counter(), {}
    for question, answer in examples:
        words = re.findall(r"[A-Za-z]+", question + " " + answer)
        sides = sum(word in ("she", "her", "She", "Her") for word in words)
        sides -= sum(word in ("he", "his", "him", "He", "His") for word in words)
        for word, following in zip(words, words[1:]):
            if word[0].isupper() and len(word) > 2 and word.lower() not in small_words:
                uses[word] += 1
                people[word] += following in acts
                pronouns[word] = pronouns.get(word, 0) + sides
    names = [w for w in uses if uses[w] >= 8 and people[w] >= 0.15 * uses[w] and pronouns[w]]
    women = sorted(name for name in names if pronouns[name] > 0)
    men = sorted(name for name in names if pronouns[name] < 0)
    return {name: group for group in (women, men) for name in group}


def swap_names(example, names, rng):
    """Gives every known name of an example another one, consistently in question and answer."""
    present = sorted(set(re.findall(r"[A-Za-z]+", "\n".join(example))) & names.keys())
    swaps = {}
    for name in present:
        free = [other for other in names[name] if other not in present + list(swaps.values())]
        swaps[name] = rng.choice(free) if free else name
    return tuple(re.sub(r"[A-Za-z]+", lambda m: swaps.get(m[0], m[0]), text) for text in example)


def turns(question, answer):
    """One question and its answer as two messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def tool_conversation(rng):
    """A short sum answered through the calculator tool, so that tool calls are not unknown."""
    left, right, sign = rng.randint(2, 99), rng.randint(2, 20), rng.choice("+-*/")
    if sign == "/":
        left *= right
    value = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]
    expression = f"{left} {sign} {right}"
    ask = rng.choice(["What is {}?", "Calculate {}.", "How much is {}?", "Work out {}."])
    call = {"name": "calculate", "arguments": json.dumps({"expression": expression})}
    return [
        {"role": "user", "content": ask.format(expression)},
        {"role": "assistant", "content": None, "tool_calls": [{"function": call}]},
        {"role": "tool", "content": str(value)},
        {"role": "assistant", "content": f"{expression} = {value}\nThe answer is {value}"},
    ]


def render_epoch(examples, names, swap_share, render, rng):
    """Renders every training example once, as single chats, longer chats or plain text.

    `render(messages, tools)` is the chat template. A few tool conversations are added.
    """
    order = rng.sample(examples, len(examples))
    texts = []
    while order:
        kind = rng.random()
        size = 1 if kind < 0.90 else rng.randint(2, 4) if kind < 0.99 else rng.randint(5, 9)
        taken = [order.pop() for _ in range(min(size, len(order)))]
        taken = [swap_names(e, names, rng) if rng.random() < swap_share else e for e in taken]
        if kind < 0.08:
            texts.append(BEGIN + "\n".join(taken[0]) + END)
            continue
        system = rng.random() < 0.25
        messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if system else []
        for question, answer in taken:
            messages += turns(question, answer)
        texts.append(render(messages, None))
    for _ in range(len(examples) // 40):
        texts.append(render(tool_conversation(rng), [CALCULATOR]))
    rng.shuffle(texts)
    return texts


def train_tokenizer(texts, vocab_size):
    """Byte-level BPE; digits stand alone, words keep their leading space."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"'[a-z]{1,2}\b| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [AddedToken(text, special=True, normalized=False) for text in CONTROL_TOKENS]
    tags = [AddedToken(text, special=False, normalized=False) for text in TAG_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(tags),
        special_tokens=control,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    markup = re.compile("|".join(map(re.escape, CONTROL_TOKENS + TAG_TOKENS)))
    tokenizer.train_from_iterator((markup.sub("\n", text) for text in texts), trainer)
    tokenizer.add_tokens(tags)
    begin_id = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, begin_id)]
    )
    return tokenizer


def tokenizer_config(context_length):
    """The content of tokenizer_config.json; the template has a file of its own."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
