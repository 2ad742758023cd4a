import json

import pytest

from calm_jax.data import jsonl
from calm_jax.errors import CalmError

GOOD = '{"inputs": "1+1=", "targets": "2"}'


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_the_three_forms(tmp_path):
    chat = {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "So long"},
        ]
    }
    path = write(tmp_path / "a.jsonl", GOOD, '{"text": "élan"}', json.dumps(chat))
    first = "system: Be short.\nuser: Hi\nassistant: "
    assert list(jsonl.parse(path)) == [
        {"inputs": "1+1=", "targets": "2"},
        {"inputs": "", "targets": "élan"},
        {"inputs": first, "targets": "Hello"},
        {"inputs": f"{first}Hello\nuser: Bye\nassistant: ", "targets": "So long"},
    ]


BAD_LINES = {
    "": "empty",
    "   ": "empty",
    "not json": "not JSON",
    '{"inputs": "a", "targets": "b"': "delimiter at column 31",
    '{"text": "a",': "at column 14",
    "[1]": "not a JSON object but list",
    '{"inputs": "a"}': 'lacks "targets"',
    '{"targets": "a"}': 'lacks "inputs"',
    '{"inputs": "a", "targets": ""}': '"targets" is empty',
    '{"inputs": 1, "targets": "a"}': '"inputs" is not a string but int',
    '{"text": ""}': '"text" is empty',
    '{"prompt": "a"}': "has prompt",
    '{"messages": "a"}': '"messages" is not a list',
    '{"messages": [{"role": "user", "content": "a"}]}': "no turn of the assistant",
    '{"messages": [{"role": "assistant"}]}': 'lacks "content"',
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, data, line):
    from calm_jax.data import Vocabulary, open_source

    path = write(tmp_path / "bad.jsonl", GOOD, GOOD, line, GOOD)
    config = data({"jsonl": str(path)}, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(CalmError) as caught:
        open_source(config, "train", Vocabulary.bytes())
    assert str(caught.value).startswith(f"{path}:3: ")
    assert BAD_LINES[line] in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_an_entry_that_is_a_path_alone_shows_both_forms():
    from calm_jax.data.opening import check_entry

    with pytest.raises(CalmError) as caught:
        check_entry("train.jsonl", "train")
    assert str(caught.value) == (
        "data.train: 'train.jsonl' is not an entry; write ({'jsonl': 'file.jsonl'},) or "
        "({'task': 'name'},)"
    )


def test_a_file_without_lines_or_that_is_not_there(tmp_path, data):
    from calm_jax.data import Vocabulary, open_source

    def opened(name):
        config = data({"jsonl": str(tmp_path / name)}, cache_dir=str(tmp_path / "cache"))
        return open_source(config, "train", Vocabulary.bytes())

    write(tmp_path / "empty.jsonl")
    with pytest.raises(CalmError, match=r"empty\.jsonl: the file is empty"):
        opened("empty.jsonl")
    with pytest.raises(CalmError, match=r"missing\.jsonl: .*No such file"):
        opened("missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(CalmError, match=r"latin\.jsonl: .*utf-8"):
        opened("latin.jsonl")
