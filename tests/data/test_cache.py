import copy
import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from calm_jax.data import cache, evaluation_examples, open_dataset
from calm_jax.data.rows import RowWriter
from calm_jax.data.vocabulary import ByteVocabulary
from calm_jax.errors import CalmError

KEYS = (
    "decoder_input_tokens",
    "decoder_target_tokens",
    "decoder_loss_weights",
    "decoder_positions",
    "decoder_segment_ids",
    "decoder_causal_attention",
)


def all_rows(source):
    return source.batch(np.arange(len(source)))


def sequences(batch) -> list[tuple]:
    """Every segment of every row as its slice of each array; the segment's number left out."""
    found = []
    for row in range(len(batch["decoder_segment_ids"])):
        segments = batch["decoder_segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            (at,) = np.nonzero(segments == segment)
            assert (np.diff(at) == 1).all() and len(at)
            found.append(
                tuple(tuple(batch[key][row, at].tolist()) for key in KEYS if "segment" not in key)
            )
    return sorted(found)


def written_by_hand(examples, vocabulary) -> list[tuple]:
    """What each example must become, from the definitions alone."""
    rows = []
    for example in examples:
        prompt = vocabulary.encode(example["inputs"])
        answer = [*vocabulary.encode(example["targets"]), vocabulary.eos_id]
        targets = prompt + answer
        rows.append(
            (
                (vocabulary.bos_id, *targets[:-1]),
                tuple(targets),
                (0.0,) * len(prompt) + (1.0,) * len(answer),
                tuple(range(len(targets))),
                (1,) * (len(prompt) + 1) + (0,) * (len(answer) - 1),
            )
        )
    return sorted(rows)


@pytest.fixture(scope="module")
def examples(cache_dir, vocabulary):
    task = "calm_jax/key_value/tiny/augment"
    return evaluation_examples(task, "train", vocabulary, cache_dir=str(cache_dir))


@pytest.mark.parametrize("pack", [True, False])
def test_every_sequence_is_there_once_packed_or_not(data, vocabulary, examples, pack):
    batch = all_rows(open_dataset(data("augment", pack=pack), "train", vocabulary))
    assert sequences(batch) == written_by_hand(examples, vocabulary)
    types = {key: batch[key].dtype for key in KEYS}
    assert types.pop("decoder_loss_weights") == np.float32
    assert set(types.values()) == {np.dtype(np.int32)}
    padding = batch["decoder_segment_ids"] == 0
    for key in KEYS:
        assert batch[key].shape == (len(padding), 32)
        assert not batch[key][padding].any()
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()  # padding only at the end
    if pack:
        assert padding.mean() < 0.1
    else:
        assert len(padding) == len(examples)


def test_without_a_start_token_the_first_token_has_no_target(data, examples):
    vocabulary = ByteVocabulary()
    batch = all_rows(open_dataset(data("augment", length=64), "train", vocabulary))
    expected = []
    for example in examples:
        prompt, answer = vocabulary.encode(example["inputs"]), vocabulary.encode(example["targets"])
        ids = [*prompt, *answer, vocabulary.eos_id]
        of_prompt = max(len(prompt) - 1, 0)
        of_answer = len(ids) - 1 - of_prompt
        expected.append(
            (
                tuple(ids[:-1]),
                tuple(ids[1:]),
                (0.0,) * of_prompt + (1.0,) * of_answer,
                tuple(range(len(ids) - 1)),
                (1,) * (of_prompt + 1) + (0,) * (of_answer - 1),
            )
        )
    assert sequences(batch) == sorted(expected)


def test_tokens_without_an_embedding_row_are_named(data, vocabulary):
    """Also where a model with more rows has left the same rows in the cache."""
    lacking = copy.copy(vocabulary)
    lacking.rows = vocabulary.size
    whole = open_dataset(data("augment", length=40), "train", lacking)
    ids = all_rows(whole)["decoder_target_tokens"]
    largest = int(ids.max())
    lacking.rows = largest
    name = re.escape(repr(vocabulary.tokens()[largest]))
    message = rf"augment: token {largest} \({name}\) is outside the {largest} rows of the embedding"
    with pytest.raises(CalmError, match=message):
        open_dataset(data("augment", length=40), "train", lacking)


def test_loss_on_inputs_weighs_every_real_token(data, vocabulary):
    entry = {"task": "calm_jax/key_value/tiny/augment", "loss_on_inputs": True}
    batch = all_rows(open_dataset(data(entry), "train", vocabulary))
    assert (batch["decoder_loss_weights"] == (batch["decoder_segment_ids"] > 0)).all()


def test_a_mixture_is_read_as_its_tasks_at_their_shares(data, vocabulary):
    source = open_dataset(data("bridge", "augment"), "train", vocabulary)
    weights = {part.name.rpartition("/")[2]: part.weight for part in source.parts}
    assert weights == pytest.approx(
        {"bridge_math": 0.75, "bridge_num": 0.15, "bridge_subs": 0.1, "augment": 1.0}
    )


def test_too_long_sequences_are_cut_and_counted(data, vocabulary, examples, caplog):
    longest = max(len(row[0]) for row in written_by_hand(examples, vocabulary))
    too_long = sum(len(row[0]) > 8 for row in written_by_hand(examples, vocabulary))
    assert 0 < too_long < len(examples)
    message = (
        f"{too_long} of {len(examples)} examples are longer than data.length 8; "
        f"the longest has {longest} tokens"
    )
    for _ in range(2):  # once when it is built, and again when it is only read
        caplog.clear()
        batch = all_rows(open_dataset(data("augment", length=8), "train", vocabulary))
        assert message in caplog.text
    cut = sorted(tuple(part[:8] for part in row) for row in written_by_hand(examples, vocabulary))
    assert sequences(batch) == cut
    with pytest.raises(CalmError, match=f"{message}.*strict"):
        open_dataset(data("augment", length=8, strict=True), "train", vocabulary)


def test_strict_leaves_nothing_when_it_refuses(data, vocabulary, tmp_path):
    (tmp_path / "long.jsonl").write_text('{"inputs": "more than", "targets": "eight bytes"}\n')
    config = data(
        {"jsonl": str(tmp_path / "long.jsonl")}, length=8, strict=True, cache_dir=str(tmp_path)
    )
    with pytest.raises(CalmError, match=r"1 of 1 examples are longer than data\.length 8"):
        open_dataset(config, "train", ByteVocabulary())
    assert not list((tmp_path / "tokens").iterdir())


def test_text_longer_than_a_row_goes_on_in_further_rows(data, tmp_path, caplog):
    text = "far more than eight bytes"
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}) + "\n")
    config = data({"jsonl": str(tmp_path / "long.jsonl")}, length=8, strict=True)
    batch = all_rows(open_dataset(config, "train", ByteVocabulary()))
    trained = batch["decoder_target_tokens"][batch["decoder_loss_weights"] == 1]
    assert trained.tolist() == [*ByteVocabulary().encode(text)[1:], 1]
    assert len(batch["decoder_target_tokens"]) == 4 and not caplog.text


@pytest.mark.parametrize("loss_on_inputs", [False, True])
def test_answers_that_are_cut_off(data, tmp_path, caplog, loss_on_inputs):
    file = tmp_path / "long.jsonl"
    long, short = ({"inputs": text, "targets": "b"} for text in ("far more than eight", "a"))

    def opened(*records):
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        entry = {"jsonl": str(file), "loss_on_inputs": loss_on_inputs}
        config = data(entry, length=8, cache_dir=str(tmp_path))
        return open_dataset(config, "train", ByteVocabulary())

    opened(long, short)
    told = "1 of them before the answer begins" in caplog.text
    assert f"{file}: 1 of 2 examples are longer" in caplog.text and told != loss_on_inputs
    if loss_on_inputs:
        opened(long)
        return
    for _ in range(2):
        with pytest.raises(CalmError, match="none of its answers is left to train on"):
            opened(long)


def test_limit_takes_the_first_examples(data, vocabulary, examples):
    batch = all_rows(open_dataset(data("augment", limit=20), "train", vocabulary))
    assert sequences(batch) == written_by_hand(examples[:20], vocabulary)


def test_a_changed_file_is_read_anew(data, tmp_path):
    path = tmp_path / "a.jsonl"
    texts = []
    for text in ("one", "two"):
        path.write_text(f'{{"text": "{text}"}}\n')
        batch = all_rows(open_dataset(data({"jsonl": str(path)}), "train", ByteVocabulary()))
        texts.append(ByteVocabulary().decode(batch["decoder_input_tokens"][0].tolist()))
    assert texts == ["one", "two"]


def test_a_folder_that_cannot_be_written_is_named(data, vocabulary, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CalmError, match=f"cache_dir {tmp_path}/file"):
        open_dataset(data("augment", cache_dir=f"{tmp_path}/file"), "train", vocabulary)


def test_two_that_build_at_once_end_with_one_folder(data, vocabulary, monkeypatch):
    write, config = cache.write_part, data("anchor", limit=30)

    def write_second(*arguments):
        monkeypatch.setattr(cache, "write_part", write)
        open_dataset(config, "train", vocabulary)  # the other process is done before this one is
        return write(*arguments)

    monkeypatch.setattr(cache, "write_part", write_second)
    source = open_dataset(config, "train", vocabulary)
    assert len(source)
    assert not list((cache.cache_directory(config["cache_dir"]) / "tokens").glob("*incomplete*"))


def run(program: str, config: dict) -> subprocess.CompletedProcess:
    program = f"config = {config!r}\n" + textwrap.dedent(program)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ}
    )


def test_a_ready_cache_is_read_without_tensorflow(data, vocabulary):
    config = data("bridge", "augment")
    open_dataset(config, "train", vocabulary)
    done = run(
        """
        import sys
        from calm_jax.data import Stream, batches_once, load_vocabulary, open_dataset
        source = open_dataset(config, "train", load_vocabulary("key_value/tiny"))
        next(Stream(source, batch_size=8, seed=0).iterate(3))
        next(batches_once(source, 8))
        loaded = {"tensorflow", "seqio", "tensorflow_datasets"} & set(sys.modules)
        assert not loaded, loaded
        """,
        config,
    )
    assert done.returncode == 0, done.stderr


def test_a_build_that_is_killed_leaves_nothing_that_loads(data, vocabulary, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "some text"}\n' * 9)
    config = data({"jsonl": str(path)}, cache_dir=str(tmp_path / "cache"))
    killed = run(
        """
        import os, signal
        from calm_jax.data import open_dataset
        from calm_jax.data.vocabulary import ByteVocabulary
        from calm_jax.data.rows import RowWriter
        append = RowWriter.append
        def append_and_die(self, rows):
            append(self, rows)
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        RowWriter.append = append_and_die
        open_dataset(config, "train", ByteVocabulary())
        """,
        config,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list((tmp_path / "cache" / "tokens").glob("*.incomplete.*/0/targets.npy"))
    assert not list((tmp_path / "cache").rglob("index.json"))
    source = open_dataset(config, "train", ByteVocabulary())
    assert len(sequences(all_rows(source))) == 9


def test_a_full_disk_is_one_line_and_leaves_nothing(data, tmp_path, monkeypatch):
    def full(self, rows):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RowWriter, "append", full)
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n')
    config = data({"jsonl": str(tmp_path / "a.jsonl")}, cache_dir=str(tmp_path))
    with pytest.raises(CalmError, match=f"cache_dir {tmp_path}: No space left on device"):
        open_dataset(config, "train", ByteVocabulary())
    assert not list((tmp_path / "tokens").iterdir())
