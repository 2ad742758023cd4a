"""Small folders of every task, in the form in which their authors distribute them."""

import gzip
import json
from pathlib import Path


def _exemplars() -> str:
    """A module such as MGSM's, which has a table among other things, with texts in pieces."""
    table = {
        "de": {
            str(n): {"q": f"Frage: Was ist {n} + 1?",
                     "a": f"Schritt-für-Schritt-Antwort: Die Antwort ist {n + 1}."}
            for n in range(1, 9)
        },
        "zh": {
            str(n): {"q": f"问题：{n} + 1 是多少？", "a": f"逐步解答：答案是 {n + 1}。"}
            for n in range(1, 9)
        },
    }  # fmt: skip
    parted = repr(table).replace("Die Antwort", "Die' ' Antwort")
    return f'"""Prompts."""\nEXEMPLAR_NUMBER_ANSWERS = [2]\nMGSM_EXEMPLARS = {parted}'


def lines(path: Path, records) -> None:
    """JSON lines, gzipped where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def texts(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))


def gsm8k(folder: Path, train: int = 9, test: int = 3) -> Path:
    for split, count in (("train", train), ("test", test)):
        records = [
            {
                "question": f"{split} {n}?",
                "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}",
            }
            for n in range(count)
        ]
        lines(folder / f"{split}.jsonl", records)
    return folder


def mgsm(folder: Path) -> Path:
    for language, word in (("de", "Frage"), ("zh", "问题"), ("sw", "Swali")):
        texts(folder / f"mgsm_{language}.tsv", [f"{word} {n}?\t{n}" for n in range(3)])
    texts(folder / "exemplars.py", _exemplars().splitlines())
    return folder


def ntrex(folder: Path, count: int = 56) -> Path:
    texts(folder / "newstest2019-src.eng.txt", [f"Line {n}." for n in range(count)])
    for language in ("pol", "mar", "deu", "eng-GB"):
        name = f"newstest2019-ref.{language}.txt"
        texts(folder / name, [f"{language} {n}." for n in range(count)])
    # Documents of four lines each: the last 50 lines begin within one.
    texts(folder / "DOCUMENT_IDS.tsv", [f"document {n // 4}" for n in range(count)])
    return folder


def flores(folder: Path) -> Path:
    for split, count in (("dev", 6), ("devtest", 3)):
        for name in ("eng_Latn", "pol_Latn", "ban_Latn", "acm_Arab", "ace_Arab"):
            rows = [f"{name} {split} {n}" for n in range(count)]
            texts(folder / split / f"{name}.{split}", rows)
    return folder


def human_eval(folder: Path) -> Path:
    lines(
        folder / "HumanEval.jsonl.gz",
        [
            {
                "task_id": f"HumanEval/{n}",
                "prompt": f'def add(x):\n    """Adds {n}."""\n',
                "entry_point": "add",
                "canonical_solution": f"    return x + {n}\n",
                "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
            }
            for n in range(3)
        ],
    )
    return folder


def mbpp(folder: Path) -> Path:
    lines(
        folder / "mbpp.jsonl",
        [
            {
                "task_id": n,
                "text": f"Add {n}.",
                "code": f"def f(x):\r\n  return x + {n}",
                "test_setup_code": "",
                "test_list": [f"assert f(1) == {n + 1}"],
                "challenge_test_list": [],
            }
            for n in range(1, 16)
        ],
    )
    return folder


def codexglue(folder: Path) -> Path:
    for language in ("ruby", "python"):
        for split in ("train", "valid", "test"):
            records = [
                {
                    "code": f'def f():\n  """Returns {n}."""\n  return {n}',
                    "code_tokens": ["def", "f", "(", ")", ":", "return", str(n)],
                    "docstring_tokens": ["Returns", str(n), "."],
                }
                for n in range(4)
            ]
            lines(folder / "dataset" / language / f"{split}.jsonl", records)
    return folder


def choices(path: Path) -> Path:
    lines(
        path,
        [
            {"inputs": "The sky is", "choices": ["blue", "very red"], "answer": 0},
            {"inputs": "Grass is", "choices": ["blue", "green"], "answer": "green"},
        ],
    )
    return path


def text(path: Path) -> Path:
    texts(path, ["A text of a few words,", "äöü, and more."])
    return path


def own(path: Path) -> Path:
    lines(path, [{"inputs": f"{n} + 1 =", "targets": f" {n + 1}"} for n in range(3)])
    return path


def every_task(root: Path) -> str:
    """All of them, as --tasks takes them."""
    return ",".join(
        [
            f"gsm8k:{gsm8k(root / 'gsm8k')}",
            f"mgsm/de+zh:{mgsm(root / 'mgsm')}",
            f"ntrex/pol+mar:{ntrex(root / 'ntrex')}",
            f"flores/pol_Latn:{flores(root / 'flores')}",
            f"humaneval:{human_eval(root / 'human_eval')}",
            f"mbpp:{mbpp(root / 'mbpp')}",
            f"codexglue:{codexglue(root / 'codexglue')}",
            f"choices:{choices(root / 'colours.jsonl')}",
            f"text:{text(root / 'words.txt')}",
            str(own(root / "own.jsonl")),
        ]
    )
