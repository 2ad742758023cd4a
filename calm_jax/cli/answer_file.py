"""A file of JSON lines that collects answers, which a command that was killed continues."""

import json
from collections.abc import Iterator, Mapping, Sequence
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
)
from calm_jax.errors import CalmError
from calm_jax.text_files import parse_json

BEGINNING = b'{"index": '  # of every line


class AnswerFile:
    """Answers to prompts, in their order: line i is the answer to prompt i.

    What was asked stands beside it, in PATH.flags.json, so that no file has answers of two kinds.

    Args:
        path: the file, which need not exist.
        prompts: all prompts.
        n: answers to each.
        flags: the flags that answers depend on, by name, with values that JSON can hold.

    Attributes:
        done: number of prompts whose answers are in the file.

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
        self.done = self._length = 0
        check_writable(self.path.parent)
        if self.path.exists():
            with storage("read", self.path):
                *lines, rest = self.path.read_bytes().split(b"\n")
            for line in lines:
                self._check(line)
                self.done += 1
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

    def _check(self, line: bytes) -> None:
        index = self.done
        record = parse_json(line, self.path, index + 1)
        where = f"{self.path}: index {index}"
        if not isinstance(record, dict) or record.get("index") != index or "prompt" not in record:
            raise CalmError(f"{where} is not in line {index + 1}; give another --output")
        if index >= len(self._prompts):
            raise CalmError(f"{where} is answered, but there are {index} prompts")
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
            raise CalmError(f"{where} has failed; remove its line and all later ones to ask again")
        if len(answers) != self._n:
            raise CalmError(f"{where} has {len(answers)} answers, but --n is {self._n}")

    def _opened(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return open(self.path, "ab")

    def fill(self, answers: Iterator[list[Any]]) -> None:
        """Adds the answers to all prompts from `done` on as they come, and shows how fast.

        Args:
            answers: for each prompt its `Completion`s.
        """
        total, tokens, failed = len(self._prompts), 0, []
        with (
            tqdm(total=total, initial=self.done, unit="answer", smoothing=0) as progress,
            storage("write", self.path),
            self._opened() as file,
        ):
            write_json(self._flags_path, self._flags)
            file.truncate(self._length)  # a kill may leave part of a line
            for of_prompt in answers:
                record = {"index": self.done, "prompt": self._prompts[self.done]}
                record |= _said(of_prompt)
                line = json.dumps(record, ensure_ascii=False) + "\n"
                file.write(line.encode("utf-8", errors="backslashreplace"))
                file.flush()
                failed += [(self.done, one.error) for one in of_prompt if one.error]
                self.done += 1
                tokens += sum(len(one.tokens) for one in of_prompt)
                rate = tokens / max(progress.format_dict["elapsed"], 1e-9)
                progress.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
                progress.update()
        if failed:
            index, error = failed[0]
            raise CalmError(f"{self.path}: {len(failed)} answers failed, first {index}: {error}")


def _said(answers: list[Any]) -> dict[str, Any]:
    if len(answers) == 1:
        return {"answer": answers[0].text, "finish_reason": answers[0].finish_reason}
    return {
        "answers": [answer.text for answer in answers],
        "finish_reasons": [answer.finish_reason for answer in answers],
    }
