"""An exported bridge in plain transformers against calm_jax, on random pairs that hide nothing."""

import json
import re
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra [parity]")
transformers = pytest.importorskip("transformers", reason="needs the extra [parity]")

import safetensors.numpy  # noqa: E402
from flax import nnx  # noqa: E402

import calm_jax  # noqa: E402
from calm_jax.checkpoints.convert.huggingface_config import GLOBAL, LOCAL  # noqa: E402
from calm_jax.errors import CalmError  # noqa: E402
from calm_jax.models.inputs import Inputs  # noqa: E402
from calm_jax.models.lora import LoRAConfig, add_lora  # noqa: E402
from tests.parity.random_huggingface import save_random  # noqa: E402
from tests.tiny_models import randomised  # noqa: E402
from tests.tiny_tokenizers import qwen  # noqa: E402

# Of the largest logit.
TOLERANCE = 1e-5
LENGTH, NEW = 12, 64
# With heads of their own: a random model with a tied one repeats its last token.
LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
WINDOW = {"sliding_window": 4, "head_dim": 16}
FALCON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}
ROPES = {
    GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    LOCAL: {"rope_type": "default", "rope_theta": 1e4},
}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "mistral": lambda: transformers.MistralConfig(**LLAMA | WINDOW | {"hidden_size": 24}),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA | {"hidden_size": 24, "head_dim": 8}),
    "gemma": lambda: transformers.GemmaConfig(**LLAMA | {"head_dim": 16}),
    "gemma2": lambda: transformers.Gemma2Config(
        **LLAMA | WINDOW, query_pre_attn_scalar=24, attn_logit_softcapping=5.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **LLAMA | WINDOW | {"num_hidden_layers": 8}, query_pre_attn_scalar=24, rope_parameters=ROPES
    ),
    "gptj": lambda: transformers.GPTJConfig(
        vocab_size=96, n_embd=32, n_layer=4, n_head=4, n_positions=128, rotary_dim=4
    ),
    "falcon": lambda: transformers.FalconConfig(**FALCON),
    "cohere": lambda: transformers.CohereConfig(
        **FALCON, intermediate_size=48, num_key_value_heads=2, pad_token_id=0
    ),
}
# Anchor, augments, and a config for each augment.
PAIRS = {
    "llama": (
        "llama",
        ["qwen3", "mistral"],
        [
            {"connections": ((0, 0), (1, 1), (2, 1)), "bias": True, "rotary": True, "gate": True},
            {"connections": ((1, 1), (1, 3)), "num_heads": 2, "head_dim": 6},
        ],
    ),
    "gemma2": ("gemma2", ["llama"], [{"every": 1, "output_projection": False}]),
    "gemma3": ("gemma3", ["gemma2"], [{"every": 1, "rotary": True}]),
    "gptj": ("gptj", ["falcon"], [{"connections": ((1, 0), (2, 3))}]),
    "falcon": ("falcon", ["gptj"], [{"every": 2, "bias": True, "output_projection": False}]),
    "qwen3": ("qwen3", ["gemma"], [{"every": 2, "gate": True}]),
    # Only after the last layer: without norms a random pair makes float32's rounding errors large.
    "qwen2": ("qwen2", ["cohere"], [{"connections": ((0, 3),), "norms": False}]),
    "mistral": ("mistral", ["qwen2"], [{"every": 2, "num_heads": 1}]),
    "cohere": ("cohere", ["llama"], [{"every": 2, "rotary": True}]),
    "prompt": ("llama", ["qwen3"], [{"every": 2, "encoder_only": True, "rotary": True}]),
}


@pytest.fixture(scope="module", autouse=True)
def _modules(tmp_path_factory):
    """Code of exported folders is copied into a folder of this test."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Hugging Face's folder of a model by its name; the frozen one is beside it."""
    root, made = tmp_path_factory.mktemp("models"), set()

    def get(name):
        if name not in made:
            save_random(MODELS[name](), root / name, seed=len(made))
            calm_jax.convert(root / name, root / f"{name}-frozen")
            made.add(name)
        return root / name

    return get


@pytest.fixture(scope="module")
def pair(models, tmp_path_factory):
    """(calm_jax' composed model, the exported folder) of a pair by its name."""
    made = {}

    def get(name):
        if name not in made:
            anchor, augments, fields = PAIRS[name]
            parts = [calm_jax.load(f"{models(part)}-frozen") for part in (anchor, *augments)]
            configs = [calm_jax.CompositionConfig(init="paper", **field) for field in fields]
            ours = randomised(calm_jax.compose(parts[0], parts[1:], configs, rngs=nnx.Rngs(0)))
            folder = tmp_path_factory.mktemp("exported") / name
            calm_jax.export_bridge(ours, folder, to="huggingface")
            made[name] = ours, folder
        return made[name]

    return get


def load(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **options
    )
    model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)
    return model


@pytest.fixture(scope="module")
def theirs(pair):
    made = {}

    def get(name):
        if name not in made:
            made[name] = load(pair(name)[1])
        return made[name]

    return get


def tokens_of(rows=2, length=LENGTH):
    return np.random.default_rng(0).integers(3, 96, (rows, length), dtype=np.int32)


def as_torch(x):
    return torch.from_numpy(np.array(x, np.int64))


def difference(logits, reference):
    """Largest difference of logits over the largest logit."""
    logits, reference = np.asarray(logits, np.float32), np.asarray(reference, np.float32)
    return np.max(np.abs(logits - reference)) / np.max(np.abs(reference))


# Without padding; with padding before, after, and on both sides of the tokens.
PADDED = np.array(
    [[1] * 12, [0] * 5 + [1] * 7, [1] * 9 + [0] * 3, [0] * 2 + [1] * 8 + [0] * 2], np.int32
)


@pytest.mark.parametrize("name", PAIRS)
def test_logits(name, pair, theirs):
    ours, tokens, real = pair(name)[0], tokens_of(rows=4), PADDED == 1
    positions = np.maximum(np.cumsum(PADDED, 1) - 1, 0)
    inputs = Inputs(tokens, segments_BT=PADDED, positions_BT=positions, prompt_mask_BT=PADDED)
    reference = np.asarray(ours(inputs))
    with torch.no_grad():
        logits = theirs(name)(as_torch(tokens), attention_mask=as_torch(PADDED)).logits.numpy()
        alone = theirs(name).anchor(as_torch(tokens[:1])).logits.numpy()
        unpadded = theirs(name)(as_torch(tokens[:1])).logits.numpy()
    print(f"{name}: {difference(logits[real], reference[real]):.1e} of the largest logit")
    assert difference(logits[real], reference[real]) <= TOLERANCE
    assert difference(unpadded, reference[:1]) <= TOLERANCE
    assert difference(alone, reference[:1]) > 0.1  # the bridge counts


def test_given_positions(pair, theirs):
    tokens = tokens_of()
    positions = np.arange(LENGTH)[None] * np.array([[1], [3]])
    reference = pair("llama")[0](Inputs(tokens, positions_BT=positions.astype(np.int32)))
    with torch.no_grad():
        logits = theirs("llama")(as_torch(tokens), position_ids=as_torch(positions)).logits
    assert difference(logits, reference) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma3", "gptj", "falcon", "qwen3", "prompt"])
def test_greedy_tokens(name, pair, theirs):
    tokens = tokens_of()
    wanted = calm_jax.generate(pair(name)[0], tokens.tolist(), max_new_tokens=NEW)
    found = theirs(name).generate(as_torch(tokens), max_new_tokens=NEW)
    assert found[:, LENGTH:].tolist() == np.asarray(wanted).tolist()
    assert len({*found[0, LENGTH:].tolist()}) > 5  # not one token again and again


def test_greedy_tokens_of_prompts_of_unequal_length(pair, theirs):
    tokens, lengths = tokens_of(), (LENGTH, 7)
    prompts = [row[LENGTH - length :].tolist() for row, length in zip(tokens, lengths, strict=True)]
    wanted = calm_jax.generate(pair("gemma3")[0], prompts, max_new_tokens=16)
    mask = (np.arange(LENGTH) >= LENGTH - np.array(lengths)[:, None]).astype(np.int64)
    found = theirs("gemma3").generate(
        as_torch(tokens), attention_mask=as_torch(mask), max_new_tokens=16
    )
    assert found[:, LENGTH:].tolist() == np.asarray(wanted).tolist()
    for prompt, row in zip(prompts, found[:, LENGTH:], strict=True):
        alone = theirs("gemma3").generate(as_torch([prompt]), max_new_tokens=16)
        assert alone[0, len(prompt) :].tolist() == row.tolist()


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "in pieces": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gemma3", "prompt"])
def test_cached_tokens_are_those_without_a_cache(name, way, theirs):
    tokens = as_torch(tokens_of())
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        options = WAYS[way] if use_cache or way != "in pieces" else {}
        found.append(
            theirs(name).generate(
                tokens, attention_mask=mask, max_new_tokens=12, use_cache=use_cache, **options
            )
        )
    assert found[0].tolist() == found[1].tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_drafts_that_are_taken_back(name, theirs):
    """Rejected drafts are cropped from all caches, of layers with a window too."""
    model, tokens = theirs(name), as_torch(tokens_of(rows=1).repeat(2, axis=1))
    plain = model.generate(tokens, max_new_tokens=16)
    drafted = model.generate(tokens, max_new_tokens=16, prompt_lookup_num_tokens=3)
    assert drafted.tolist() == plain.tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon", "prompt"])
def test_a_cache_that_is_cropped_reordered_and_repeated(name, theirs):
    """Steps of a few tokens give the logits of the whole rows, whatever was done to the cache."""
    model, tokens = theirs(name), as_torch(tokens_of(length=20))
    prompt = torch.ones_like(tokens)
    prompt[:, 8:] = 0
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0

    def step(cache, first, last, rows=(0, 1), wrong=False):
        rows = list(rows)
        ids = tokens[rows, first:last]
        return model(
            ids.flip(0, 1) if wrong else ids, attention_mask=mask[rows, :last], cache=cache
        ).logits

    with torch.no_grad():
        whole = model(tokens, attention_mask=mask, prompt_mask=prompt, use_cache=False).logits
        cache = model.new_cache()
        first = step(cache, 0, 8)
        cache.activate_past_recording()
        step(cache, 8, 11, wrong=True)
        cache.crop(-3)
        assert cache.get_seq_length() == 8
        second = step(cache, 8, 11)
        cache.crop(0)
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = step(cache, 11, 12, (1, 0))
        cache.crop(0)
        cache.batch_repeat_interleave(2)
        repeated = step(cache, 12, 14, (1, 1, 0, 0))
        cache.crop(0)
        cache.batch_select_indices(torch.tensor([3, 0]))
        last = step(cache, 14, 20)
    assert difference(torch.cat([first, second], 1)[:, 2:], whole[:, 2:11]) <= TOLERANCE
    assert difference(swapped, whole[[1, 0], 11:12]) <= TOLERANCE
    assert difference(repeated, whole[[1, 1, 0, 0], 12:14]) <= TOLERANCE
    assert difference(last, whole[:, 14:]) <= TOLERANCE


def test_an_answer_continues_with_the_cache_of_the_first(theirs):
    model, tokens = theirs("gemma3"), as_torch(tokens_of())
    first = model.generate(tokens, max_new_tokens=6, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, tokens[:, :3]], 1)
    kept = model.generate(longer, cache=first.cache, max_new_tokens=6)
    assert kept.tolist() == model.generate(longer, max_new_tokens=6).tolist()


def test_only_the_prompt_is_visible(pair, theirs):
    model, tokens = theirs("prompt"), tokens_of()
    prompt = (np.arange(LENGTH) < np.array([[4], [7]])).astype(np.int32)
    wanted = pair("prompt")[0](Inputs(tokens, prompt_mask_BT=prompt))
    labels = as_torch(np.where(prompt, -100, tokens))
    with torch.no_grad():
        by_mask = model(as_torch(tokens), prompt_mask=as_torch(prompt)).logits
        short = model(as_torch(tokens), prompt_mask=as_torch(prompt[:, :7])).logits
        by_labels = model(as_torch(tokens), labels=labels).logits
        all_visible = model(as_torch(tokens)).logits
    for logits in (by_mask, short, by_labels):
        assert difference(logits, wanted) <= TOLERANCE
    assert difference(all_visible, wanted) > 0.01


def test_training_and_the_way_back(pair, models, tmp_path):
    ours, folder = pair("llama")
    model, tokens = load(folder).train(), tokens_of()
    labels = as_torch(tokens)
    labels[0, :5] = -100
    loss = model(as_torch(tokens), labels=labels).loss
    logits = np.asarray(ours(tokens), np.float64)[:, :-1]
    likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.take_along_axis(likely, tokens[:, 1:, None], -1)[..., 0][labels[:, 1:].numpy() != -100]
    assert abs(loss.item() + own.mean()) <= 1e-5
    loss.backward()
    for name, x in model.named_parameters():
        if name.startswith("bridge."):
            # A query's bias of a single visible tap has no gradient, but here are many.
            assert x.grad.abs().max() > 0, name
        else:
            assert x.grad is None and not x.requires_grad, name
    before = {name: x.clone() for name, x in model.named_parameters()}
    torch.optim.SGD([x for x in model.parameters() if x.requires_grad], 0.1).step()
    changed = {name for name, x in model.named_parameters() if not x.equal(before[name])}
    assert changed == {name for name in before if name.startswith("bridge.")}

    model.save_pretrained(tmp_path / "saved")
    assert changed == set(safetensors.numpy.load_file(tmp_path / "saved/model.safetensors"))
    again = load(tmp_path / "saved")
    with torch.no_grad():
        after = model(as_torch(tokens)).logits
        assert again(as_torch(tokens)).logits.equal(after)
    assert difference(after, ours(tokens)) > 0.01
    anchor, *augments = (f"{models(name)}-frozen" for name in ("llama", "qwen3", "mistral"))
    calm_jax.import_bridge(tmp_path / "saved", tmp_path / "back", anchor=anchor, augments=augments)
    assert difference(after, calm_jax.load_composed(tmp_path / "back")(tokens)) <= TOLERANCE


def test_dtypes_and_devices(pair, theirs):
    tokens = as_torch(tokens_of())
    with torch.no_grad():
        exact = theirs("gemma3")(tokens).logits
        loaded = load(pair("gemma3")[1], dtype=torch.bfloat16, device_map="cpu")
        cast = load(pair("gemma3")[1]).to(torch.bfloat16)
        assert {x.dtype for x in loaded.anchor.parameters()} == {torch.bfloat16}
        assert {x.dtype for x in loaded.bridge.parameters()} == {torch.float32}
        for model in (loaded, cast):
            assert model(tokens).logits.dtype == torch.bfloat16
            assert 1e-4 < difference(model(tokens).logits.float(), exact) < 0.1
            model.generate(tokens, max_new_tokens=3)


def test_hidden_states_are_those_with_the_bridge(theirs):
    model, tokens = theirs("llama"), as_torch(tokens_of())
    with torch.no_grad():
        first, again = (model(tokens, output_hidden_states=True).hidden_states for _ in "12")
        alone = model.anchor(tokens, output_hidden_states=True).hidden_states
    for with_bridge, same, without in zip(first, again, alone, strict=True):
        assert with_bridge.equal(same)
        # All but the embeddings: there is a connection to the first layer.
        assert with_bridge.equal(without) == (without is alone[0])


def test_the_example_of_the_card_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vocabulary = qwen(tmp_path / "anchor")
    size = len(transformers.AutoTokenizer.from_pretrained(vocabulary))
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = transformers.Qwen2Config(**LLAMA | {"vocab_size": size} | ids)
    save_random(config, tmp_path / "anchor")
    calm_jax.convert("anchor", "frozen")
    decoder = calm_jax.load("frozen")
    ours = randomised(calm_jax.compose(decoder, decoder, rngs=nnx.Rngs(0)))
    for folder, places in (("one", {}), ("two", {"anchor": "anchor", "augments": ["anchor"]})):
        calm_jax.export_bridge(ours, folder, to="huggingface", **places)
    assert (tmp_path / "one/config.json").read_text() == (tmp_path / "two/config.json").read_text()
    card = (tmp_path / "one/README.md").read_text()
    assert decoder.fingerprint in card
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    capsys.readouterr()
    exec(example, {})
    answer = calm_jax.generate(ours, ["a prompt"], max_new_tokens=32)[0]
    text = decoder.vocabulary.decode(answer)
    assert capsys.readouterr().out.startswith(f"a prompt{text[:10]}")


def test_a_folder_whose_models_are_absent(pair, models, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(pair("qwen3")[1], folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"augments": ["/gone/augment"]}))
    with pytest.raises(OSError, match=r"moved: the augment 0, /gone/augment, cannot be loaded"):
        load(folder)
    assert load(folder, augments=[str(models("gemma"))]).config.augments == [str(models("gemma"))]
    with pytest.raises(ValueError, match=r"has a bridge to 1 augments, not 2"):
        load(folder, augments=[str(models("gemma"))] * 2)
    with pytest.raises(ValueError, match=r"of anchor .* is \[32, 4\], not \[24, 4\]"):
        load(folder, anchor=str(models("llama")), augments=[str(models("gemma"))])
    (folder / "model.safetensors").unlink()
    shutil.copy(pair("mistral")[1] / "model.safetensors", folder)
    with pytest.raises((OSError, RuntimeError), match=r"missing_keys|mismatch"):
        load(folder)


def test_what_a_bridge_cannot_do_in_transformers(theirs):
    model, tokens = theirs("qwen3"), as_torch(tokens_of())
    with pytest.raises(ValueError, match=r"the cache is a DynamicCache; make one with new_cache"):
        model(tokens, cache=transformers.DynamicCache())
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 11\), not \(2, 12\)"):
        model(tokens, attention_mask=torch.ones_like(tokens)[:, 1:])
    with pytest.raises(ValueError, match="cache_implementation is 'static'"):
        model.generate(tokens, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="the frozen models are not loaded"):
        type(model)(model.config)(tokens)


def test_what_is_refused_before_anything_is_written(pair, models, tmp_path):
    ours, target = pair("qwen3")[0], tmp_path / "target"

    def refused(message, composed=ours, **arguments):
        with pytest.raises(CalmError, match=message):
            calm_jax.export_bridge(composed, target, **{"to": "huggingface"} | arguments)
        assert not list(tmp_path.glob("*target*"))

    refused("--to=onnx is unknown; known are huggingface", to="onnx")
    refused("anchor and augments have no effect without to='huggingface'", to=None, anchor="a/b")
    refused("2 augments are given, but the bridge reads 1", augments=["a/b", "c/d"])
    refused(r"llama: embed_dim is 32, but the anchor has 24", anchor=models("llama"))
    other = tmp_path / "other"
    save_random(MODELS["qwen3"](), other, seed=99)
    refused(r"other: tensor .* is not that of the anchor", anchor=other)
    decoder = calm_jax.Decoder(ours.config, nnx.Rngs(0))
    made = calm_jax.compose(decoder, decoder, rngs=nnx.Rngs(0))
    refused(r"the anchor is not known to come from a model of transformers; give --anchor", made)
    calm_jax.save_frozen(decoder, tmp_path / "frozen")
    trained = calm_jax.load(tmp_path / "frozen")
    made = calm_jax.compose(ours.anchor, trained, rngs=nnx.Rngs(0))
    refused(r"the augment 0 is not known to come .*; give --augments", made)
    add_lora(trained, LoRAConfig(2), nnx.Rngs(0))
    made = calm_jax.compose(trained, decoder, rngs=nnx.Rngs(0))
    refused("the anchor has a low-rank update", made)
