"""Whose the data are: known of the embedded set and of what says it, of nothing else."""

import pytest

from jaxrec.config import load_config
from jaxrec.data.config import DataConfig
from jaxrec.data.domains import Domains
from jaxrec.data.own_source import OwnSource
from jaxrec.export.licence import EMBEDDED, licence_of


def place(directory, name, readme=None):
    path = directory / name
    path.mkdir()
    if readme is not None:
        (path / "README.md").write_text(readme, encoding="utf-8")
    return str(path)


def test_only_an_empty_path_without_a_source_is_the_embedded_set(tmp_path, monkeypatch, repository):
    assert licence_of(DataConfig()) == EMBEDDED
    assert licence_of(DataConfig(source=OwnSource())) == ""
    assert licence_of(DataConfig(path=place(tmp_path, "mine"))) == ""
    assert licence_of(DataConfig(path="tfds:movielens/1m-ratings")) == ""
    monkeypatch.setenv("JAXREC_DATA", str(tmp_path / "nothing"))
    for config in ("amazon_domains", "advertising", "social"):
        assert licence_of(load_config(f"{repository}/configs/{config}.py").data) == "", config


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("# Mine\n\n**Licence:** CC BY 4.0, by me\n\nmore", "CC BY 4.0, by me"),
        ("- License: MIT", "MIT"),
        ("The licence: see below\n", ""),
        ("## Licence\n\nCC0\n", ""),
        ("**Licence:**\n\nCC0\n", ""),
    ],
)
def test_a_directory_may_say_it_in_a_line_of_its_readme(tmp_path, readme, licence):
    assert licence_of(DataConfig(path=place(tmp_path, "mine", readme))) == licence


def test_each_directory_of_a_source_is_named_with_its_own(tmp_path):
    paths = {"a": place(tmp_path, "a", "**Licence:** CC0"), "b": place(tmp_path, "b")}
    assert licence_of(DataConfig(source=Domains(paths=paths))) == "- `a`: CC0\n- `b`: Not stated."
    assert licence_of(DataConfig(source=Domains(paths={"b": paths["b"]}))) == ""
    small = Domains(paths={"films": "", "b": paths["b"]})
    assert licence_of(DataConfig(source=small)) == f"- `films`: {EMBEDDED}\n- `b`: Not stated."


@pytest.mark.shared_data
def test_shops_are_not_published_under_the_terms_of_films(shared_data, monkeypatch, repository):
    monkeypatch.setenv("JAXREC_DATA", str(shared_data))
    found = licence_of(load_config(f"{repository}/configs/amazon_domains.py").data)
    assert "MovieLens" not in found
    assert [line.split(":")[0] for line in found.splitlines()] == [
        "- `beauty`",
        "- `sports`",
        "- `industrial`",
    ]
