"""From two published models of different families to a trained pair, by the README's commands."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from calm_jax.__main__ import main
from calm_jax.data.vocabularies import load_vocabulary

CONFIG = pathlib.Path(__file__).parents[2] / "configs/own_models.py"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
GPT_J = {
    "architectures": ["GPTJForCausalLM"],
    "model_type": "gptj",
    "n_embd": 16,
    "n_layer": 4,
    "n_head": 2,
    "n_inner": 24,
    "rotary_dim": 4,
}


def publish(folder, config, vocabulary):
    """A random model of this config, as it would be published."""
    from calm_jax.checkpoints.convert.registry import find_family
    from calm_jax.checkpoints.convert.table import sizes
    from calm_jax.checkpoints.sources.source import Source

    config = config | {"vocab_size": vocabulary.size}
    family = find_family(Source(folder, "huggingface", {}, config))
    decoder = family.decoder_config(config, "config.json")
    random = np.random.default_rng(0)
    tensors = {
        name: (0.2 * random.normal(size=rule.source_shape(sizes(decoder)))).astype(np.float32)
        for rule in family.rules(decoder)
        for name in rule.names(decoder.num_layers)
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary.save(folder)


@pytest.mark.parametrize(
    "dtypes",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("--config.anchor_dtype=int8", "--config.augment_dtype=int4"),
    ],
)
def test_convert_train_generate(tmp_path, capsys, monkeypatch, dtypes):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CALM_CACHE", str(tmp_path / "cache"))
    vocabulary = load_vocabulary("key_value/tiny")
    for name, config in (("llama", LLAMA), ("gptj", GPT_J)):
        publish(tmp_path / name, config, vocabulary)
    assert main(["convert", "--source=llama", "--target=models/anchor"]) == 0
    assert main(["convert", "--source=gptj", "--target=models/augment", "--dtype=bfloat16"]) == 0
    examples = [
        {"inputs": f"{a}+{b}=", "targets": f"{(a + b) % 10}"} for a in range(9) for b in range(9)
    ]
    for name in ("train", "validation"):
        lines = "\n".join(map(json.dumps, examples))
        (tmp_path / f"{name}.jsonl").write_text(lines + "\n")
    arguments = [
        "train",
        f"--config={CONFIG}",
        "--workdir=runs/mine",
        "--config.anchor=models/anchor",
        "--config.augments=('models/augment',)",
        "--config.data.train=({'jsonl': 'train.jsonl'},)",
        "--config.data.validation=({'jsonl': 'validation.jsonl'},)",
    ]
    small = [
        "--config.data.length=16",
        "--config.train.batch_size=8",
        "--config.train.num_steps=4",
        "--config.train.validate_every=2",
        "--config.train.save_every=2",
        "--config.optimizer.warmup_steps=1",
    ]
    assert main([*arguments, *small, *dtypes]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--workdir=runs/mine"]) == 0
    assert "validation.jsonl: " in capsys.readouterr().out
    assert main(["generate", "--workdir=runs/mine", "--prompt=1+2=", "--max_new_tokens=3"]) == 0
    assert capsys.readouterr().out.startswith("1+2=")
    assert main(["convert", "--source=models/anchor", "--target=back", "--to=huggingface"]) == 0
    assert (tmp_path / "back" / "tokenizer.json").exists()
    assert main(["convert", "--source=runs/mine", "--target=pair", "--to=huggingface"]) == 0
    values = json.loads((tmp_path / "pair/config.json").read_text())
    assert (values["anchor"], values["augments"]) == (f"{tmp_path}/llama", [f"{tmp_path}/gptj"])
    card = (tmp_path / "pair/README.md").read_text()
    summary = json.loads((tmp_path / "runs/mine/evaluation/summary.json").read_text())
    assert f"- step: {summary['_run']['step']} of 4" in card
    score = summary["validation.jsonl"]["exact_match"]
    assert f"| composed | validation.jsonl | exact_match | {score:.4g} |" in card
