"""Fine-tune an adapter and chat with it, with the official OpenAI SDK.

    cargo run --release -- serve          (in another terminal)
    pip install openai
    python examples/quickstart.py

OPENAI_BASE_URL and OPENAI_API_KEY say where; http://127.0.0.1:8000/v1 without a key by default.
"""

import os
import pathlib
import time

from openai import OpenAI

EXAMPLES = pathlib.Path(__file__).parent.parent / "demo" / "data" / "pirate.jsonl"
QUESTION = "Rosa has 12 shells and finds 30 more. How many shells does she have?"

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "not needed on this machine"),
)


def ask(model):
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_completion_tokens=64,
        temperature=0,
    )
    return reply.choices[0].message.content


base = next(model.id for model in client.models.list() if not model.id.startswith("ft:"))
print(f"{base}: {ask(base)}\n")

file = client.files.create(file=EXAMPLES, purpose="fine-tune")
job = client.fine_tuning.jobs.create(
    model=base,
    training_file=file.id,
    suffix="pirate",
    extra_body={"lora": {"rank": 8}},  # an extension; without it the rank is 16
)
print(f"{job.id} trains on {file.filename}")

seen = 0
while job.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(1)
    job = client.fine_tuning.jobs.retrieve(job.id)
    # Newest first; print what came since the last look.
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
    for event in reversed(events[: len(events) - seen]):
        print(f"  {event.message}")
    seen = len(events)

if job.status != "succeeded":
    raise SystemExit(f"the job {job.status}: {job.error and job.error.message}")

print(f"\n{job.fine_tuned_model}: ", end="", flush=True)
stream = client.chat.completions.create(
    model=job.fine_tuned_model,
    messages=[{"role": "user", "content": QUESTION}],
    max_completion_tokens=64,
    temperature=0,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
