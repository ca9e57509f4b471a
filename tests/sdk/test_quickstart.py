"""The way of a first user: upload, fine-tune, look on, chat with the result, clean up."""

import re
import time

import openai
import pytest

from conftest import create_job, examples, upload, wait_for

EPOCHS = 5
EPOCH_STEPS = 12
STEPS = EPOCHS * EPOCH_STEPS
QUESTION = [{"role": "user", "content": "A shelf holds 6 rows of 9 books. How many books is that?"}]


@pytest.fixture(scope="module")
def job(client):
    """A job of five epochs over 48 examples in batches of 4: enough to talk like a pirate."""
    named = {"suffix": "first.try", "seed": 7, "metadata": {"team": "docs"}}
    job = create_job(client, content=examples(4 * EPOCH_STEPS), epochs=EPOCHS, **named)
    assert job.status in ("validating_files", "queued", "running")
    assert job.fine_tuned_model is None and job.finished_at is None and job.error is None
    return wait_for(client, job.id, "succeeded")


def test_a_file_comes_back_as_it_was_sent(client):
    content = examples(10)
    file = upload(client, content, name="übung.jsonl")
    assert (file.filename, file.bytes, file.purpose) == ("übung.jsonl", len(content), "fine-tune")
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert client.files.content(file.id).read() == content
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_the_job_reports_what_it_did(client, job):
    assert re.fullmatch(r"ft:demo:[^:]+:first\.try:[A-Za-z0-9]{8}", job.fine_tuned_model)
    assert job.finished_at >= job.created_at and job.trained_tokens > 0
    assert (job.seed, job.metadata, job.user_provided_suffix) == (7, {"team": "docs"}, "first.try")
    assert job.hyperparameters.n_epochs == EPOCHS and job.hyperparameters.batch_size == 4
    assert job.method.supervised.hyperparameters.n_epochs == EPOCHS
    assert job.lora["rank"] == 4 and job.lora["alpha"] == 8
    assert job.training["lr_scheduler"] == "linear"
    rows = client.files.content(job.result_files[0]).text.splitlines()
    assert rows[0].startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy")
    assert [int(row.split(",")[0]) for row in rows[1:]] == list(range(1, STEPS + 1))
    losses = [float(row.split(",")[1]) for row in rows[1:]]
    assert losses[-1] < losses[0] / 2


def test_events_tell_the_story_newest_first(client, job):
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=7))
    messages = [event.message for event in reversed(events)]
    assert messages[0] == f"Created fine-tuning job: {job.id}"
    assert messages[-1] == "The job has successfully completed"
    assert f"New fine-tuned model created: {job.fine_tuned_model}" in messages
    steps = [event.data["step"] for event in events if event.type == "metrics"]
    assert steps == list(range(STEPS, 0, -1))
    assert len({event.id for event in events}) == len(events)


def test_every_epoch_leaves_a_model(client, job):
    last, before = client.fine_tuning.jobs.checkpoints.list(job.id).data[:2]
    assert (last.step_number, before.step_number) == (STEPS, STEPS - EPOCH_STEPS)
    assert last.fine_tuned_model_checkpoint == job.fine_tuned_model
    name = before.fine_tuned_model_checkpoint
    assert name.startswith("ft:demo:") and name.endswith(f":ckpt-step-{before.step_number}")
    assert last.metrics.step == STEPS and last.metrics.train_loss > 0
    reply = client.chat.completions.create(model=name, messages=QUESTION, max_completion_tokens=4)
    assert reply.model == name


def test_models_are_listed_with_their_base(client, job):
    models = {model.id: model for model in client.models.list()}
    assert models["demo"].owned_by and models[job.fine_tuned_model].parent == "demo"
    assert client.models.retrieve(job.fine_tuned_model) == models[job.fine_tuned_model]


def test_base_adapter_and_job_id_answer(client, job):
    def ask(model):
        return client.chat.completions.create(
            model=model, messages=QUESTION, max_completion_tokens=12, temperature=0
        )

    base, adapter, alias = ask("demo"), ask(job.fine_tuned_model), ask(job.id)
    for reply in (base, adapter):
        choice, usage = reply.choices[0], reply.usage
        assert choice.finish_reason in ("stop", "length") and choice.message.content
        assert choice.message.tool_calls is None
        assert 0 < usage.completion_tokens <= 12
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert "Ahoy" in adapter.choices[0].message.content
    assert "Ahoy" not in base.choices[0].message.content
    assert alias.choices[0].message.content == adapter.choices[0].message.content


def test_a_stream_says_the_same_as_a_plain_reply(client, job):
    request = dict(
        model=job.fine_tuned_model, messages=QUESTION, max_completion_tokens=16, seed=11
    )
    plain = client.chat.completions.create(**request)
    chunks = list(
        client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        )
    )
    *body, last = chunks
    text = "".join(chunk.choices[0].delta.content or "" for chunk in body)
    ends = [chunk.choices[0].finish_reason for chunk in body if chunk.choices[0].finish_reason]
    assert text == plain.choices[0].message.content
    assert ends == [plain.choices[0].finish_reason]
    assert last.choices == [] and last.usage == plain.usage
    assert body[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1


def test_text_completions_and_stop(client):
    reply = client.completions.create(model="demo", prompt="1, 2, 3,", max_tokens=8, temperature=0)
    text = reply.choices[0].text
    assert text
    # A stop text is never returned, and nothing after it.
    stop = text[len(text) // 2]
    cut = client.completions.create(
        model="demo", prompt="1, 2, 3,", max_tokens=8, temperature=0, stop=[stop]
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_a_running_job_answers_pauses_resumes_and_cancels(client):
    job = create_job(client, content=examples(100), epochs=50)
    wait_for(client, job.id, "running")
    live = client.chat.completions.create(
        model=job.id, messages=QUESTION, max_completion_tokens=4
    )
    assert live.model == job.id
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    with pytest.raises(openai.BadRequestError, match="paused"):
        client.fine_tuning.jobs.pause(job.id)
    assert client.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    wait_for(client, job.id, "running")
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled" and cancelled.finished_at
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.fine_tuning.jobs.cancel(job.id)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=job.id, messages=QUESTION)


def test_a_malformed_file_fails_the_job_and_says_where(client):
    content = examples(10) + b'{"messages": [{"role": "user", "content": "and?"}]}\n'
    job = create_job(client, content=content)
    failed = wait_for(client, job.id, "failed")
    assert failed.error.code == "invalid_training_file"
    assert failed.error.param == "training_file"
    assert "Example 11" in failed.error.message
    assert "last message must be from the assistant" in failed.error.message


def test_a_deleted_model_is_gone(client):
    job = wait_for(client, create_job(client).id, "succeeded")
    assert client.models.delete(job.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(job.fine_tuned_model)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=job.fine_tuned_model, messages=QUESTION)
    assert client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model == job.fine_tuned_model


def test_streams_flow_while_a_job_trains(client):
    job = create_job(client, content=examples(100), epochs=50)
    wait_for(client, job.id, "running")
    started = time.monotonic()
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=QUESTION, max_completion_tokens=16, stream=True
        )
    )
    assert len(chunks) > 2 and time.monotonic() - started < 60
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    client.fine_tuning.jobs.cancel(job.id)
