"""`calm serve` as a process, and what it refuses to start with."""

import contextlib
import importlib.util
import json
import signal
import socket
import subprocess
import sys

import httpx
import pytest
import tiny_models
from child_processes import environment

import calm_jax
from calm_jax.__main__ import main
from calm_jax.data.vocabulary import ByteVocabulary
from calm_jax.errors import CalmError
from calm_jax.serving.running import bind


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "frozen"
    vocabulary = ByteVocabulary()
    decoder = tiny_models.decoder(vocab_size=vocabulary.size)
    # The end token is never the most probable one, so that a greedy answer is as long as asked.
    decoder.embedding[...] = decoder.embedding[...].at[vocabulary.eos_id].set(0)
    calm_jax.save_frozen(decoder, folder, vocabulary=vocabulary)
    return folder


@contextlib.contextmanager
def serving(frozen, *flags):
    """The process and its address."""
    command = [sys.executable, "-m", "calm_jax", "serve", f"--workdir={frozen}", "--port=0"]
    with subprocess.Popen(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        try:
            line = process.stdout.readline()
            assert " on http://127.0.0.1:" in line, process.stderr.read()
            yield process, line.split()[-1]
        finally:
            process.kill()


def test_a_server_that_is_still_loading_has_its_address():
    with contextlib.closing(bind("127.0.0.1", 0)) as loading:
        port = loading.getsockname()[1]
        with pytest.raises(CalmError, match=f"--port={port}: the address is not available"):
            bind("127.0.0.1", port).close()


def test_an_address_is_free_again_at_once():
    """Though connections that the server has closed stay known for a minute."""
    with contextlib.closing(bind("127.0.0.1", 0)) as bound:
        address = bound.getsockname()
        with socket.create_connection(address) as client:
            bound.accept()[0].close()
            assert client.recv(1) == b""
    bind(*address).close()


LONG = {"prompt": "a", "max_tokens": 20_000, "stream": True, "temperature": 0}
FLAGS = ["--max_length=32768", "--max_tokens=30000", "--name=tiny"]


def test_sigterm_lets_answers_end_and_refuses_new_ones(frozen):
    with serving(frozen, *FLAGS) as (process, url):
        body = {**LONG, "max_tokens": 1000}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as answer:
            events = answer.iter_lines()
            first = json.loads(next(events).removeprefix("data: "))
            assert first["model"] == "tiny"
            process.send_signal(signal.SIGTERM)
            while httpx.get(f"{url}/health").status_code == 200:
                continue
            refused = httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
            assert refused.headers["Retry-After"]
            assert [line for line in events if line][-1] == "data: [DONE]"
        assert process.wait(30) == 0
        assert process.stderr.read() == "stopping; answers still running: 1\n"


def test_a_second_sigterm_ends_at_once(frozen):
    with (
        serving(frozen, *FLAGS) as (process, url),
        httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=300) as answer,
    ):
        events = answer.iter_lines()  # a stream whose iterator is dropped hangs up
        next(events)
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/health").status_code == 200:
            continue
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 128 + signal.SIGTERM


def test_two_servers_cannot_have_one_port(frozen):
    with serving(frozen) as (process, url):
        again = [sys.executable, "-m", "calm_jax", "serve", f"--workdir={frozen}"]
        run = subprocess.run(
            [*again, f"--port={url.rpartition(':')[2]}"], capture_output=True, text=True
        )
        assert run.returncode == 2
        assert "the address is not available" in run.stderr
        assert len(run.stderr.splitlines()) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_missing_package_is_named(frozen, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    assert main(["serve", f"--workdir={frozen}"]) == 2
    message = "error: uvicorn is not installed: pip install 'calm_jax[serve]'\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--port=70000", "--port is 70000; it must be at most 65535"),
        ("--max_queue=-1", "--max_queue is -1; it must be at least 0"),
        ("--request_seconds=nan", "--request_seconds is nan; it must be above 0"),
        ("--slots=0", "slots is 0; it must be an integer of at least 1"),
        ("--cache_dtype=int3", "cache_dtype"),
    ],
)
def test_flags_that_mean_nothing(frozen, capsys, flag, message):
    assert main(["serve", f"--workdir={frozen}", flag]) == 2
    assert message in capsys.readouterr().err


def test_an_empty_key_is_refused(frozen, monkeypatch, capsys):
    monkeypatch.setenv("CALM_API_KEY", "")
    assert main(["serve", f"--workdir={frozen}"]) == 2
    assert capsys.readouterr().err.startswith("error: CALM_API_KEY is set and empty")


def test_a_model_without_a_vocabulary_is_refused(tmp_path, capsys):
    calm_jax.save_frozen(tiny_models.decoder(), tmp_path / "mute")
    assert main(["serve", f"--workdir={tmp_path / 'mute'}"]) == 2
    assert "mute has no vocabulary" in capsys.readouterr().err
