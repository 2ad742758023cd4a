import gzip
import json

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from calm_jax.checkpoints.files import read_json
from calm_jax.errors import CalmError
from calm_jax.text_files import parse_json, read_lines

# Python's own `splitlines` ends a line at each of these.
NO_ENDS = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i\rj"
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
)


@given(st.lists(TEXTS.filter(lambda text: "\n" not in text and text[-1:] != "\r")))
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_what_was_written(tmp_path_factory, end, lines):
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes("".join(line + end for line in lines).encode())
    marked = [line.removeprefix("\ufeff") for line in lines[:1]] + lines[1:]
    assert list(read_lines(path)) == marked


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_only_line_feeds_end_a_line_and_the_mark_goes(tmp_path, name):
    data = f"\ufeff{NO_ENDS}\r\n\n{NO_ENDS}".encode()
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    assert list(read_lines(tmp_path / name)) == [NO_ENDS, "", NO_ENDS]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"a\nb\nc\xff\n", "a.txt:3: not UTF-8 text: it has the byte 0xff"),
        ("a.txt.gz", b"no gzip", "a.txt.gz: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "a.txt.gz: Compressed file ended"),
        ("a.txt", None, "a.txt: No such file"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CalmError) as caught:
        list(read_lines(tmp_path / name))
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


@given(VALUES, st.booleans())
def test_json_is_read_as_it_was_written(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_json(text, "a.json") == parse_json(text.encode(), "a.json") == value


def test_text_about_escapes_is_no_half_character():
    assert parse_json(r'"\\ud800 \ud83d\ude00"', "a.json") == "\\ud800 😀"


NOT_READ = {
    '{"a":\n1,}': "2: not JSON: ",
    '{"a":\n"b": 1}': "2: not JSON: Expecting ',' delimiter at column 4",
    '\n{"a": "\\ud800"}': "2: \\ud800 is half of a surrogate pair, not a character",
    '\n{"\\udc00": "\\ud83d\\ude00"}': "2: \\udc00 is half of a surrogate pair",
    '{"a":\n[' + "1" * 5_000 + "]}": "2: an integer of over 4,300 digits",
    '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}": "1: too deeply nested",
}


@pytest.mark.parametrize("text", NOT_READ, ids=lambda text: text[:20])
def test_what_json_allows_and_python_does_not(tmp_path, text):
    path = epath.Path(tmp_path / "a.json")
    path.write_text(text)
    with pytest.raises(CalmError) as caught:
        read_json(path, "a run")
    message = str(caught.value)
    assert message.startswith(f"{path}:{NOT_READ[text]}") and "\n" not in message
    with pytest.raises(CalmError, match=r"^a\.jsonl:1[01]: "):
        parse_json(text.encode(), "a.jsonl", 10)
