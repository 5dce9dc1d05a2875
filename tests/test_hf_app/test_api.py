"""The running app through its API."""

import re
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from serve_app import CODE, HOSTILE, SAYS


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url, verbose=False)


@pytest.mark.parametrize(("said", "expected"), [("plain", SAYS["plain"][0]), ("stop", "Four."), ("near", SAYS["near"][0]),
    ("hostile", HOSTILE), ("code", CODE), ("scripts", SAYS["scripts"][0])])  # fmt: skip
def test_the_text_is_exact_grows_and_never_shows_a_stop(client, said, expected):
    job = client.submit(f"say {said}", max_new_tokens=512, api_name="/ask")
    assert job.result() == expected
    parts = [part for part in job.outputs() if part]
    assert not any(bad in part for part in parts for bad in ("Exercise 3", "Instruct:", "<|endoftext|>"))
    if said == "plain":
        assert len(set(parts)) >= 3 and all(late.startswith(early) for early, late in zip(parts, parts[1:], strict=False))


@pytest.mark.parametrize(("question", "given", "expected"), [("", {}, "empty"),
    ("Why?", {"temperature": 99}, "temperature is 99"), (7, {}, "The prompt is 7")])  # fmt: skip
def test_bad_input_through_the_api_is_a_readable_error(client, server, question, given, expected):
    with pytest.raises(AppError, match=re.escape(expected)):
        client.predict(question, api_name="/ask", **given)
    assert client.predict("say plain", api_name="/ask") == SAYS["plain"][0], "it lives on"
    assert "Traceback" not in server.log.read_text()


def test_only_ask_is_documented(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert list(endpoints) == ["/ask"]
    names = [parameter["parameter_name"] for parameter in endpoints["/ask"]["parameters"]]
    assert names == ["prompt", "model", "max_new_tokens", "sample", "temperature", "top_p", "seed", "stop"]


@pytest.mark.parametrize("path", ["/gradio_api/file=/etc/passwd", "/file=/etc/passwd"])
def test_files_of_the_machine_are_not_served(server, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(server.url + path)
    assert refused.value.code in (403, 404)


def test_a_client_that_is_killed_ends_its_generation(server):
    code = f"from gradio_client import Client; Client({server.url!r}, verbose=False).predict('say slow', max_new_tokens=512, api_name='/ask')"
    before = server.steps()
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while server.steps() < before + 5:
        assert caller.poll() is None
    caller.kill()
    assert server.idle_within(3), "it writes for nobody"
    assert server.steps() < before + 120


def test_the_second_waits_with_its_rank_and_a_full_queue_says_so(server, client):
    first = client.submit("say slow", max_new_tokens=512, api_name="/ask")
    while not first.outputs():
        time.sleep(0.05)
    second = Client(server.url, verbose=False).submit("say plain", api_name="/ask")
    while second.status().rank != 0:
        assert not second.done()
        time.sleep(0.05)
    crowd = [client.submit("say plain", api_name="/ask") for _ in range(40)]
    refusals = []
    while not refusals:
        refusals = [job.exception() for job in crowd if job.done()]
        time.sleep(0.05)
    assert "queue is full" in str(refusals[0]).lower(), refusals[0]
    for job in [first, *crowd]:
        job.cancel()
    assert second.result() == SAYS["plain"][0]
