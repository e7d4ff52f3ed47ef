"""`ml1m` that may also read the times of events and the texts of films: title, genres, DBpedia abstract.

    python -m jaxrec.train --config=configs/ml1m_time_text.py --workdir=runs/ml1m_time_text

The events are those of the SASRec file, in its order. Nearly half of the times are estimated (the data set's README
says how well); the time of the target is not used. `time` and `text` have one of the two; `target_time` stands apart.
Not yet trained to an end: python benchmarks/quality/time_text.py compares them with `ml1m`.
"""

import dataclasses
import os

from configs import ml1m
from jaxrec.config import TrainConfig
from jaxrec.data.config import TextConfig
from jaxrec.data.movielens_times import TimedFilms
from jaxrec.models.item_text import TextTower
from jaxrec.nn.encoder import EncoderConfig

MAX_TOKENS = 64  # of an item: most abstracts are longer, and their first sentence says what a film is


def get_config() -> TrainConfig:
    """Times and texts."""
    return _with("ml1m_time_text", time=True, text=True)


def time() -> TrainConfig:
    """Times alone."""
    return _with("ml1m_time", time=True, text=False)


def target_time() -> TrainConfig:
    """Times, that of the target too, which a server knows: another task than the published protocol's."""
    config = _with("ml1m_target_time", time=True, text=False)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, target_time=True))


def text() -> TrainConfig:
    """Texts alone."""
    return _with("ml1m_text_beside_ids", time=False, text=True)


def _with(name: str, *, time: bool, text: bool) -> TrainConfig:
    base = ml1m.get_config()
    model, data = base.model, base.data
    if time:
        encoder = dataclasses.replace(model.encoder, time_bias=True)
        model = dataclasses.replace(model, encoder=encoder, time_gaps=True)
    if text:
        reader = EncoderConfig(
            embed_dim=64,
            num_layers=2,
            num_heads=2,
            mlp_dim=256,
            max_positions=MAX_TOKENS,
            vocab_size=30_522,
            type_vocab_size=1,
        )
        model = dataclasses.replace(model, text=TextTower(encoder=reader, trained_items=128))
    source = TimedFilms(directory=os.environ.get("JAXREC_DATA", "../shared/data"))
    data = dataclasses.replace(data, path="", source=source, text=TextConfig(max_tokens=MAX_TOKENS))
    return dataclasses.replace(base, name=name, data=data, model=model)
