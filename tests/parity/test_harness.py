"""The same weights scored by lm-evaluation-harness' own `hf` model, the adapter, and a server.

Tasks of each kind, on files that are made here: nothing is fetched.
"""

import json

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra [harness]")
torch = pytest.importorskip("torch", reason="needs the extra [parity]")
pytest.importorskip("transformers", reason="needs the extra [parity]")

import tiny_models  # noqa: E402
import tiny_tokenizers  # noqa: E402
import yaml  # noqa: E402
from flax import nnx  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from servers import running  # noqa: E402

import calm_jax  # noqa: E402
from calm_jax.cli import evaluate as command  # noqa: E402
from calm_jax.data.vocabularies import load_vocabulary  # noqa: E402
from calm_jax.errors import CalmError  # noqa: E402
from calm_jax.evaluation import harness  # noqa: E402
from calm_jax.serving.parts import served_models  # noqa: E402

# The harness and its data sets warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("ignore")

CONTEXT = 64
DOCUMENTS = [
    {"inputs": "the first", "choices": [" dog", " the first dog", " d"], "answer": 1,
     "targets": " dog the", "text": "the first dog, the first " * 9},
    {"inputs": "Hello wor", "choices": ["ld", " the", "!"], "answer": 0,
     "targets": "ld", "text": "Hello world! äöü"},
    {"inputs": "a dog ", "choices": ["first", "dog dog", "1"], "answer": 2,
     "targets": "dog", "text": "x"},
    {"inputs": "1 + 1 =", "choices": [" 2", " 3", " 4"], "answer": 0,
     "targets": " 2", "text": "1 + 1 = 2\n2 + 2 = 4"},
]  # fmt: skip
KINDS = {
    "kind_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{inputs}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "kind_likelihood": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{inputs}}",
        "doc_to_target": "{{targets}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "kind_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
    "kind_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{inputs}}",
        "doc_to_target": "{{targets}}",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
BY_SERVER = ["kind_choice", "kind_likelihood", "kind_generation"]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")
        import datasets.config

        cache = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks in YAML."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS))
    for name, values in KINDS.items():
        task = {"task": name, "dataset_path": "json", "test_split": "train",
                "dataset_kwargs": {"data_files": str(data)}, **values}  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A frozen folder of a random model that says different things."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = load_vocabulary(tiny_tokenizers.llama3(folder / "tokenizer") / "tokenizer.json")
    decoder = tiny_models.decoder(1, "llama", vocab_size=vocabulary.size + -vocabulary.size % 8)
    for branch in (decoder.layers.attention.output, decoder.layers.mlp.down):
        branch.set_value(3 * branch.get_value())
    calm_jax.save_frozen(decoder, folder / "frozen", vocabulary=vocabulary)
    return folder / "frozen"


@pytest.fixture(scope="module")
def exported(frozen):
    calm_jax.export(frozen, frozen.parent / "huggingface")
    return frozen.parent / "huggingface"


def scored(model, tasks, names=KINDS, **options):
    return lm_eval.simple_evaluate(
        model, tasks=list(names), task_manager=TaskManager(include_path=str(tasks)),
        bootstrap_iters=0, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def theirs(exported, tasks):
    arguments = {"pretrained": str(exported), "dtype": "float32", "max_length": CONTEXT}
    return scored("hf", tasks, model_args=arguments, device="cpu", batch_size=1)


def check_same(ours, theirs, names=KINDS, tolerance=1e-4):
    """Equal answers, log-probabilities and scores."""
    said = set()
    for name in names:
        pairs = zip(ours["samples"][name], theirs["samples"][name], strict=True)
        for mine, other in pairs:
            assert mine["doc_id"] == other["doc_id"]
            for a, b in zip(mine["resps"], other["resps"], strict=True):
                a, b = a[0], b[0]
                if isinstance(a, str):
                    assert a == b
                    said.add(a)
                elif isinstance(a, float):
                    assert a == pytest.approx(b, rel=tolerance)
                else:
                    assert float(a[0]) == pytest.approx(float(b[0]), rel=tolerance)
                    assert str(a[1]) == str(b[1])
        scores = ours["results"][name]
        assert scores.keys() == theirs["results"][name].keys()
        for key, value in theirs["results"][name].items():
            if isinstance(value, float) and "stderr" not in key:
                assert scores[key] == pytest.approx(value, rel=tolerance), (name, key)
    assert len(said) > 1  # or any confusion would pass


def test_the_adapter_scores_as_hf_does(frozen, tasks, theirs):
    model = harness.HarnessModel(calm_jax.load(frozen), context=CONTEXT, batch_size=4)
    check_same(scored(model, tasks), theirs)


def test_the_server_scores_as_hf_does(frozen, exported, tasks, theirs):
    options = {"slots": 4, "max_length": 128, "prefill_chunk": 32, "cache_dtype": None}
    models = served_models(calm_jax.load(frozen), "anchor", options)
    with running(models) as here:
        arguments = {
            "model": "anchor",
            "base_url": f"{here.url}/v1/completions",
            "tokenizer": str(exported),
            "tokenized_requests": True,
            "num_concurrent": 1,
            "max_length": CONTEXT,
            "add_bos_token": True,  # as the tokenizer itself does
        }
        ours = scored("local-completions", tasks, BY_SERVER, model_args=arguments)
    check_same(ours, theirs, BY_SERVER)


def test_the_command(frozen, tasks, theirs, tmp_path, capsys):
    names = ["kind_choice", "kind_generation"]
    flags = [f"--model={frozen}", f"--harness={','.join(names)}", f"--include_path={tasks}"]
    flags += [f"--output={tmp_path}", f"--context={CONTEXT}"]
    assert command.main(flags) == 0
    printed = capsys.readouterr().out
    assert "|kind_choice" in printed and "acc_norm" in printed
    found = json.loads((tmp_path / "harness.json").read_text())[""]
    for name in names:
        for key, value in theirs["results"][name].items():
            if isinstance(value, float) and "stderr" not in key:
                assert found["results"][name][key] == pytest.approx(value)
    assert len(found["samples"]["kind_choice"]) == len(DOCUMENTS)


def test_a_pair_and_its_parts(frozen, tasks, theirs, tmp_path, capsys):
    anchor = calm_jax.load(frozen)
    config = calm_jax.CompositionConfig(every=2)  # an untrained bridge adds nothing
    composed = calm_jax.compose(anchor, anchor, config, rngs=nnx.Rngs(0))
    calm_jax.export_bridge(composed, tmp_path / "pair")
    flags = [f"--model={tmp_path / 'pair'}", "--harness=kind_choice", f"--include_path={tasks}"]
    assert command.main([*flags, "--parts", f"--output={tmp_path}", f"--context={CONTEXT}"]) == 0
    assert "anchor alone" in capsys.readouterr().out
    found = json.loads((tmp_path / "harness.json").read_text())
    assert found.keys() == {"", "anchor", "augment 0"}
    expected = theirs["results"]["kind_choice"]["acc,none"]
    assert {found[name]["results"]["kind_choice"]["acc,none"] for name in found} == {expected}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--harness=nothing"], "--harness=nothing: the harness has no such task"),
        (["--include_path=x"], "give --harness=TASK"),
        (["--harness=kind_choice", "--tasks=a.jsonl"], "--tasks is not for --harness"),
        (["--harness=kind_choice", "--seed=1"], "--seed is not for --harness"),
        (
            ["--harness=kind_generation", "--context=12"],
            "the answer may have 12 tokens|may have 12",
        ),
        (["--harness=kind_choice", "--parts"], "has no parts to score"),
    ],
)
def test_refusals(frozen, tasks, flags, message, tmp_path):
    path = (
        [] if any(flag.startswith("--include") for flag in flags) else [f"--include_path={tasks}"]
    )
    with pytest.raises(CalmError, match=message):
        command.main([f"--model={frozen}", *path, *flags, f"--output={tmp_path}"])


def test_without_the_extra(frozen, monkeypatch, tmp_path):
    import sys

    monkeypatch.delitem(sys.modules, "calm_jax.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(CalmError, match=r"--harness needs lm-evaluation-harness .*\[harness\]"):
        command.main([f"--model={frozen}", "--harness=a", f"--output={tmp_path}"])
