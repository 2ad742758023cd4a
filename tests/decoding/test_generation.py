import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tiny_tokenizers
from flax import nnx

from calm_jax.data.vocabularies import load_vocabulary, vocabulary_of_folder
from calm_jax.decoding import generate
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Inputs, compose

PROMPTS = [[3, 1, 4, 1, 5], [9], list(range(20, 41))]  # the last is longer than one bucket
NEW = 5
LONGEST = len(PROMPTS[-1]) + NEW


def models():
    yield "decoder", tiny_models.decoder(family="gemma", num_layers=2, num_kv_heads=1)
    for name, config in {
        "composed": CompositionConfig(every=2, rotary=True),
        "encoder only": CompositionConfig(every=2, encoder_only=True),
    }.items():
        yield name, tiny_models.randomised(tiny_models.composed(config, num_layers=2))


MODELS = dict(models())


def greedy_choices(model, tokens, prompt_length):
    """The most probable token after each prefix of one row, which is no batch."""
    # Nothing looks at the zeros behind it: with them one program takes rows of all lengths.
    row = [*tokens, *[0] * (LONGEST - len(tokens))]
    prompt_mask = np.arange(LONGEST)[None] < prompt_length
    inputs = Inputs(
        jnp.asarray([row], jnp.int32), prompt_mask_BT=jnp.asarray(prompt_mask, jnp.int32)
    )
    return np.argmax(model(inputs)[0, : len(tokens)], axis=-1)


@functools.cache
def generated(name):
    return generate(MODELS[name], PROMPTS, max_new_tokens=NEW)


@pytest.mark.parametrize("name", MODELS)
def test_every_token_is_the_choice_after_all_before_it(name):
    found = generated(name)
    assert found.dtype == np.int32
    assert found.shape == (len(PROMPTS), NEW)
    for prompt, new in zip(PROMPTS, found, strict=True):
        choices = greedy_choices(MODELS[name], [*prompt, *new[:-1]], len(prompt))
        np.testing.assert_array_equal(new, choices[len(prompt) - 1 :])
    assert len({tuple(row) for row in found}) == len(PROMPTS)


def test_recomputed_token_by_token():
    """As above, but no forward pass ever holds a token that comes later."""
    tokens = list(PROMPTS[1])
    for _ in range(NEW):
        tokens.append(int(greedy_choices(MODELS["composed"], tokens, 1)[-1]))
    assert tokens[1:] == generated("composed")[1].tolist()


def test_what_is_generated_is_not_part_of_the_prompt():
    """Under `encoder_only` the augment's view of new tokens is closed: a mask says otherwise."""
    model, prompt, new = MODELS["encoder only"], PROMPTS[0], generated("encoder only")[0]
    tokens = [*prompt, *new[:-1]]
    closed, opened = (
        model(Inputs(jnp.asarray([tokens]), prompt_mask_BT=jnp.arange(len(tokens))[None] < length))
        for length in (len(prompt), len(tokens))
    )
    assert float(jnp.abs(closed - opened)[0, len(prompt) :].max()) > 1e-3


def test_ids_without_meaning_are_never_answered():
    """Rows beyond the vocabulary, and rows of the anchor that the augment lacks."""
    vocabulary = load_vocabulary("key_value/tiny")
    anchor = tiny_models.decoder(num_layers=2, vocab_size=vocabulary.size + 5, head_bias=True)
    anchor.head_bias.set_value(jnp.zeros(vocabulary.size + 5).at[-9:].set(1e3))
    augment = tiny_models.decoder(num_layers=2, vocab_size=vocabulary.size - 3)
    assert generate(anchor, PROMPTS, max_new_tokens=2).max() == vocabulary.size + 4
    anchor.vocabulary = vocabulary
    assert generate(anchor, PROMPTS, max_new_tokens=2).max() < vocabulary.size
    pair = compose(anchor, augment, CompositionConfig(every=2), rngs=nnx.Rngs(0))
    found = generate(pair, PROMPTS, max_new_tokens=2)
    assert vocabulary.size - 9 < found.max() < vocabulary.size - 3


@pytest.mark.parametrize("name", ["decoder", "composed"])
def test_a_row_ends_at_its_own_eos(name):
    rows = generated(name)
    eos_id = int(rows[0][2])  # so that the first row ends after its third token at the latest
    found = generate(MODELS[name], PROMPTS, max_new_tokens=NEW, eos_id=eos_id)
    lengths = []
    for row, whole in zip(found, rows.tolist(), strict=True):
        length = whole.index(eos_id) + 1 if eos_id in whole else NEW
        assert row.tolist() == whole[:length] + [eos_id] * (NEW - length)
        lengths.append(length)
    assert lengths[0] <= 3
    assert max(lengths) == NEW  # one row did not end, and went on undisturbed


def test_all_rows_ended_early_are_filled():
    prompts, whole = [PROMPTS[0]] * 2, generated("decoder")[0].tolist()
    found = generate(MODELS["decoder"], prompts, max_new_tokens=NEW, eos_id=whole[0])
    np.testing.assert_array_equal(found, np.full((2, NEW), whole[0]))


def test_text_is_encoded_behind_the_start_token():
    vocabulary = load_vocabulary("key_value/tiny")
    model = tiny_models.decoder(num_layers=2, vocab_size=vocabulary.size)
    model.vocabulary = vocabulary
    texts = ["<math>ab+cd=", "a"]
    ids = [[vocabulary.bos_id, *vocabulary.encode(text)] for text in texts]
    assert vocabulary.bos_id is not None
    assert len(ids[0]) > len(ids[1]) > 1
    from_text = generate(model, texts, max_new_tokens=4)
    np.testing.assert_array_equal(from_text, generate(model, ids, max_new_tokens=4))
    # The vocabulary's own end token ends rows: the same with it given outright.
    given = generate(model, ids, max_new_tokens=4, eos_id=vocabulary.eos_id)
    np.testing.assert_array_equal(from_text, given)


def test_where_the_tokenizer_puts_nothing_before_a_text_nothing_is():
    model = tiny_models.decoder(num_layers=2, vocab_size=264)
    model.vocabulary = load_vocabulary("bytes")
    assert model.vocabulary.bos_id is None
    ids = [model.vocabulary.encode("héllo")]
    np.testing.assert_array_equal(
        generate(model, ["héllo"], max_new_tokens=3), generate(model, ids, max_new_tokens=3)
    )


def test_a_token_that_the_tokenizer_adds_and_the_model_does_not_know(tmp_path):
    """As in Gemma 3 1B, whose tokenizer has a token for images behind the last row."""
    folder = tiny_tokenizers.FAMILIES["gemma"](tmp_path / "published")
    size = vocabulary_of_folder(folder).size
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"].append(values["added_tokens"][0] | {"id": size, "content": "<image>"})
    (folder / "tokenizer.json").write_text(json.dumps(values))
    vocabulary = vocabulary_of_folder(folder)
    anchor, augment = (
        tiny_models.decoder(num_layers=2, vocab_size=rows) for rows in (size + 1, size)
    )
    pair = compose(anchor, augment, CompositionConfig(every=2), rngs=nnx.Rngs(0))
    for model in (augment, pair):
        (model.anchor if model is not augment else model).vocabulary = vocabulary
        generate(model, ["seen"], max_new_tokens=1)
        message = rf"prompt token {size} \('<image>'\) is outside the {size} rows"
        with pytest.raises(CalmError, match=message):
            generate(model, ["an <image>"], max_new_tokens=1)


def test_no_prompts_no_tokens():
    assert generate(MODELS["decoder"], [], max_new_tokens=3).shape == (0, 3)


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[1, 2]], 0, r"max_new_tokens is 0; it must be at least 1"),
        ([[1], []], 2, r"an empty prompt has no next token"),
        ([[1, 64]], 2, r"prompt token 64 is outside the 64 rows of the embedding"),
        ([[-1]], 2, r"prompt token -1 is outside the 64 rows of the embedding"),
        (["text"], 2, r"no vocabulary to encode 'text'"),
    ],
)
def test_bad_prompts(prompts, new, message):
    with pytest.raises(CalmError, match=message):
        generate(MODELS["decoder"], prompts, max_new_tokens=new)


def test_one_text_alone_is_not_a_list_of_letters():
    model = tiny_models.decoder(num_layers=2, vocab_size=264)
    model.vocabulary = load_vocabulary("bytes")
    with pytest.raises(CalmError, match=r"a list of prompts"):
        generate(model, "hello", max_new_tokens=2)
