"""Pages: every item once, in order, and `has_more` that ends the SDK's own iteration."""

import openai
import pytest

from conftest import create_job, upload


def test_files_come_in_pages_without_gap_or_repeat(client):
    ids = [upload(client, b"{}\n", name=f"{number}.jsonl").id for number in range(5)]
    page = client.files.list(limit=2)
    assert [file.id for file in page.data] == [ids[4], ids[3]] and page.has_more
    rest = client.files.list(limit=2, after=ids[4])
    assert [file.id for file in rest.data] == [ids[3], ids[2]]
    everything = [file.id for file in client.files.list(limit=2, purpose="fine-tune")]
    assert [id for id in everything if id in ids] == ids[::-1]
    assert len(set(everything)) == len(everything)
    oldest_first = [file.id for file in client.files.list(limit=3, order="asc")]
    assert oldest_first == [file.id for file in client.files.list()][::-1]
    assert client.files.list(after=oldest_first[0]).has_more is False


def test_jobs_come_in_pages_and_by_metadata(client):
    ids = []
    for number in range(3):
        job = create_job(client, epochs=50, metadata={"list": "pages", "number": str(number)})
        client.fine_tuning.jobs.cancel(job.id)
        ids.append(job.id)
    found = client.fine_tuning.jobs.list(limit=1, metadata={"list": "pages"})
    assert [job.id for job in found] == ids[::-1]
    one = client.fine_tuning.jobs.list(metadata={"list": "pages", "number": "1"})
    assert [job.id for job in one] == [ids[1]]


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 101}, {"after": "ftjob-none"}])
def test_a_page_that_cannot_be_is_refused(client, query):
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.list(**query)
    assert caught.value.param == next(iter(query))
