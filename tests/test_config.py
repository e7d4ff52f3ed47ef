"""The config machinery: overrides, JSON, files, checks, and the rule of what may change when a run is resumed."""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.config import (
    TrainConfig,
    apply_overrides,
    describe_fields,
    from_json,
    load_config,
    parse_train_arguments,
    read_run_config,
    resume_differences,
    split_overrides,
    to_json,
    validate,
    write_run_config,
)
from jaxrec.config.fields import field_docs, type_name
from jaxrec.config.overrides import format_value, parse_value
from jaxrec.config.run import MAY_CHANGE
from jaxrec.data.config import DataConfig, GlobalTime, LeaveOneOut, QueryConfig
from jaxrec.data.domains import Domains
from jaxrec.data.social import Social
from jaxrec.embedding.row_optimizer import RowAdagrad
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.models.item_text import TextTower
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.compressed_attention import HistoryCompression
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.base import Task
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.masked_item import MaskedItem
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.balance import GradientSurgery


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Base of the shapes."""

    scale: float = 1.0

    def __post_init__(self):
        if self.scale <= 0:
            raise ValueError(f"scale={self.scale} must be above 0.")


@dataclass(frozen=True, kw_only=True)
class Circle(Shape):
    radius: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Square(Shape):
    side: int = 2
    upper: int = 3

    def __post_init__(self):
        super().__post_init__()
        if self.side >= self.upper:
            raise ValueError(f"side={self.side} must be below upper={self.upper}.")


@dataclass(frozen=True, kw_only=True)
class Unrelated:
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """Says nothing for itself."""

    file: str
    names: Mapping[str, str]
    shape: Shape
    rows: int = 1

    def __post_init__(self):
        if self.rows < 1:
            raise ValueError(f"rows={self.rows} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A toy.

    Attributes:
      count: how many,
        at least one.
      rate, limit: two of
        a kind.
    """

    count: int = 1
    rate: float = 0.5
    flag: bool = False
    text: str = ""
    pair: tuple[int, int] = (1, 2)
    words: tuple[str, ...] = ()
    limit: float | None = None
    either: int | str = 0
    mode: Literal["a", "b"] = "a"
    level: Literal[1, 2] = 1
    shape: Shape = Circle()
    split: LeaveOneOut | GlobalTime = LeaveOneOut()
    maybe: Unrelated | None = None
    place: Place | None = None
    places: Mapping[str, Place] = dataclasses.field(default_factory=dict)
    optional_shape: Shape | None = None
    shapes: Mapping[str, Shape] = dataclasses.field(default_factory=lambda: {"first": Circle()})
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DottedTask(Task):
    """A task of a user's own."""

    sharpness: float = 2.0


def changed(*overrides, config=None):
    return apply_overrides(config if config is not None else Toy(), [f"--config.{one}" for one in overrides])


def train_config(**changes) -> TrainConfig:
    values = {
        "name": "toy",
        "tasks": {"next_item": NextItem()},
        "num_train_steps": 10,
        "global_batch_size": 16,
    }
    return TrainConfig(**{**values, **changes})


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("count=7", "count", 7),
        ("count=-1_000", "count", -1000),
        ("rate=3e-4", "rate", 3e-4),
        ("rate=2", "rate", 2.0),
        ("rate=inf", "rate", math.inf),
        ("flag=true", "flag", True),
        ("flag=False", "flag", False),
        ("flag=1", "flag", True),
        ("text=", "text", ""),
        ("text=a=b, c", "text", "a=b, c"),
        ("text=none", "text", "none"),
        ("pair=-1,1", "pair", (-1, 1)),
        ("pair=(3, 4)", "pair", (3, 4)),
        ("pair=[3,4]", "pair", (3, 4)),
        ("words=", "words", ()),
        ("words=[]", "words", ()),
        ("words=(title,)", "words", ("title",)),
        ("words=title,genres", "words", ("title", "genres")),
        ('words=["a,b", "c"]', "words", ("a,b", "c")),
        ("limit=none", "limit", None),
        ("limit=0.25", "limit", 0.25),
        ("either=3", "either", 3),
        ("either=x", "either", "x"),
        ("mode=b", "mode", "b"),
        ("level=2", "level", 2),
        ("shape.radius=2", "shape", Circle(radius=2.0)),
        ("shape=Square", "shape", Square()),
        ("split=GlobalTime", "split", GlobalTime()),
        ("maybe=Unrelated", "maybe", Unrelated()),
        ("maybe.scale=4", "maybe", Unrelated(scale=4.0)),
        ("shapes.first.radius=3", "shapes", {"first": Circle(radius=3.0)}),
        ("shapes.second=Square", "shapes", {"first": Circle(), "second": Square()}),
        ("shapes.first=none", "shapes", {}),
        ("weights.a=2.5", "weights", {"a": 2.5}),
    ],
)
def test_an_override_is_typed_by_its_field(override, field, value):
    result = changed(override)
    assert getattr(result, field) == value
    assert type(getattr(result, field)) is type(value)
    assert dataclasses.replace(Toy(), **{field: value}) == result, "nothing else changed"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("count=2.5", r"config\.count='2\.5': expected int"),
        ("count=", "expected int"),
        ("rate=fast", r"config\.rate='fast': expected float"),
        ("rate=nan", "expected float"),
        ("flag=yes", "expected true or false"),
        ("pair=1", r"expected tuple\[int, int\], such as 1,2"),
        ("pair=1,2,3", r"expected tuple\[int, int\]"),
        ("limit=low", r"expected float \| none"),
        ("mode=c", "expected 'a' | 'b'"),
        ("level=3", r"expected 1 \| 2"),
        ("shape=Sqare", "expected one of the classes Circle, Square; did you mean 'Square'"),
        ("shape=Unrelated", r"expected one of the classes Circle, Square\. Or set one field of it"),
        ("maybe=Toy", "expected none or one of the classes Unrelated"),
        ("shapes=Circle", "set its keys one by one"),
        ("cuont=1", r"config has no field 'cuont'; did you mean 'count'\? \(Toy; its fields: count, rate"),
        (
            "radius=1",
            r"config has no field 'radius'; did you mean config\.shape\.radius or config\.shapes\.first",
        ),
        ("shape.side=3", r"config\.shape has no field 'side' \(Circle; its fields: scale, radius\)"),
        (
            "shapes.frist.radius=3",
            r"has no key 'frist'; did you mean 'first'\?.*To add it: --config\.shapes\.frist=CL",
        ),
        ("shapes.second=none", r"has no key 'second' \(mapping; its keys: first\)"),
        ("count.x=1", r"config\.count is 1 and has no field 'x'; write --config\.count=VALUE"),
        ("shape.scale=-1", r"scale=-1\.0 must be above 0.*set by config\.shape\.scale"),
        ("split.test_quantile=0.9", r"config\.split has no field 'test_quantile'"),
    ],
)
def test_a_wrong_override_says_what_is_right(override, message):
    with pytest.raises(ValueError, match=message):
        changed(override)


@pytest.mark.parametrize(
    "argument", ["--config.count", "--config.=1", "--config.a..b=1", "count=1", "--other.count=1"]
)
def test_the_form_of_an_override(argument):
    with pytest.raises(ValueError, match=r"is not an override; write --config\.FIELD=VALUE"):
        apply_overrides(Toy(), [argument])


def test_overrides_are_applied_together():
    # Each alone is refused: side must stay below upper.
    start = dataclasses.replace(Toy(), shape=Square())
    assert changed("shape.side=7", "shape.upper=8", config=start).shape == Square(side=7, upper=8)
    assert changed("shape.radius=2", "shape=Circle", "shape.radius=5", config=start).shape == Circle(
        radius=5.0
    )


PLACE = ("file=x", "names.a.b=y", "shape=Square", "shape.upper=9")


@pytest.mark.parametrize("named", [(), ("place=Place",)])
def test_a_class_with_required_fields_is_made_of_the_overrides_below_it(named):
    expected = Place(file="x", names={"a.b": "y"}, shape=Square(upper=9))
    below = [f"place.{one}" for one in PLACE]
    assert changed(*below, *named).place == expected
    assert changed("places.new=Place", *(f"places.new.{one}" for one in PLACE)).places == {"new": expected}
    again = changed("place.rows=2", config=Toy(place=expected)).place
    assert again == dataclasses.replace(expected, rows=2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["place=Place", "place.shape=Circle"],
            r"config\.place: Place needs file, names; give --config\.place\.file=VALUE "
            r"--config\.place\.names\.KEY=VALUE\.$",
        ),
        (["place.rows=2"], r"Place needs file, names, shape; .* --config\.place\.shape=Circle\|Square\.$"),
        (["places.new=Place"], r"config\.places\.new: Place needs file"),
        (["place=Place", "place.fil=x"], r"config\.place has no field 'fil'; did you mean 'file'"),
        ([f"place.{one}" for one in (*PLACE, "rows=0")], r"rows=0 must be at least 1\..*set by config\.place\.file"),
        (["shape=Square", "shape.side=5"], r"side=5 must be below upper=3\. \(set by config\.shape\.side\)"),
        (
            ["optional_shape.scale=2"],
            r"is None and has no field 'scale'; set it first: --config\.optional_shape=CLASS, with CLASS one of "
            "Circle, Square",
        ),
    ],
)  # fmt: skip
def test_a_class_that_lacks_a_field_says_how_to_give_it(overrides, message):
    with pytest.raises(ValueError, match=message):
        changed(*overrides)


def test_the_real_classes_with_required_fields():
    queries = apply_overrides(DataConfig(), ["--data.queries.file=tags.parquet"], prefix="data").queries
    assert queries == QueryConfig(file="tags.parquet")
    source = ("data.source=Social", "data.source.path=x")
    made = changed(*source, "data.source.edges=y", config=train_config()).data.source
    assert made == Social(path="x", edges="y")
    with pytest.raises(ValueError, match=r"Social needs edges; give --config\.data\.source\.edges=VALUE\.$"):
        changed(*source, config=train_config())
    domains = changed("data.source=Domains", "data.source.paths.a=DIR", config=train_config()).data.source
    assert domains == Domains(paths={"a": "DIR"})


def test_another_prefix():
    data = apply_overrides(DataConfig(), ["--data.columns.value.at_least=3.5"], prefix="data")
    assert data.columns.value.at_least == 3.5
    assert split_overrides(["--data.path=x", "--out=y", "--database.x=1"], prefix="data") == (
        ["--data.path=x"],
        ["--out=y", "--database.x=1"],
    )


def test_the_real_tree():
    config = changed(
        "optimizer.learning_rate=3e-4",
        "tasks.next_item.weight=2",
        "tasks.masked=MaskedItem",
        "tasks.masked.mask_rate=0.3",
        "data.split=GlobalTime",
        "mesh_shape=2,4",
        "row_optimizer=RowAdagrad",
        "model.encoder.dtype=bfloat16",
        config=train_config(),
    )
    assert config.optimizer.learning_rate == 3e-4
    assert config.tasks == {"next_item": NextItem(weight=2.0), "masked": MaskedItem(mask_rate=0.3)}
    assert (config.data.split, config.mesh_shape) == (GlobalTime(), (2, 4))
    assert config.row_optimizer == RowAdagrad()
    assert config.model.encoder.dtype == "bfloat16"
    assert train_config().tasks == {"next_item": NextItem()}, "the original is untouched"


finite = st.floats(allow_nan=False)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
toys = st.builds(
    Toy,
    count=st.integers(),
    rate=finite,
    flag=st.booleans(),
    text=words,
    pair=st.tuples(st.integers(), st.integers()),
    words=st.lists(words, max_size=4).map(tuple),
    limit=st.none() | finite,
    either=st.integers() | words.filter(lambda text: not re.fullmatch(r"\s*[+-]?[\d_]+\s*", text)),
    mode=st.sampled_from(["a", "b"]),
    level=st.sampled_from([1, 2]),
    shape=st.builds(Circle, radius=finite) | st.builds(Square, side=st.integers(max_value=2)),
    split=st.builds(LeaveOneOut, min_events=st.integers(3, 9), validation=st.booleans())
    | st.just(GlobalTime()),
    maybe=st.none() | st.builds(Unrelated, scale=finite),
    shapes=st.dictionaries(words, st.builds(Circle, radius=finite), max_size=3),
    weights=st.dictionaries(words, finite, max_size=3),
)


@given(toys)
def test_json_round_trip(toy):
    assert from_json(to_json(toy), Toy) == toy


@given(toys)
def test_a_written_value_is_read_back(toy):
    for name in ("count", "rate", "flag", "text", "pair", "words", "limit", "either", "mode", "level"):
        annotation = Toy.__annotations__[name]
        assert parse_value(annotation, format_value(getattr(toy, name)), name) == getattr(toy, name)


def outcome(function):
    """(what a ValueError says, result): any other error fails the test."""
    try:
        return "", function()
    except ValueError as error:
        return str(error), None


@given(st.text(max_size=30), st.text(max_size=12))
def test_any_override_works_or_says_why(path, text):
    message, result = outcome(lambda: apply_overrides(Toy(), [f"--config.{path}={text}"]))
    assert message or isinstance(result, Toy)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(
    st.dictionaries(
        st.sampled_from([field.name for field in dataclasses.fields(Toy)]), json_values, max_size=4
    )
)
def test_any_json_is_read_or_refused_with_a_reason(fields):
    name = f"{Toy.__module__}:Toy"
    message, result = outcome(lambda: from_json(json.dumps({"class": name, **fields}), Toy))
    assert message or isinstance(result, Toy)


def test_the_real_tree_as_json():
    config = train_config(
        tasks={"next_item": NextItem(weight=0.5), "own": DottedTask()},
        data=DataConfig(path="a/b", split=GlobalTime()),
    )
    text = to_json(config)
    assert from_json(text, TrainConfig) == config
    assert json.loads(text)["tasks"]["next_item"]["class"] == "jaxrec.tasks.next_item:NextItem"


def test_a_field_that_the_text_lacks_has_its_default():
    tree = json.loads(to_json(Toy(count=3)))
    del tree["rate"]
    assert from_json(json.dumps(tree), Toy) == Toy(count=3)
    del tree["count"]
    assert from_json(json.dumps(tree), Toy).count == 1
    config = json.loads(to_json(train_config()))
    del config["num_train_steps"]
    with pytest.raises(ValueError, match="missing 1 required.*num_train_steps"):
        from_json(json.dumps(config), TrainConfig)


def with_class(name):
    return json.dumps({"class": f"{Toy.__module__}:Toy", "shape": {"class": name}})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os:system", "os has no class system"),
        ("antigravity:x", "is a module of Python itself"),
        ("subprocess:Popen", "is not a Shape"),
        ("jaxrec.tasks.next_item:NextItem", "is not a Shape"),
        ("jaxrec.tasks.next_item:Nothing", "has no class Nothing"),
        ("jaxrec.tasks.next_item", "is not the name of a class"),
        ("jaxrec.nowhere:X", "module jaxrec.nowhere cannot be imported.*PYTHONPATH"),
        ("../evil:X", "is not the name of a class"),
        ("a b:X", "is not the name of a class"),
        ("builtins:__import__", "builtins has no class __import__"),
        (3, "is not the name of a class"),
        (["x"], "is not the name of a class"),
    ],
)
def test_a_class_that_does_not_belong_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        from_json(with_class(name), Toy)


def test_nothing_of_a_foreign_class_runs():
    class Trap:
        def __init__(self, **values):
            raise AssertionError("it ran")

    module = sys.modules[Toy.__module__]
    module.Trap = Trap
    try:
        with pytest.raises(ValueError, match="is not a Shape"):
            from_json(with_class(f"{Toy.__module__}:Trap"), Toy)
    finally:
        del module.Trap


def test_a_class_of_a_users_own_module(tmp_path, monkeypatch):
    (tmp_path / "my_own_tasks.py").write_text(
        "import dataclasses\n"
        "from jaxrec.tasks.base import Task\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True)\n"
        "class Mine(Task):\n"
        "    depth: int = 3\n"
    )
    text = to_json(train_config()).replace("jaxrec.tasks.next_item:NextItem", "my_own_tasks:Mine")
    text = json.dumps({**json.loads(text), "tasks": {"mine": {"class": "my_own_tasks:Mine", "depth": 5}}})
    with pytest.raises(ValueError, match="module my_own_tasks cannot be imported"):
        from_json(text, TrainConfig)
    monkeypatch.syspath_prepend(tmp_path)
    config = from_json(text, TrainConfig)
    assert config.tasks["mine"].depth == 5
    assert to_json(config).count("my_own_tasks:Mine") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"class": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", r"config is \[1\], and its type is Toy"),
        (json.dumps({"count": 1}), "its type is Toy"),
        (
            json.dumps({"class": f"{Toy.__module__}:Toy", "cuont": 1}),
            "no field 'cuont'; did you mean 'count'",
        ),
        (
            json.dumps({"class": f"{Toy.__module__}:Toy", "count": True}),
            "config.count is true, and its type is int",
        ),
        (
            json.dumps({"class": f"{Toy.__module__}:Toy", "count": 1.0}),
            "config.count is 1.0, and its type is int",
        ),
        (json.dumps({"class": f"{Toy.__module__}:Toy", "flag": 1}), "its type is bool"),
        (json.dumps({"class": f"{Toy.__module__}:Toy", "pair": [1]}), r"its type is tuple\[int, int\]"),
        (json.dumps({"class": f"{Toy.__module__}:Toy", "mode": "c"}), "its type is 'a' | 'b'"),
        (
            json.dumps({"class": f"{Toy.__module__}:Toy", "shapes": {"x": 1}}),
            "config.shapes.x is 1, and its type is Sh",
        ),
    ],
)
def test_json_that_does_not_fit(text, message):
    with pytest.raises(ValueError, match=message):
        from_json(text, Toy)


def test_what_json_cannot_hold():
    with pytest.raises(ValueError, match=r"config\.text is a object"):
        to_json(Toy(text=object()))

    @dataclass(frozen=True)
    class Local:
        x: int = 1

    with pytest.raises(ValueError, match="move it to a module of its own"):
        to_json(Local())


def write_config_file(directory: Path, body: str, name: str = "run.py") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text(body)
    return path


CONFIG_BODY = """
import dataclasses
from jaxrec.config import TrainConfig
from jaxrec.tasks.next_item import NextItem

def get_config() -> TrainConfig:
    return TrainConfig(name="run", tasks={"next_item": NextItem()}, num_train_steps=20, global_batch_size=8)

def tiny(steps: int = 2) -> TrainConfig:
    return dataclasses.replace(get_config(), num_train_steps=steps)

def wrong():
    return 3

def needs(a):
    return a

def _private():
    return get_config()
"""


def test_a_config_file_and_its_variants(tmp_path):
    path = write_config_file(tmp_path, CONFIG_BODY)
    assert load_config(str(path)).num_train_steps == 20
    assert load_config(f"{path}:tiny").num_train_steps == 2
    with pytest.raises(ValueError, match=r"no variant 'tinny' \(its variants: get_config, tiny, wrong\)"):
        load_config(f"{path}:tinny")
    for hidden in ("_private", "needs", "TrainConfig"):
        with pytest.raises(ValueError, match="no variant"):
            load_config(f"{path}:{hidden}")
    with pytest.raises(ValueError, match=r"wrong\(\) of .* returned a int; it must return a TrainConfig"):
        load_config(f"{path}:wrong")


def test_the_example_of_the_documentation(tmp_path, repository):
    page = (repository / "docs" / "configuration.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    path = write_config_file(tmp_path, "\n\n".join(blocks), "shop.py")
    assert load_config(str(path)).name == "shop"
    assert load_config(f"{path}:bfloat16").model.encoder.dtype == "bfloat16"
    base = load_config(str(path))
    for example in re.findall(r"`((?:--config\.[a-z_.]+=[^ `]+ ?)+)`", page):
        overrides = example.split()
        if "behaviour=none" in example or "DIR" in example:
            continue  # the example has no such task; DIR stands for a path
        assert apply_overrides(base, overrides) != base or "none" in example or "[]" in example, example
    for name in MAY_CHANGE:
        assert f"`{name}" in page, f"{name} may change, and the page should say so"


def test_a_config_file_imports_its_neighbour(tmp_path, monkeypatch):
    write_config_file(tmp_path / "own_configs", CONFIG_BODY, "base_run.py")
    path = write_config_file(
        tmp_path / "own_configs",
        "import dataclasses\nfrom own_configs import base_run\n"
        "def get_config():\n    return dataclasses.replace(base_run.get_config(), mesh_shape=(8, 1))\n",
        "wide.py",
    )
    before = list(sys.path)
    assert load_config(str(path)).mesh_shape == (8, 1)
    assert sys.path == before
    for name in ("own_configs", "own_configs.base_run"):
        monkeypatch.delitem(sys.modules, name)


def test_a_config_file_that_is_not_there_or_fails(tmp_path):
    write_config_file(tmp_path, CONFIG_BODY, "quickstart.py")
    with pytest.raises(
        ValueError, match=r"no config file .*quikstart\.py; did you mean .*quickstart\.py\? There are: "
    ):
        load_config(str(tmp_path / "quikstart.py"))
    with pytest.raises(ValueError, match="give the path of a .py file"):
        load_config(str(tmp_path / "nowhere" / "x"))
    for body, message in [
        ("x = 1\n1 / 0\n", r"bad\.py, line 2: ZeroDivisionError: division by zero"),
        ("def get_config(:\n", r"bad\.py, line 1: SyntaxError"),
        (
            "from jaxrec.training.optimizer import OptimizerConfig\n"
            "def get_config():\n    return OptimizerConfig(learning_rat=1)\n",
            r"bad\.py, line 3: TypeError: .*unexpected keyword argument 'learning_rat'",
        ),
        (
            "from jaxrec.training.optimizer import OptimizerConfig\n"
            "def get_config():\n    return OptimizerConfig(learning_rate=-1)\n",
            r"bad\.py, line 3: optimizer\.learning_rate=-1 must not be negative",
        ),
    ]:
        bad = write_config_file(tmp_path, body, "bad.py")
        with pytest.raises(ValueError, match=message):
            load_config(str(bad))
    empty = write_config_file(tmp_path, "", "empty.py")
    with pytest.raises(ValueError, match="it has none"):
        load_config(str(empty))


def test_a_class_of_a_config_file_is_refused_where_it_would_be_lost(tmp_path):
    path = write_config_file(
        tmp_path,
        CONFIG_BODY + "@dataclasses.dataclass(frozen=True, kw_only=True)\nclass Mine(NextItem):\n    pass\n"
        "def mine():\n    return dataclasses.replace(get_config(), tasks={'mine': Mine()})\n",
    )
    config = load_config(f"{path}:mine")
    with pytest.raises(ValueError, match=r"config\.tasks\.mine: class Mine is defined in a config file"):
        to_json(config)


def test_the_command_line(tmp_path, capsys):
    path = write_config_file(tmp_path, CONFIG_BODY)
    arguments = parse_train_arguments(
        "Trains.", [f"--config={path}:tiny", "--workdir", "runs/x", "--config.tasks.next_item.weight=3"]
    )
    assert arguments.workdir == Path("runs/x")
    assert arguments.config.tasks["next_item"].weight == 3
    for wrong, message in [
        (["--workdir=x"], "--config=FILE is missing"),
        ([f"--config={path}"], "--workdir=DIR is missing"),
        ([f"--config={path}", "--workdir=x", "--confg.seed=1"], "unknown argument '--confg.seed=1'"),
        ([f"--config={path}", "--workdir=x", "--config.sed=1"], "did you mean 'seed'"),
        ([f"--config={path}x", "--workdir=x"], "no config file"),
    ]:
        with pytest.raises(SystemExit) as stop:
            parse_train_arguments("Trains.", wrong)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_help_lists_every_field(tmp_path, capsys):
    path = write_config_file(tmp_path, CONFIG_BODY)
    with pytest.raises(SystemExit) as stop:
        parse_train_arguments("Trains.", [f"--config={path}", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--config.optimizer.learning_rate=0.001  (float)\n      peak rate of the dense parameters." in out
    assert "--config.tasks.next_item.weight=1.0  (float)" in out
    assert "--config.mesh_shape=-1,1  (tuple[int, int])" in out
    with pytest.raises(SystemExit):
        parse_train_arguments("Trains.", ["--help"])
    assert "give --config=FILE with --help" in capsys.readouterr().out


def test_a_described_field_can_be_given_back():
    config = train_config()
    lines = [line.strip() for line in describe_fields(config).splitlines() if line.startswith("  --config.")]
    overrides = [re.sub(r"  \([^=]*\)$", "", line) for line in lines]
    assert len(overrides) > 60
    assert apply_overrides(config, overrides) == config


def test_every_field_of_the_run_is_documented():
    missing = {field.name for field in dataclasses.fields(TrainConfig)} - set(field_docs(TrainConfig))
    assert not missing


def test_attribute_sections():
    assert field_docs(Toy) == {
        "count": "how many, at least one.",
        "rate": "two of a kind.",
        "limit": "two of a kind.",
    }
    assert field_docs(Circle) == {}
    assert "weight" in field_docs(NextItem), "bases count"


def test_names_of_types():
    names = {name: type_name(annotation) for name, annotation in Toy.__annotations__.items()}
    assert names["words"] == "tuple[str, ...]"
    assert names["limit"] == "float | none"
    assert names["shapes"] == "Mapping[str, Shape]"


def test_a_good_config_is_valid():
    validate(train_config(), num_devices=8)
    validate(train_config(mesh_shape=(2, 4), accumulation_steps=2), num_devices=8)
    validate(train_config(mesh_shape=(1, 1), global_batch_size=3), num_devices=1)


def with_encoder(**changes):
    return TwoTowerConfig(encoder=EncoderConfig(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 12}, "global_batch_size=12 does not divide evenly over 8 devices; use a multiple of 8, "
                                    "such as 16 or 8"),
        ({"global_batch_size": 4}, "use a multiple of 8, such as 8."),
        ({"accumulation_steps": 4}, "in each of the accumulation_steps=4 microbatches; use a multiple of 32"),
        ({"mesh_shape": (3, 1)}, r"mesh_shape=\(3, 1\) does not fit the 8 devices"),
        ({"mesh_shape": (2, 2)}, "its product must be 8"),
        ({"mesh_shape": (-1, 3)}, "does not fit the 8 devices"),
        ({"mesh_shape": (-1, -1)}, "at most once"),
        ({"mesh_shape": (0, 8)}, "must hold positive numbers"),
        ({"num_train_steps": 0}, "num_train_steps=0 must be at least 1"),
        ({"checkpoint_every_steps": -5}, "checkpoint_every_steps=-5 must be at least 1"),
        ({"accumulation_steps": 0}, "accumulation_steps=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"tasks": {}}, "tasks is empty"),
        ({"tasks": {"a": NextItem(weight=0)}}, r"weights of all tasks \(a\) are 0"),
        ({"tasks": {"a b": NextItem()}}, "task name 'a b'"),
        ({"balance": GradientSurgery()}, "balance=GradientSurgery balances tasks, and 'next_item' is the only one"),
        ({"model": with_encoder(lora_rank=4)}, "lora_rank=4 freezes the kernels that it adapts.*set init_from"),
        ({"init_without": ("item",)}, r"init_without=\('item',\) leaves out parts of nothing; set init_from"),
        ({"model": with_encoder(max_positions=64)}, "history_length=200 is more than model.encoder.max_positions=64"),
        (
            {"tasks": {"judge": Behaviour()}, "evaluation": EvaluationConfig(every_steps=5)},
            "every_steps=5 validates by ranking items, and no task of judge does",
        ),
        (
            {"tasks": {"blanks": MaskedItem()}, "model": with_encoder(compression=HistoryCompression())},
            r"compression groups what is past, and task 'blanks' \(MaskedItem\) reads histories both ways",
        ),
        (
            {"model": TwoTowerConfig(text=TextTower(encoder=EncoderConfig(
                vocab_size=9, type_vocab_size=1, lora_rank=2)))},
            "model.text.encoder.lora_rank=2 freezes the kernels.*set text.checkpoint",
        ),
        (
            {"data": DataConfig(split=LeaveOneOut(validation=False)), "evaluation": EvaluationConfig(every_steps=5)},
            "every_steps=5, but data.split.validation=false",
        ),
    ],
)  # fmt: skip
def test_a_bad_config_names_value_constraint_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(train_config(**changes), num_devices=8)


def test_all_problems_come_at_once():
    with pytest.raises(ValueError, match="has 3 problems:(\n  - .*){3}"):
        validate(train_config(seed=-1, num_train_steps=0, mesh_shape=(3, 3)), num_devices=8)


def differences(before, after):
    return resume_differences(to_json(before), to_json(after))


def test_what_may_change_when_a_run_is_resumed():
    before = train_config()
    harmless = changed(
        "mesh_shape=2,4", "log_every_steps=1", "checkpoint_every_steps=5", "keep_checkpoints=9", "name=again",
        "num_train_steps=50", "model.encoder.remat=true", "model.encoder.attention=full", config=before,
    )  # fmt: skip
    assert differences(before, harmless) == []
    assert differences(before, before) == []


@pytest.mark.parametrize(
    "override",
    ["optimizer.learning_rate=0.5", "seed=3", "global_batch_size=32", "tasks.next_item.weight=2", "data.path=x",
     "model.encoder.num_layers=3", "accumulation_steps=2", "row_optimizer.learning_rate=0.1"],
)  # fmt: skip
def test_what_may_not_change_is_named(override):
    assert differences(train_config(), changed(override, config=train_config())) == [override.split("=")[0]]


def test_classes_and_keys_count_as_fields():
    before = train_config(optimizer=dataclasses.replace(train_config().optimizer, schedule="cosine"))
    assert differences(before, changed("num_train_steps=50", config=before)) == ["num_train_steps"]
    split = changed("data.split=GlobalTime", config=before)
    assert "data.split" in differences(before, split)
    added = differences(before, changed("tasks.masked=MaskedItem", config=before))
    assert "tasks.masked" in added
    assert all(name.startswith("tasks.masked") for name in added)
    assert differences(changed("tasks.masked=MaskedItem", config=before), before) == added


def test_keys_of_plain_values_hold_dots_and_keep_their_order():
    rates = changed("weights.a.*=0", "weights.b=1", "weights.a.b.*=2", config=Toy(weights={"b": 3.0})).weights
    assert list(rates.items()) == [("a.*", 0.0), ("b", 1.0), ("a.b.*", 2.0)]
    assert changed("weights.a.*=none", config=Toy(weights=rates)).weights == {"b": 1.0, "a.b.*": 2.0}
    with pytest.raises(ValueError, match=r"config.weights has no key 'c.d'"):
        changed("weights.c.d=none")


def test_another_order_of_keys_is_another_run():
    before, after = (changed(*some, config=train_config()) for some in (
        ("optimizer.rates.encoder.*=0", "optimizer.rates.item=1"),
        ("optimizer.rates.item=1", "optimizer.rates.encoder.*=0"),
    ))  # fmt: skip
    assert differences(before, before) == []
    assert differences(before, after) == ["the order of keys"]


def test_an_older_run_without_a_newer_field_can_be_resumed():
    tree = json.loads(to_json(train_config()))
    del tree["accumulation_steps"]
    assert resume_differences(json.dumps(tree), to_json(train_config())) == []


def test_a_workdir_belongs_to_one_run(tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match=r"holds no run \(config.json is missing\); train one there first"):
        read_run_config(workdir)
    config = train_config()
    write_run_config(workdir, config, data_fingerprint="abc")
    assert read_run_config(workdir) == config
    write_run_config(workdir, config, data_fingerprint="abc")
    other = changed("optimizer.learning_rate=0.5", "seed=4", config=config)
    with pytest.raises(
        ValueError, match=r"belongs to another run: .*optimizer.learning_rate was 0.001, and is 0.5"
    ) as e:
        write_run_config(workdir, other, data_fingerprint="abc")
    assert "seed was 0, and is 4" in str(e.value)
    assert "another --workdir" in str(e.value)
    assert read_run_config(workdir) == config, "the run's own config is untouched"


def test_harmless_changes_are_kept(tmp_path):
    write_run_config(tmp_path, train_config())
    write_run_config(tmp_path, train_config(mesh_shape=(2, 4)))
    assert read_run_config(tmp_path).mesh_shape == (2, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_data_may_move_while_they_are_the_same(tmp_path):
    write_run_config(tmp_path, train_config(data=DataConfig(path="old")), data_fingerprint="abc")
    moved = train_config(data=DataConfig(path="new"))
    with pytest.raises(ValueError, match='data.path was "old", and is "new"'):
        write_run_config(tmp_path, moved)
    with pytest.raises(ValueError, match="the data set was fingerprint abc, and is xyz"):
        write_run_config(tmp_path, moved, data_fingerprint="xyz")
    write_run_config(tmp_path, moved, data_fingerprint="abc")
    assert read_run_config(tmp_path).data.path == "new"


def test_where_a_run_started_is_seen_from_its_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run_config("runs/b", train_config(init_from="runs/a"))
    assert read_run_config("runs/b").init_from == "../a"
    (tmp_path / "runs").rename(tmp_path / "moved")
    write_run_config("moved/b", train_config(init_from=str(tmp_path / "moved" / "a")))
    with pytest.raises(ValueError, match=r'init_from was "../a", and is "../c"'):
        write_run_config("moved/b", train_config(init_from="moved/c"))


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write_run_config(tmp_path / "run", train_config())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"config": 1}', "nonsense", '{"data_fingerprint": ""}'])
def test_a_config_json_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is not the config of a run"):
        read_run_config(tmp_path)


def test_a_config_json_with_a_bad_field_names_the_file(tmp_path):
    write_run_config(tmp_path, train_config())
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": "zero"'))
    with pytest.raises(ValueError, match=r"config\.json: config\.seed is \"zero\", and its type is int"):
        read_run_config(tmp_path)
