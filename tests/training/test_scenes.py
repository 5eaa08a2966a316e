"""Captions say what they are of, and their pictures keep things apart and inside."""

import pytest
import torch
from gguf_native.training import scenes
from gguf_native.training.scenes import EXAMPLE, NEW_COLOUR, RELATIONS, SHAPES, SIDE, SIZES

CAPTIONS = scenes.random_captions(200, seed=1)


def drawn(captions: list[scenes.Caption], seed: int = 0) -> torch.Tensor:
    return scenes.draw(captions, torch.Generator().manual_seed(seed))


def test_the_example():
    assert str(EXAMPLE) == "a large red circle left of a small blue square on a green background"
    assert scenes.parse(str(EXAMPLE)) == EXAMPLE


def test_captions_parse_back():
    captions = CAPTIONS + scenes.in_new_colour(CAPTIONS, seed=2)
    assert [scenes.parse(str(caption)) for caption in captions] == captions


@pytest.mark.parametrize("text", ["", "a red circle on a green background", f"{EXAMPLE}.", "a lighthouse at dawn"])
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError, match="no caption"):
        scenes.parse(text)


def test_random_captions_use_every_word_but_the_new_colour():
    text = " ".join(map(str, CAPTIONS))
    for word in (*SIZES, *SHAPES, *RELATIONS, *scenes.BASE_COLOURS):
        assert word in text
    assert NEW_COLOUR not in text


def test_things_differ_from_their_background():
    assert all(thing.colour != caption.background for caption in CAPTIONS for thing in caption.things)


def test_the_new_colour_is_on_one_thing_of_each():
    changed = scenes.in_new_colour(CAPTIONS, seed=3)
    assert {sum(thing.colour == NEW_COLOUR for thing in caption.things) for caption in changed} == {1}


def test_seeds_decide():
    assert scenes.random_captions(20, seed=1) == CAPTIONS[:20] != scenes.random_captions(20, seed=2)
    assert torch.equal(drawn(CAPTIONS[:5]), drawn(CAPTIONS[:5]))
    assert not torch.equal(drawn(CAPTIONS[:5]), drawn(CAPTIONS[:5], seed=1))


def test_pictures_have_the_captions_colours_and_a_border_of_background():
    captions = CAPTIONS[:40]
    pictures = drawn(captions)
    assert pictures.shape == (len(captions), 3, SIDE, SIDE)
    assert pictures.min() >= 0 and pictures.max() <= 1
    for picture, caption in zip(pictures, captions, strict=True):
        names = [caption.background, *(thing.colour for thing in caption.things)]
        colours = picture.flatten(1).T
        for name, colour in zip(names, scenes.rgb(names), strict=True):
            assert (colours == colour).all(1).sum() > 100, name
        border = torch.cat((picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]), 1).T
        assert (border == scenes.rgb([caption.background])).all()


@pytest.mark.parametrize("name", SHAPES)
def test_signed_distances_are_negative_inside_and_grow_outward(name):
    distance = SHAPES[name]
    steps = torch.linspace(0, 2, 50)
    for angle in torch.linspace(0, 6.28, 13):
        ray = distance(steps * angle.cos(), steps * angle.sin())
        assert ray[0] < -0.3 and ray[-1] > 0.3
        assert ((ray[:-1] < 0) >= (ray[1:] < 0)).all(), "no shape is entered twice"
