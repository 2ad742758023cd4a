"""A run whose anchor reads bytes and whose augment reads words of a tokenizer of its own."""

import json
import re

import jax
import numpy as np
import pytest
import tiny_models
import tokenizers

from calm_jax import sharding
from calm_jax.checkpoints import frozen
from calm_jax.checkpoints.composed import load_composed
from calm_jax.data import own_tokens
from calm_jax.data.entries import open_dataset
from calm_jax.data.tokenizer_files import TokenizerFiles
from calm_jax.data.tokenizer_vocabulary import TokenizerVocabulary
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.decoding import Generator, Sampling
from calm_jax.errors import CalmError
from calm_jax.evaluation.runner import evaluate
from calm_jax.models import CompositionConfig, Inputs
from calm_jax.planning import planner
from calm_jax.planning.ideal import ideal_flops
from calm_jax.training import configuration, loop
from calm_jax.training.abstract_run import abstract_parts, decoder_configs
from calm_jax.training.run_model import composition_configs, load_run_model

# Names that only their tokens tell apart at once: each is one token of the augment.
NAMES = [a + b + c for a in "kl" for b in "ae" for c in "st"]
CONFIG = CompositionConfig(connections=((0, 1), (1, 1)), num_heads=4)


def words(names=NAMES, **published):
    """Byte-level BPE in which each name is a token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", name[0]) for name in names] + [("Ġ" + n[0], n[1]) for n in names]
    merges += [("Ġ" + n[:2], n[2]) for n in names]
    merges = list(dict.fromkeys(merges))
    tokens = ["<s>", "</s>", *alphabet, *map("".join, merges)]
    model = tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    files = {"tokenizer_config.json": json.dumps(published).encode()} if published else {}
    return TokenizerVocabulary(tokenizer.to_str(), 0, 1, published=TokenizerFiles("", files))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Frozen models, and data whose answer is a digit that depends on the name."""
    folder = tmp_path_factory.mktemp("own_tokens")
    random = np.random.default_rng(0)
    value = dict(zip(NAMES, random.integers(10, size=len(NAMES)), strict=True))
    with open(folder / "data.jsonl", "w") as file:
        for number in range(200):
            name = NAMES[number % len(NAMES)]
            record = {"inputs": f"Who is {name}? ", "targets": str(value[name])}
            file.write(json.dumps(record) + "\n")
    vocabulary = words()
    anchor = tiny_models.decoder(0, "llama", vocab_size=264, num_layers=2)
    augment = tiny_models.decoder(1, vocab_size=vocabulary.size, num_layers=2, embed_dim=16)
    # To the anchor all letters are the same, so only the augment can tell names apart.
    rows = np.array(anchor.embedding[...])
    letters = load_vocabulary("bytes").encode("abcdefghijklmnopqrstuvwxyz")
    rows[letters] = rows[letters[0]]
    anchor.embedding.set_value(jax.numpy.asarray(rows))
    frozen.save_frozen(anchor, folder / "anchor", vocabulary=load_vocabulary("bytes"))
    frozen.save_frozen(augment, folder / "augment", vocabulary=vocabulary)
    frozen.save_frozen(augment, folder / "alike", vocabulary=load_vocabulary("bytes"))
    return folder


def run_config(shared, **data):
    config = configuration.composed_run(CONFIG)
    config.anchor, config.augments = str(shared / "anchor"), (str(shared / "augment"),)
    config.data.train = ({"jsonl": str(shared / "data.jsonl")},)
    config.data.validation = config.data.train
    config.data.update(length=48, cache_dir=str(shared / "cache"), **data)
    config.optimizer.update(learning_rate=1e-2, schedule="constant", warmup_steps=2)
    config.train.update(batch_size=16, num_steps=60, log_every=5, validate_every=0, save_every=0)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    return config


@pytest.fixture(scope="module")
def trained(shared):
    config = run_config(shared, augment_length=24)
    loop.train(config, shared / "run")
    return shared / "run"


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_what_only_the_augment_can_know(trained):
    last = [line for line in metrics(trained) if line["split"] == "validation"][-1]
    assert last["exact"] > 0.9
    alone = next(line for line in metrics(trained) if line["split"] == "anchor")
    assert alone["exact"] < 0.3


def test_a_stopped_run_continues_as_if_it_had_not(shared, trained, tmp_path):
    config = run_config(shared, augment_length=24)
    config.train.num_steps = 3
    loop.train(config, tmp_path / "run")
    config.train.num_steps = 5
    loop.train(config, tmp_path / "run")
    losses = [
        next(
            line["loss"] for line in metrics(run) if line["step"] == 5 and line["split"] == "train"
        )
        for run in (trained, tmp_path / "run")
    ]
    assert losses[1] == losses[0]


def test_a_trained_pair_is_restored(shared, trained):
    """Its loss on the rows that it was trained on is that of the run's last validation."""
    pair = load_composed(trained)
    assert pair.own_tokens == (True,)
    found = own_tokens.alignments(pair.vocabulary, [pair.augments[0].vocabulary])
    name = NAMES[7]
    rows = [pair.vocabulary.encode(f"Who is {name}? ")]
    logits = pair(Inputs.of_batch(own_tokens.batch(found, rows)))
    asked = [json.loads(line) for line in (shared / "data.jsonl").read_text().splitlines()]
    answer = next(one["targets"] for one in asked if name in one["inputs"])
    assert pair.vocabulary.decode([int(logits[0, -1].argmax())]) == answer


def test_a_trained_pair_and_its_parts_are_evaluated(shared, trained, tmp_path):
    """Each part is asked in its own tokens; the pair alone knows the answers. On a mesh too."""
    mesh = {"data": 2, "tensor": 2, "fsdp": 2}
    summary = evaluate(trained, parts=True, limit=8, batch_size=4, mesh=mesh, output=tmp_path)
    (scores,) = (of for name, of in summary.items() if not name.startswith("_"))
    assert scores["exact_match"] > 90
    parts = summary["_parts"]
    assert set(parts) == {"anchor", "augment 0"}
    assert all(one["exact_match"] < 30 for of in parts.values() for one in of.values())
    (file,) = (tmp_path / "augment_0").glob("*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    augment = frozen.load(shared / "augment")
    generator = Generator(augment, max_length=64, slots=4)
    texts = [record["inputs"] for record in records]
    said = generator.generate(texts, Sampling(max_new_tokens=32))
    own = [augment.vocabulary.decode_after(augment.vocabulary.encode_sequence(text), one.tokens)
           for text, (one,) in zip(texts, said, strict=True)]  # fmt: skip
    assert [record["prediction"] for record in records] == own and any(own)


def test_an_augment_is_computed_as_its_own_rows_need(shared):
    """Its rows are longer than the anchor's, in a run as in its plan."""
    config = run_config(shared, augment_length=2048)
    device, mesh = jax.devices()[0], sharding.make_mesh(config.mesh)
    run = load_run_model(config, mesh)
    planned = abstract_parts(config, device).structure
    for model in (run.parts.merge(run.trainable, run.frozen), planned.merge(planned.abstract())):
        assert model.anchor.execution.attention == "xla"
        assert model.augments[0].execution.attention == "chunked"


@pytest.mark.parametrize("pack", [True, False])
def test_rows_hold_the_same_sequences_in_both_tokens(shared, pack):
    data = run_config(shared, augment_length=24, pack=pack).data
    anchor, augment = load_vocabulary("bytes"), words()
    batch = open_dataset(data, "train", anchor, [augment]).batch(np.arange(4))
    inputs = Inputs.of_batch(batch)
    own = inputs.of_augment(0)
    (alignment,) = own_tokens.alignments(anchor, [augment]).values()
    assert batch["decoder_segment_ids"].max() == (2 if pack else 1)
    for row in range(4):
        for segment in range(1, batch["decoder_segment_ids"][row].max() + 1):
            (at,) = np.nonzero(inputs.segments_BT[row] == segment)
            (own_at,) = np.nonzero(own.segments_BT[row] == segment)
            ids, prompt = inputs.tokens_BT[row, at], int(inputs.prompt_mask_BT[row, at].sum())
            (expected,) = alignment.align([ids.tolist()], [prompt])
            assert own.tokens_BT[row, own_at].tolist() == expected.ids
            assert (own.order_BT[row, own_at] - at[0]).tolist() == expected.order
            assert own.positions_BT[row, own_at].tolist() == list(range(len(own_at)))
            is_prompt = [int(order < prompt) for order in expected.order]
            assert own.prompt_mask_BT[row, own_at].tolist() == is_prompt
    assert augment.token_id(f"Ġ{NAMES[0]}") in own.tokens_BT[0]


def test_the_cache_follows_the_tokenizer_of_the_augment(shared):
    data, anchor = run_config(shared).data, load_vocabulary("bytes")
    alone = open_dataset(data, "train", anchor).fingerprint
    assert open_dataset(data, "train", anchor, [anchor]).fingerprint == alone
    first = open_dataset(data, "train", anchor, [words()]).fingerprint
    assert first != alone
    assert open_dataset(data, "train", anchor, [words(NAMES[:-1])]).fingerprint != first


def test_sequences_longer_than_the_rows_of_an_augment(shared, caplog):
    anchor, augment = load_vocabulary("bytes"), words()
    data = run_config(shared, augment_length=6).data
    batch = open_dataset(data, "train", anchor, [augment]).batch(np.arange(3))
    assert (batch["augment_0_segment_ids"] == 1).all()
    message = r"200 of 200 examples are longer than data.augment_length 6 .* the longest has 10 tok"
    assert re.search(message, caplog.text)
    with pytest.raises(CalmError, match=message):
        open_dataset(
            run_config(shared, augment_length=6, strict=True).data, "train", anchor, [augment]
        )


def test_what_cannot_be_trained_is_refused(shared, tmp_path, capsys):
    def refused(message, **changes):
        config = run_config(shared)
        for key, value in changes.items():
            config[key] = value
        with pytest.raises(CalmError, match=message):
            loop.train(config, tmp_path / "run")

    short = tmp_path / "short"
    model = frozen.load(shared / "augment")
    frozen.save_frozen(model, short, vocabulary=words(model_max_length=32))
    too_few = "augment 0 reads at most 32 tokens .* rows have 48; set data."
    refused(f"{too_few}augment_length to 32", augments=(str(short),))
    refused(f"{too_few}length to 32", anchor=str(short), augments=(str(short),))
    small = tmp_path / "small"
    frozen.save_frozen(tiny_models.decoder(vocab_size=64), small)
    refused("the anchor .* has no vocabulary", anchor=str(small), vocabulary="bytes")
    (tmp_path / "lacking.jsonl").write_text('{"inputs": "ab", "targets": "c"}\n')
    config = run_config(shared)
    few = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "</s>": 1}, []))
    lacking = tmp_path / "lacking"
    frozen.save_frozen(model, lacking, vocabulary=TokenizerVocabulary(few.to_str(), None, 1))
    data = config.data
    data.train = data.validation = ({"jsonl": str(tmp_path / "lacking.jsonl")},)
    refused(
        "jsonl/lacking: augment 0's tokenizer has no token for 'b'",
        augments=(str(lacking),),
        data=data,
    )
    assert capsys.readouterr().err.endswith("\n")  # the message is not written behind a bar
    data = run_config(shared, augment_length=24).data
    refused("no augment has another tokenizer", augments=(str(shared / "alike"),), data=data)
    probed = configuration.composed_run(CompositionConfig(connections="probe", every=1)).composition
    refused("'probe' does not support augments with another tokenizer", composition=probed)
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_the_augments_own_tokens(shared, capsys):
    found = {}
    for length in (None, 24):
        config = run_config(shared, augment_length=length)
        plan = found[length] = planner.run(config, "h200:8")
        (own,) = plan["own_lengths"]
        assert own == (length or config.data.length)
        anchor, augment = decoder_configs(config)
        size = config.train.batch_size, config.data.length
        compositions = composition_configs(config)
        ideal = ideal_flops(anchor, [augment], compositions, *size, [own])
        assert plan["flops"] * plan["chips"] == ideal.total
        state, rows = plan["decoding"][0], plan["length"]
        cross = state["cross"][0]["kept"]
        expected = state["anchor"] + own / rows * (state["augments"][0] + cross)
        assert state["total"] == round(expected)
    assert found[24]["flops"] < found[None]["flops"]
    assert found[24]["memory"]["peak"] <= found[None]["memory"]["peak"]
    assert "rows of 48 tokens and 24 of its own for augment 0 a step" in capsys.readouterr().out
    alike = run_config(shared)
    alike.augments = (str(shared / "alike"),)
    assert planner.run(alike, "h200:8")["own_lengths"] == [None]
