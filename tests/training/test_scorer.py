"""The scorer reads back what was drawn, forgives noise and blur, and sees what is wrong."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gguf_native.training import scenes, scorer
from gguf_native.training.scenes import EXAMPLE, RELATIONS, SHAPES, SIZES, Caption, Thing

CAPTIONS = scenes.random_captions(80, seed=4)
CAPTIONS += scenes.in_new_colour(CAPTIONS[:20], seed=5)
PICTURES = scenes.draw(CAPTIONS, torch.Generator().manual_seed(6))


def smooth(pictures: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)


def noisy(pictures: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(7))
    return (pictures + 0.04 * noise).clamp(0, 1)


@pytest.mark.parametrize("change", [torch.clone, smooth, noisy], ids=["as drawn", "smooth", "noisy"])
def test_scorer_and_drawer_agree(change):
    found = scorer.scores(change(PICTURES), CAPTIONS)
    assert found.keys() == {"all", *scorer.PARTS}
    assert min(found.values()) >= 0.99, found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_shape_in_every_size(shape, size):
    captions = [Caption((Thing(size, "blue", shape),), None, "white")] * 4
    assert scorer.accuracy(scenes.draw(captions, torch.Generator().manual_seed(8)), captions) == 1


WRONG = {
    "background": replace(EXAMPLE, background="pink"),
    "count": replace(EXAMPLE, things=EXAMPLE.things[:1], relation=None),
    "colour": replace(EXAMPLE, things=(replace(EXAMPLE.things[0], colour="yellow"), EXAMPLE.things[1])),
    "shape": replace(EXAMPLE, things=(EXAMPLE.things[0], replace(EXAMPLE.things[1], shape="star"))),
    "size": replace(EXAMPLE, things=(EXAMPLE.things[0], replace(EXAMPLE.things[1], size="medium"))),
    "relation": replace(EXAMPLE, relation="right of"),
}


@pytest.mark.parametrize("part", scorer.PARTS)
def test_one_wrong_part_is_found(part):
    picture = scenes.draw([EXAMPLE], torch.Generator().manual_seed(9))
    (reading,) = scorer.read(picture)
    assert [name for name, right in scorer.judge(WRONG[part], reading) if not right] == [part]


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_are_told_apart(relation):
    captions = [replace(EXAMPLE, relation=relation)] * 4
    readings = scorer.read(scenes.draw(captions, torch.Generator().manual_seed(10)))
    for asked in RELATIONS:
        judged = [dict(scorer.judge(replace(EXAMPLE, relation=asked), reading)) for reading in readings]
        assert {parts["relation"] for parts in judged} == {asked == relation}


def test_a_missing_thing_costs_all_its_parts():
    lone = replace(EXAMPLE, things=EXAMPLE.things[1:], relation=None)
    (reading,) = scorer.read(scenes.draw([lone], torch.Generator().manual_seed(11)))
    assert sum(right for _, right in scorer.judge(EXAMPLE, reading)) == 4


def test_pictures_of_other_captions_score_low():
    assert scorer.accuracy(PICTURES.roll(1, 0), CAPTIONS) < 0.5


def test_noise_scores_next_to_nothing():
    noise = torch.rand(4, 3, scenes.SIDE, scenes.SIDE, generator=torch.Generator().manual_seed(12))
    assert scorer.accuracy(noise, CAPTIONS[:4]) < 0.3
