"""A file of JSON lines that collects answers, which a command that was killed continues."""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

from etils import epath
from tqdm import tqdm

from calm_jax.checkpoints.files import (
    absolute,
    check_writable,
    is_bucket,
    read_json,
    storage,
    write_json,
    write_text,
)
from calm_jax.errors import CalmError
from calm_jax.text_files import parse_json

BEGINNING = b'{"index": '  # of every line


class AnswerFile:
    """Answers to prompts: a line for each, written as soon as it is answered, sorted at the end.

    What was asked stands beside it, in PATH.flags.json, so that no file has answers of two kinds.

    Args:
        path: the file, which need not exist.
        prompts: all prompts.
        n: answers to each.
        flags: the flags that answers depend on, by name, with values that JSON can hold.

    Attributes:
        done: indices of the prompts whose answers are in the file.

    Raises:
        CalmError: the file holds something else, was begun with other flags, is in a bucket, or
            cannot be read or written.
    """

    def __init__(
        self, path: epath.PathLike, prompts: Sequence[str], n: int, flags: Mapping[str, Any]
    ):
        self.path, self._prompts, self._n, self._flags = absolute(path), prompts, n, flags
        self._flags_path = self.path.with_name(f"{self.path.name}.flags.json")
        if is_bucket(self.path):
            raise CalmError(f"--output={path}: answers are written to disk, not to a bucket")
        self.done: set[int] = set()
        self._size = self._length = 0  # of the file, and of its whole lines, in bytes
        check_writable(self.path.parent)
        if self.path.exists():
            with storage("read", self.path):
                text = self.path.read_bytes()
            *lines, rest = text.split(b"\n")
            self._size = len(text)
            for number, line in enumerate(lines, start=1):
                self._check(line, number)
                self._length += len(line) + 1
            if not rest.startswith(BEGINNING[: len(rest)]):
                raise CalmError(
                    f"{self.path}: its last line is not an answer; give another --output"
                )
        if self.done and self._flags_path.exists():
            self._check_flags(read_json(self._flags_path, "the flags of a file of answers"))

    def _check_flags(self, before: Mapping[str, Any]) -> None:
        for name in sorted({*before, *self._flags}):
            old, new = (
                f"--{name}={values[name]}" if name in values else f"no --{name}"
                for values in (before, self._flags)
            )
            if old != new:
                raise CalmError(
                    f"{self.path} was begun with {old}, now there is {new}; give another --output"
                )

    def _check(self, line: bytes, number: int) -> None:
        record = parse_json(line, self.path, number)
        index = record.get("index") if isinstance(record, dict) else None
        if not isinstance(index, int) or index < 0 or "prompt" not in record:
            raise CalmError(
                f"{self.path}:{number}: not an answer with an index and a prompt; "
                "give another --output"
            )
        where = f"{self.path}: index {index}"
        if index >= len(self._prompts):
            raise CalmError(f"{where} is answered, but there are {len(self._prompts)} prompts")
        if index in self.done:
            raise CalmError(f"{where} is answered twice; give another --output")
        if record["prompt"] != self._prompts[index]:
            raise CalmError(
                f"{where} answers the prompt {record['prompt']!r}, not {self._prompts[index]!r}; "
                "give another --output"
            )
        reasons = record.get("finish_reasons", [record.get("finish_reason")])
        answers = record.get("answers", [record.get("answer")])
        if not isinstance(reasons, list) or not isinstance(answers, list):
            raise CalmError(f"{where} has no list of answers; give another --output")
        if "error" in reasons:
            raise CalmError(f"{where} has failed; remove its line to ask again")
        if len(answers) != self._n:
            raise CalmError(f"{where} has {len(answers)} answers, but --n is {self._n}")
        self.done.add(index)

    def fill(self, answers: Iterable[tuple[int, list[Any]]]) -> None:
        """Adds answers as they come, and shows how fast; sorts the file once all have come.

        Args:
            answers: indices of prompts, and the `Completion`s of each.

        Raises:
            CalmError: another command fills the file, or answers failed; these are in it too.
        """
        tokens, failed = 0, []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with (
            tqdm(
                total=len(self._prompts), initial=len(self.done), unit="answer", smoothing=0
            ) as progress,
            storage("write", self.path),
            open(self.path, "ab") as file,
        ):
            self._take(file)
            write_json(self._flags_path, self._flags)
            file.truncate(self._length)  # a kill may leave part of a line
            for index, of_prompt in answers:
                record = {"index": index, "prompt": self._prompts[index], **_said(of_prompt)}
                line = json.dumps(record, ensure_ascii=False) + "\n"
                file.write(line.encode("utf-8", errors="backslashreplace"))
                file.flush()
                failed += [(index, one.error) for one in of_prompt if one.error]
                tokens += sum(len(one.tokens) for one in of_prompt)
                rate = tokens / max(progress.format_dict["elapsed"], 1e-9)
                progress.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
                progress.update()
            lines = self.path.read_bytes().splitlines(keepends=True)
            lines.sort(key=lambda line: json.loads(line)["index"])
            write_text(self.path, b"".join(lines).decode())
        if failed:
            index, error = min(failed)
            raise CalmError(f"{self.path}: {len(failed)} answers failed, first {index}: {error}")

    def _take(self, file: BinaryIO) -> None:
        """Keeps other commands from writing to the file while this one does."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CalmError(f"{self.path}: another command is filling it") from None
        if os.fstat(file.fileno()).st_size != self._size:
            raise CalmError(f"{self.path}: another command has filled it meanwhile")


def _said(answers: list[Any]) -> dict[str, Any]:
    if len(answers) == 1:
        return {"answer": answers[0].text, "finish_reason": answers[0].finish_reason}
    return {
        "answers": [answer.text for answer in answers],
        "finish_reasons": [answer.finish_reason for answer in answers],
    }
