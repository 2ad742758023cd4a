"""Tasks: which examples they have, and how their prompts are written."""

import dataclasses
import json
import os
import types
from pathlib import Path

import pytest
import task_folders

from calm_jax.errors import CalmError
from calm_jax.evaluation.tasks.prompts import TEMPLATES
from calm_jax.evaluation.tasks.registry import FAMILIES, open_tasks, place_of
from calm_jax.evaluation.tasks.task import Place


@pytest.fixture
def published():
    """The folder of published data sets."""
    if "CALM_TEST_DATA" not in os.environ:
        pytest.skip("CALM_TEST_DATA names no folder with published data sets")
    return Path(os.environ["CALM_TEST_DATA"]) / "data"


def prompt(task, number: int = 0, shots: int | None = None, seed: int = 0) -> str:
    drawn = task.drawn(shots, seed)
    return "".join(map(task.template.shot, drawn)) + task.template.ask(task.examples[number])


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("gsm8k", Place("gsm8k")),
        ("gsm8k:a/b", Place("gsm8k", (), "a/b")),
        ("mgsm/sw+th:a:b", Place("mgsm", ("sw", "th"), "a:b")),
        ("text:gs://bucket/a.txt", Place("text", (), "gs://bucket/a.txt")),
        ("calm_jax/key_value/tiny/math", None),
        ("text/mine.jsonl", None),
        ("gsm8k.jsonl", None),
        ("gs://bucket/a.jsonl", None),
    ],
)
def test_names(name, place):
    assert place_of(name) == place


def test_a_prompt_of_gsm8k(tmp_path):
    (task,) = open_tasks(f"gsm8k:{task_folders.gsm8k(tmp_path)}")
    assert prompt(task, shots=0) == "Question: test 0?\nAnswer:"
    text = prompt(task, 1, shots=2)
    first, second = task.drawn(2, 0)
    assert text == (
        f"Question: {first['question']}\nAnswer: {first['answer']}\n\n"
        f"Question: {second['question']}\nAnswer: {second['answer']}\n\n"
        "Question: test 1?\nAnswer:"
    )
    assert "<<" not in text and first["answer"].endswith(f"\n#### {first['targets']}")
    assert [example["targets"] for example in task.examples] == ["1", "2", "3"]


def test_shots_are_drawn_by_seed_from_what_is_never_scored(tmp_path):
    (task,) = open_tasks(f"gsm8k:{task_folders.gsm8k(tmp_path)}")
    assert len(task.drawn(None, 0)) == 8
    assert task.drawn(None, 0) == task.drawn(None, 0) != task.drawn(None, 1)
    assert all(example["question"].startswith("train") for example in task.drawn(9, 0))
    assert task.fingerprint(4, 0) != task.fingerprint(4, 1) != task.fingerprint(0, 1)
    with pytest.raises(CalmError, match=r"gsm8k: 10 shots .* the split .* has 9 examples"):
        task.drawn(10, 0)


def test_mgsm_has_the_labels_of_its_own_shots(tmp_path):
    tasks = open_tasks(f"mgsm/zh+de:{task_folders.mgsm(tmp_path)}")
    assert [task.name for task in tasks] == ["mgsm/zh", "mgsm/de"]  # in the paper's order
    chinese, german = tasks
    (shot,) = german.drawn(1, 0)
    number = int(shot["question"].split()[2])
    assert prompt(german, shots=1) == (
        f"Frage: Was ist {number} + 1?\n"
        f"Schritt-für-Schritt-Antwort: Die Antwort ist {number + 1}.\n\n"
        "Frage: Frage 0?\nSchritt-für-Schritt-Antwort:"
    )
    assert prompt(chinese, shots=0) == "问题：问题 0?\n逐步解答："
    assert german.template.stops(german.examples[0]) == ("\nFrage: ",)


def test_mgsm_without_shots_of_its_own_takes_english_ones(tmp_path):
    folder = task_folders.mgsm(tmp_path / "mgsm")
    (swahili,) = open_tasks(f"mgsm/sw:{folder}")
    assert prompt(swahili, shots=0) == "Question: Swali 0?\nAnswer:"
    with pytest.raises(CalmError, match="mgsm/sw has no split to draw --shots=8 from"):
        swahili.drawn(None, 0)
    task_folders.gsm8k(tmp_path / "gsm8k")
    (swahili,) = open_tasks(f"mgsm/sw:{folder}")
    assert swahili.drawn(None, 0)[0]["question"].startswith("train")


def test_the_last_documents_of_ntrex_are_kept_for_shots(tmp_path):
    tasks = open_tasks(f"ntrex:{task_folders.ntrex(tmp_path)}")
    # Those of the paper first, in its order; English in other words is no language to translate.
    assert [task.name for task in tasks] == ["ntrex/mar", "ntrex/pol", "ntrex/deu"]
    polish = tasks[1]
    # 56 lines less 50 are 6: the document of lines 4 to 7 goes whole to the shots.
    assert [example["source"] for example in polish.examples] == [f"pol {n}." for n in range(4)]
    assert [example["source"] for example in polish.pool] == [f"pol {n}." for n in range(4, 56)]
    assert prompt(polish, shots=0) == "Text: pol 0.\nEnglish:"
    assert polish.template.shot(polish.pool[0]) == "Text: pol 4.\nEnglish: Line 4.\n\n"
    assert [e["source"][4:] for e in polish.drawn(5, 3)] == [
        e["source"][4:] for e in tasks[0].drawn(5, 3)
    ]


def test_flores_is_scored_on_devtest(tmp_path):
    tasks = open_tasks(f"flores:{task_folders.flores(tmp_path)}")
    names = ["flores/ban_Latn", "flores/pol_Latn", "flores/acm_Arab", "flores/ace_Arab"]
    assert [task.name for task in tasks] == names
    assert tasks[1].examples[2] == {"source": "pol_Latn devtest 2", "targets": "eng_Latn devtest 2"}
    assert tasks[1].pool[5] == {"source": "pol_Latn dev 5", "targets": "eng_Latn dev 5"}


def test_code_tasks(tmp_path):
    (human,) = open_tasks(f"humaneval:{task_folders.human_eval(tmp_path / 'h')}")
    assert human.shots == 0 and prompt(human) == human.examples[0]["prompt"]
    (mbpp,) = open_tasks(f"mbpp:{task_folders.mbpp(tmp_path / 'm')}")
    assert [e["task_id"] for e in mbpp.examples] == [11, 12, 13, 14, 15]
    assert sorted(e["task_id"] for e in mbpp.drawn(10, 0)) == list(range(1, 11))
    assert mbpp.template.shot(mbpp.pool[1]) == (
        "You are an expert Python programmer, and here is your task: Add 2. Your code should pass "
        "these tests:\n\nassert f(1) == 3\n[BEGIN]\ndef f(x):\n  return x + 2\n[DONE]\n\n"
    )
    tasks = open_tasks(f"codexglue:{task_folders.codexglue(tmp_path / 'c')}")
    assert [task.name for task in tasks] == ["codexglue/python", "codexglue/ruby"]
    assert tasks[0].template.shot(tasks[0].pool[3]) == (
        "Code: def f ( ) : return 3\nDescription: Returns 3 .\n\n"
    )


def test_every_family_is_told_its_place():
    for family in FAMILIES:
        if family != "gsm8k":
            with pytest.raises(CalmError, match=f"^{family} needs .*: {family}:F"):
                open_tasks(family)


def test_tfds_is_not_asked_to_download(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    made = tfds.builder("gsm8k", data_dir=tmp_path / "tfds")
    monkeypatch.setattr(tfds, "builder", lambda name: made)
    with pytest.raises(CalmError, match=r"gsm8k: TFDS has not prepared it in .*gsm8k:FOLDER"):
        open_tasks("gsm8k")
    assert not list(tmp_path.rglob("*.tfrecord*"))


def test_what_tfds_has_prepared(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    import tensorflow as tf

    source = task_folders.gsm8k(tmp_path)

    def dataset(split):
        records = map(json.loads, (source / f"{split}.jsonl").read_text().splitlines())
        columns = {key: [] for key in ("question", "answer")}
        for record in records:
            for key, values in columns.items():
                values.append(record[key])
        return tf.data.Dataset.from_tensor_slices(columns)

    made = types.SimpleNamespace(is_prepared=lambda: True, as_dataset=dataset)
    monkeypatch.setattr(tfds, "builder", lambda name: made)
    assert open_tasks("gsm8k") == open_tasks(f"gsm8k:{source}")


def test_real_files(published):
    (gsm8k,) = open_tasks(f"gsm8k:{published / 'gsm8k'}")
    assert (len(gsm8k.examples), len(gsm8k.pool)) == (1319, 7473)
    assert gsm8k.examples[0]["targets"] == "18"
    mgsm = open_tasks(f"mgsm:{published / 'mgsm'}")
    order = "en te bn sw ja zh th fr es de ru"
    assert [task.name for task in mgsm] == [f"mgsm/{name}" for name in order.split(" ")]
    # The first problems of GSM8K's test, in which some commas stand.
    for task in mgsm:
        assert [e["targets"].replace(",", "") for e in task.examples] == [
            e["targets"].replace(",", "") for e in gsm8k.examples[:250]
        ]
    ntrex = open_tasks(f"ntrex:{published / 'ntrex'}")
    assert [task.name for task in ntrex[:4]] == ["ntrex/mar", "ntrex/nno", "ntrex/pol", "ntrex/tha"]
    assert len(ntrex) == 31
    assert {len(task.examples) + len(task.pool) for task in ntrex} == {1997}
    assert all(50 <= len(task.pool) < 100 for task in ntrex)
    (human,) = open_tasks(f"humaneval:{published / 'human_eval'}")
    (mbpp,) = open_tasks(f"mbpp:{published / 'mbpp'}")
    assert (len(human.examples), len(mbpp.examples), len(mbpp.pool)) == (164, 500, 10)
    for task in (gsm8k, *mgsm, *ntrex, human, mbpp):
        assert not {str(example) for example in task.pool} & {str(e) for e in task.examples}


@pytest.mark.parametrize("family", ["gsm8k", "mgsm", "ntrex", "flores", "humaneval", "mbpp",
                                    "codexglue"])  # fmt: skip
def test_the_folder_of_another_data_set(family, tmp_path):
    other = task_folders.gsm8k if family != "gsm8k" else task_folders.ntrex
    other(tmp_path)
    with pytest.raises(CalmError, match=rf"{tmp_path} is not a folder of .*: it has no .*; it has"):
        open_tasks(f"{family}:{tmp_path}")
    with pytest.raises(CalmError, match=r"nowhere is not a folder of .*: it does not exist"):
        open_tasks(f"{family}:{tmp_path / 'nowhere'}")


def spoiled(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("mgsm/fr", task_folders.mgsm, "has no fr for mgsm; it has sw, zh, de"),
        ("ntrex/pol+xxx", task_folders.ntrex, "has no xxx for ntrex; it has mar, pol, deu"),
        ("flores/fra_Latn", task_folders.flores, "has no fra_Latn for flores; it has ban_Latn"),
        ("codexglue/java", task_folders.codexglue, "has no java for codexglue; it has python, ru"),
        ("gsm8k/de", task_folders.gsm8k, "gsm8k has no languages; write gsm8k:PATH"),
        (
            "ntrex/pol",
            lambda f: spoiled(task_folders.ntrex(f), "newstest2019-ref.pol.txt", "a\nb\n"),
            "pol.txt has 2 lines, but .*eng.txt has 56: they are not translations line by line",
        ),
        (
            "flores/pol_Latn",
            lambda f: spoiled(task_folders.flores(f), "dev/pol_Latn.dev", "a\n"),
            "pol_Latn.dev has 1 lines, but .*eng_Latn.dev has 6",
        ),
        (
            "gsm8k",
            lambda f: spoiled(task_folders.gsm8k(f), "test.jsonl", '{"text": "a"}\n'),
            "test.jsonl:1 is none of GSM8K: no 'question' in it; has text",
        ),
        (
            "mgsm/de",
            lambda f: spoiled(task_folders.mgsm(f), "mgsm_de.tsv", "no tab\n"),
            "mgsm_de.tsv:1 is none of MGSM: not a question, a tab, a number",
        ),
        (
            "mgsm/de",
            lambda f: spoiled(task_folders.mgsm(f), "exemplars.py", "x = 1\n"),
            "exemplars.py has no table MGSM_EXEMPLARS",
        ),
        (
            "gsm8k",
            lambda f: spoiled(task_folders.gsm8k(f), "test.jsonl", ""),
            "gsm8k has no example",
        ),
    ],
)
def test_damaged_folders(name, make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(CalmError, match=message):
        open_tasks(f"{name}:{tmp_path}")


def test_a_missing_split(tmp_path):
    folder = task_folders.gsm8k(tmp_path)
    (folder / "train.jsonl").unlink()
    message = r"is not a folder of GSM8K: it has no train\.jsonl; it has test\.jsonl"
    with pytest.raises(CalmError, match=message):
        open_tasks(f"gsm8k:{folder}")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"inputs": "a", "choices": ["b"], "answer": 0}, "are not two texts or more"),
        ({"inputs": "a", "choices": ["b", "c"], "answer": "d"}, "'d' is none of the choices"),
        ({"inputs": "a", "choices": ["b", "c"], "answer": 2}, "2 is none of the 2 choices"),
        ({"inputs": "a", "answer": 2}, "no 'choices' in it; has inputs, answer"),
    ],
)
def test_bad_choices(record, message, tmp_path):
    task_folders.lines(tmp_path / "a.jsonl", [record])
    with pytest.raises(CalmError, match=rf"a.jsonl:1.*{message}"):
        open_tasks(f"choices:{tmp_path / 'a.jsonl'}")


def test_texts(tmp_path):
    task_folders.lines(tmp_path / "a.jsonl.gz", [{"text": "ä"}, {"text": "b\nc"}, {"text": ""}])
    (task,) = open_tasks(f"text:{tmp_path / 'a.jsonl.gz'}")
    assert task.name == "text/a" and [e["text"] for e in task.examples] == ["ä", "b\nc"]
    (tmp_path / "b.txt").write_bytes(b"ab\xff")
    with pytest.raises(CalmError, match=r"b\.txt: not UTF-8 text at byte 2"):
        open_tasks(f"text:{tmp_path / 'b.txt'}")


def test_templates_name_only_fields_of_their_examples(tmp_path):
    makers = (task_folders.gsm8k, task_folders.mgsm, task_folders.ntrex, task_folders.flores,
              task_folders.human_eval, task_folders.mbpp, task_folders.codexglue)  # fmt: skip
    names = ("gsm8k", "mgsm", "ntrex", "flores", "humaneval", "mbpp", "codexglue")
    for name, make in zip(names, makers, strict=True):
        for task in open_tasks(f"{name}:{make(tmp_path / name)}"):
            assert task.template in TEMPLATES.values()
            assert all(task.template.ask(example) for example in task.examples)
            assert all(task.template.shot(example) for example in task.pool)
            replaced = dataclasses.replace(task, examples=task.examples[:1])
            assert replaced.fingerprint(0, 0) != task.fingerprint(0, 0)
