"""What the SDK tests share: one server with open access, a client, small training files."""

import json
import time

import openai
import pytest

from server import ROOT, Server

JOB_SECS = 180


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("serve") / "data") as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    """No retries: a reply that makes the SDK try again is a fault here."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120)


def examples(count):
    """The first lines of a data set that ships with the product, as bytes."""
    lines = (ROOT / "demo/data/pirate.jsonl").read_bytes().splitlines(keepends=True)
    return b"".join(lines[:count])


def upload(client, content, name="train.jsonl"):
    return client.files.create(file=(name, content), purpose="fine-tune")


def create_job(client, content=None, epochs=1, **fields):
    """A job that takes seconds: few examples, a small adapter."""
    file = upload(client, examples(12) if content is None else content)
    extension = {"lora": {"rank": 4}, **fields.pop("extra_body", {})}
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs}}}
    return client.fine_tuning.jobs.create(
        model="demo", training_file=file.id, method=method, extra_body=extension, **fields
    )


def wait_for(client, job_id, *statuses):
    """Polls until the job has one of these; fails at once where it can no longer get there."""
    deadline = time.monotonic() + JOB_SECS
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in statuses:
            return job
        assert job.status not in ("succeeded", "failed", "cancelled"), job
        time.sleep(0.1)
    events = [event.message for event in client.fine_tuning.jobs.list_events(job_id)]
    raise AssertionError(f"{job_id} is {job.status} after {JOB_SECS} s: {json.dumps(events[:5])}")
