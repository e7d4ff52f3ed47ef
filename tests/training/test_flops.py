"""Operations by formula, against a count by hand."""

import dataclasses

import pytest

from jaxrec.models.item_text import TextTower
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.masked_text import MaskedText
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.flops import encoder_flops_per_row, peak_flops, step_flops


def test_encoder_flops_by_hand():
    config = EncoderConfig(embed_dim=4, num_layers=1, mlp_dim=8)
    # Per position: q, k, v, out = 4 * 16, MLP = 2 * 32, attention over 10 keys = 2 * 10 * 4 multiply-adds.
    assert encoder_flops_per_row(config, 10) == 10 * 2 * (64 + 64 + 80)
    # A gated MLP has a third kernel.
    gated = dataclasses.replace(config, mlp="gated")
    assert encoder_flops_per_row(gated, 10) == 10 * 2 * (64 + 96 + 80)
    # HSTU: q, k = 2 * 16; gate, value, out = 3 * 32; scores over 10 keys of 4, values of 8.
    hstu = dataclasses.replace(config, block="hstu", activation="silu")
    assert encoder_flops_per_row(hstu, 10) == 10 * 2 * (32 + 96 + 10 * (4 + 8))


def test_a_step_is_three_forward_passes():
    model = TwoTowerConfig(
        encoder=EncoderConfig(embed_dim=4, num_layers=1, mlp_dim=8), item_dim=4, projection=False
    )
    both = {"next_item": NextItem(), "behaviour": Behaviour()}
    encoder, scores = encoder_flops_per_row(model.encoder, 10) * 2, 2 * 10 * 100 * 2 * 4
    # The causal pass is shared by the two tasks. The head: a hidden layer of 12 x 4, then 4 x 3, at every event.
    assert step_flops(model, {"next_item": NextItem()}, 100, 3, 2, 10) == 3 * (encoder + scores)
    assert step_flops(model, both, 100, 3, 2, 10) == 3 * (encoder + scores + 2 * 10 * 2 * (48 + 12))


def test_the_texts_that_a_step_encodes_count():
    encoder = EncoderConfig(embed_dim=4, num_layers=1, mlp_dim=8, vocab_size=50, type_vocab_size=1)
    text = TextTower(encoder=encoder, trained_items=6, masked_head=True)
    without, with_text = (TwoTowerConfig(encoder=encoder, item_dim=4, text=one) for one in (None, text))
    tasks = {"next_item": NextItem()}
    more = step_flops(with_text, tasks, 100, 0, 2, 10, 12) - step_flops(without, tasks, 100, 0, 2, 10, 12)
    assert more == 3 * 6 * encoder_flops_per_row(encoder, 12)
    tasks["words"] = MaskedText(mask_rate=0.3)  # 3 of 10 words, in a pass of its own
    words = step_flops(with_text, tasks, 100, 0, 2, 10, 12) - step_flops(
        without, {"n": NextItem()}, 100, 0, 2, 10, 12
    )
    assert words == 2 * more + 3 * 6 * 3 * 50 * 2 * 4


def test_known_chips_have_a_published_peak_and_others_are_measured():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("TPU v5p") == 459e12
    assert peak_flops("TPU v5 lite") == pytest.approx(197e12)
    assert 1e8 < peak_flops("cpu") < 1e14
