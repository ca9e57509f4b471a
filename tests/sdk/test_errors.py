"""Faults arrive as the SDK's own exceptions, with code and parameter, and are never retried."""

import time

import openai
import pytest

from conftest import upload
from server import Server

QUESTION = [{"role": "user", "content": "Hi"}]


def fault_of(error, call):
    with pytest.raises(error) as caught:
        call()
    assert caught.value.request_id.startswith("req_")
    return caught.value


def test_unknown_things_are_not_found(client):
    chat = client.chat.completions.create
    fault = fault_of(openai.NotFoundError, lambda: chat(model="ft:no:such::x", messages=QUESTION))
    assert fault.code == "model_not_found" and fault.type == "invalid_request_error"
    fault = fault_of(openai.NotFoundError, lambda: client.models.retrieve("a/b:c"))
    assert (fault.code, fault.param) == ("model_not_found", "model")
    fault = fault_of(openai.NotFoundError, lambda: client.files.retrieve("file-none"))
    assert (fault.code, fault.param) == (None, "id")
    fault = fault_of(openai.NotFoundError, lambda: client.fine_tuning.jobs.retrieve("ftjob-none"))
    assert (fault.code, fault.param) == ("fine_tune_not_found", "fine_tune_id")
    fault = fault_of(openai.NotFoundError, lambda: client.get("/no/such/route", cast_to=object))
    assert "Invalid URL" in fault.message


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"temperature": 3}, "decimal_above_max_value", "temperature"),
        ({"max_completion_tokens": 0}, "integer_below_min_value", "max_completion_tokens"),
        ({"messages": []}, "empty_array", "messages"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "array_above_max_length", "stop"),
        ({"extra_body": {"temprature": 1}}, "unknown_parameter", "temprature"),
    ],
)
def test_a_bad_request_names_its_field(client, fields, code, param):
    request = {"model": "demo", "messages": QUESTION, **fields}
    fault = fault_of(openai.BadRequestError, lambda: client.chat.completions.create(**request))
    assert (fault.code, fault.param) == (code, param)


def test_a_job_is_checked_when_it_is_created(client):
    create = client.fine_tuning.jobs.create
    fault = fault_of(openai.BadRequestError, lambda: create(model="demo", training_file="file-0"))
    assert fault.param == "training_file"
    file = upload(client, b"{}\n")
    fault = fault_of(openai.BadRequestError, lambda: create(model="gpt", training_file=file.id))
    assert (fault.code, fault.param) == ("model_not_available", "model")
    for extension, param in [({"lora": {"rnak": 8}}, "lora.rnak"), ({"lora": {"rank": 0}}, None)]:
        request = {"model": "demo", "training_file": file.id, "extra_body": extension}
        fault = fault_of(openai.BadRequestError, lambda: create(**request))
        assert fault.param == (param or "lora.rank")


def test_a_file_that_is_no_jsonl_is_refused_with_its_line(client):
    fault = fault_of(openai.BadRequestError, lambda: upload(client, b'{"a": 1}\n{"a": \n'))
    assert fault.param == "file" and "2" in fault.message


def test_a_base_cannot_be_deleted(client):
    fault = fault_of(openai.PermissionDeniedError, lambda: client.models.delete("demo"))
    assert fault.code == "insufficient_permissions"


def test_replies_carry_their_request_id(client):
    reply = client.models.with_raw_response.list()
    assert reply.headers["x-request-id"].startswith("req_")
    assert reply.request_id == reply.headers["x-request-id"]
    assert int(reply.headers["openai-processing-ms"]) >= 0
    assert reply.parse().data[0].id == "demo"
    assert client.models.retrieve("demo")._request_id != reply.request_id


def test_the_first_key_ends_open_access(tmp_path):
    with Server(tmp_path / "data") as server:

        def models(key):
            base_url = f"{server.url}/v1"
            return openai.OpenAI(base_url=base_url, api_key=key, max_retries=0).models

        secret = server.keys("create", "--org", "org-a")
        other = server.keys("create", "--org", "org-b")
        assert secret.startswith("sk-") and secret != other
        fault = fault_of(openai.AuthenticationError, lambda: wait_until_refused(models("x")))
        assert fault.code == "invalid_api_key"
        assert [model.id for model in models(secret).list()] == ["demo"]

        a = openai.OpenAI(base_url=f"{server.url}/v1", api_key=secret, max_retries=0)
        b = openai.OpenAI(base_url=f"{server.url}/v1", api_key=other, max_retries=0)
        file = upload(a, b"{}\n")
        fault_of(openai.NotFoundError, lambda: b.files.retrieve(file.id))
        assert list(b.files.list()) == []


def wait_until_refused(models):
    """Open access must end within a second of the first key."""
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        models.list()
        time.sleep(0.1)
