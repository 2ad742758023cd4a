import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from calm_jax.data import evaluation_examples, open_dataset
from calm_jax.data.entries import check_entry
from calm_jax.data.example_files import ExampleFiles
from calm_jax.data.vocabulary import ByteVocabulary
from calm_jax.errors import CalmError

GOOD = '{"inputs": "1+1=", "targets": "2"}'
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]
FIRST = "system: Be short.\nuser: Hi\nassistant: "
TURNS = [
    {"inputs": FIRST, "targets": "Hello"},
    {"inputs": f"{FIRST}Hello\nuser: Bye\nassistant: ", "targets": "So long"},
]


def write(path, *lines):
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    return path


def read(path, **entry):
    kind = "parquet" if str(path).endswith(".parquet") else "jsonl"
    return list(ExampleFiles({kind: str(path), **entry}).examples())


def test_the_forms_of_a_record(tmp_path):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    in_parts = [CHAT[0], {"role": "user", "content": parts}, *CHAT[2:]]
    weighed = [*CHAT[:2], {**CHAT[2], "weight": 0}, CHAT[3], {**CHAT[4], "weight": 1}]
    path = write(
        tmp_path / "a.jsonl",
        "\ufeff" + GOOD,
        '{"text": "é\u2028lan", "id": 7, "inputs": null}',
        {"prompt": "a", "completion": "b", "weight": 1},
        {"messages": CHAT},
        {"messages": in_parts, "tools": [], "chat_template_kwargs": {}},
        {"messages": weighed},
        {"prompt": CHAT[:3], "completion": CHAT[3:]},
        "",
        "  ",
    )
    assert read(path) == [
        {"inputs": "1+1=", "targets": "2"},
        {"inputs": "", "targets": "é\u2028lan"},
        {"inputs": "a", "targets": "b"},
        *TURNS,
        *TURNS,
        TURNS[1],
        TURNS[1],
    ]


def chat_of(**changes):
    return json.dumps({"messages": [CHAT[1], CHAT[2] | changes]})


BAD_LINES = {
    "": "the line is empty",
    "   ": "the line is empty",
    "not json": "not JSON",
    '{"inputs": "a", "targets": "b"': "delimiter at column 31",
    '{"text": "a",': "at column 14",
    '{"text": "\\ud800"}': r"\ud800 is half of a surrogate pair",
    '{"text": "a", "n": ' + "1" * 5_000 + "}": "an integer of over 4,300 digits",
    "[" * 100_000: "too deeply nested",
    "[1]": "not a JSON object but list",
    '{"inputs": "a"}': 'lacks "targets"',
    '{"targets": "a"}': 'lacks "inputs"',
    '{"inputs": "a", "targets": ""}': '"targets" is empty',
    '{"inputs": 1, "targets": "a"}': '"inputs" is not a string but int',
    '{"text": ""}': '"text" is empty',
    '{"prompt": "a"}': 'lacks "completion"',
    json.dumps({"prompt": CHAT, "completion": "b"}): '"prompt" is not a string but list',
    json.dumps({"prompt": CHAT, "completion": []}): "no turn of the assistant with a weight",
    json.dumps(
        {"prompt": CHAT, "completion": CHAT, "messages": CHAT}
    ): '"messages" and "prompt" are both there',
    '{"a": "b"}': "has a",
    '{"messages": "a"}': '"messages" is not a list',
    '{"messages": [{"role": "user", "content": "a"}]}': "no turn of the assistant",
    '{"messages": [{"role": "assistant"}]}': 'lacks "content"',
    '{"inputs": "a", "targets": "b", "text": "c"}': '"text" and "inputs" are both there; choose',
    '{"text": "a", "weight": 0.5}': '"weight" 0.5 of a record',
    '{"text": "a", "tools": [{}]}': '"tools" together with "text" is not supported',
    json.dumps({"messages": CHAT, "functions": [{}]}): '"functions" together with "messages"',
    json.dumps({"messages": CHAT, "tools": [{}]}): '"tools" needs a chat template',
    json.dumps({"messages": CHAT, "chat_template_kwargs": {"a": 1}}): "needs a chat template",
    chat_of(weight=0.5): '"weight" 0.5 of message 1 is neither 0 nor 1',
    chat_of(weight=0): "no turn of the assistant with a weight",
    chat_of(tool_calls=[{}]): '"tool_calls" of message 1 needs a chat template',
    chat_of(content=[{"type": "image_url"}]): "has a part 'image_url'; only text is read",
    json.dumps(
        {"messages": [{**CHAT[1], "weight": 1}, CHAT[2]]}
    ): "only turns of the assistant are trained on",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:40])
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, data, line):
    path = write(tmp_path / "bad.jsonl", GOOD, GOOD, line, GOOD)
    config = data({"jsonl": str(path)}, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(CalmError) as caught:
        open_dataset(config, "train", ByteVocabulary())
    assert str(caught.value).startswith(f"{path}:3: ") and "\n" not in str(caught.value)
    assert BAD_LINES[line] in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_columns_are_mapped_and_nothing_else_is_read(tmp_path):
    columns = {"inputs": "question", "targets": "text"}
    records = [{"question": "a", "text": "b", "messages": "c", "weight": 3}, {"question": "a"}]
    path = write(tmp_path / "a.jsonl", records[0])
    assert read(path, columns=columns) == [{"inputs": "a", "targets": "b"}]
    write(path, *records)
    with pytest.raises(CalmError, match=r'a\.jsonl:2: lacks "text", which "columns" names'):
        read(path, columns=columns)
    with pytest.raises(CalmError, match=r"'input': 'question'.* for one of messages, text, inputs"):
        read(path, columns={"input": "question"})


def test_files_are_told_apart_by_their_names_of_today(tmp_path):
    """Rows are cached by content, and two files may have one name and one content."""
    vocabulary = ByteVocabulary()
    data = {"length": 16, "pack": True, "limit": 0, "strict": False, "augment_length": 0}
    data["cache_dir"] = str(tmp_path / "cache")

    def names(*paths):
        for path in paths:
            path.parent.mkdir(exist_ok=True)
            write(path, GOOD)
        entries = tuple({"jsonl": str(path)} for path in paths)
        return open_dataset(data | {"validation": entries}, "validation", vocabulary).names

    assert names(tmp_path / "a.jsonl") == ["a"]
    assert names(tmp_path / "b.jsonl", tmp_path / "c.jsonl") == ["b", "c"]
    twice = [tmp_path / folder / "val.jsonl" for folder in ("en", "de", "fr")]
    assert names(*twice) == ["jsonl/val", "jsonl/val.2", "jsonl/val.3"]


def test_an_identity_is_the_same_after_json(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    found = ExampleFiles({"jsonl": str(path), "columns": {"inputs": "a", "targets": "b"}})
    assert json.loads(json.dumps(found.identity())) == found.identity()


def test_wildcards_and_gzip(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    lines = {name: f'{{"text": "{name}"}}\n' for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl")}
    for name, line in lines.items():
        (tmp_path / name).write_text(line)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "d"}\n'))

    def texts(pattern):
        return [example["targets"] for example in read(pattern)]

    assert texts(tmp_path / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert texts(tmp_path / "d.jsonl.gz") == ["d"]
    monkeypatch.chdir(tmp_path)
    assert texts("[b-z].jsonl*") == ["b.jsonl", "d"]
    assert texts("d*p/c.jsonl") == ["deep/c.jsonl"]
    (tmp_path / "[x].jsonl").write_text('{"text": "x"}')
    assert texts("[x].jsonl") == ["x"]
    with pytest.raises(CalmError, match=r"\*\*/c\.jsonl: \*\* is not supported"):
        texts("**/c.jsonl")
    with pytest.raises(CalmError, match=r"^no\*\.jsonl: no file matches, seen from /"):
        texts("no*.jsonl")


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    tools = [None, None]
    columns = {"messages": [CHAT, CHAT[1:3]], "source": ["x", "y"], "tools": tools}
    parquet.write_table(pyarrow.table(columns), path)
    short = {"inputs": "user: Hi\nassistant: ", "targets": "Hello"}
    assert read(path) == [*TURNS, short]
    assert evaluation_examples(str(path), "test", ByteVocabulary(), 2) == TURNS
    parquet.write_table(pyarrow.table({"q": ["a", "a"], "a": ["b", ""]}), path)
    with pytest.raises(CalmError, match=r'a\.parquet, row 2: "targets" is empty'):
        read(path, columns={"inputs": "q", "targets": "a"})
    with pytest.raises(CalmError, match=r'row 1: lacks "answer", which "columns" names'):
        read(path, columns={"inputs": "q", "targets": "answer"})
    with pytest.raises(CalmError, match=r"a\.parquet, row 1: lacks .*; has q, a"):
        read(path)
    path.write_text("no table")
    with pytest.raises(CalmError, match=r"^\S*a\.parquet: .*[Pp]arquet") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_an_entry_that_is_a_path_alone_shows_both_forms():
    with pytest.raises(CalmError) as caught:
        check_entry("train.jsonl", "train")
    assert str(caught.value) == (
        "data.train: 'train.jsonl' is not an entry; write ({'jsonl': 'file.jsonl'},) or "
        "({'task': 'name'},)"
    )


def test_a_file_without_lines_or_that_is_not_there(tmp_path, data):
    def opened(name):
        config = data({"jsonl": str(tmp_path / name)}, cache_dir=str(tmp_path / "cache"))
        return open_dataset(config, "train", ByteVocabulary())

    write(tmp_path / "empty.jsonl")
    with pytest.raises(CalmError, match=r"empty\.jsonl: the file is empty"):
        opened("empty.jsonl")
    with pytest.raises(CalmError, match=r"missing\.jsonl: .*No such file"):
        opened("missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n' + '{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(CalmError, match=r"latin\.jsonl:2: not UTF-8 text"):
        opened("latin.jsonl")
