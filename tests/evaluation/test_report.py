import html.parser
import math
import re

import pytest

from jaxrec.evaluation import plots, report_elements
from jaxrec.evaluation.report import ExampleUser, best_baseline, render_report, write_report

KS = (1, 5, 10)
NASTY = "<script>alert('x')</script> $1 & 千と千尋 \N{RIGHT-TO-LEFT OVERRIDE}"


def metrics(scale):
    named = {f"{name}@{k}": scale * k / 10 for name in ("hr", "recall", "ndcg", "mrr") for k in KS}
    return named | {"mrr": scale / 2}


def evaluation(**changes):
    model = metrics(0.2)
    values = {
        "dataset": "small",
        "protocol": "leave-one-out",
        "split": "test",
        "filter_seen": True,
        "num_users": 60,
        "num_items": 1234,
        "metrics": model,
        "intervals": {name: [value * 0.9, value * 1.1] for name, value in model.items()},
        "baselines": {"popularity": metrics(0.05), "item_knn": metrics(0.15)},
        "baselines_refused": {"ease": "70,000 items are too many"},
        "paired": {
            "popularity": {"ndcg@10": {"difference": 0.15, "interval": [0.1, 0.2]}},
            "item_knn": {"ndcg@10": {"difference": 0.05, "interval": [-0.01, 0.1]}},
        },
        "headline_metric": "ndcg@10",
        "confidence": 0.95,
        "slices": {
            "item_popularity": [
                {"name": name, "num_users": 30, "metrics": {"model": metrics(0.2), "item_knn": metrics(0.1)}}
                for name in ("head (>= 9 events)", "cold (never in training)")
            ]
        },
        "beyond_accuracy": {"model": {"coverage@10": 0.5}, "popularity": {"coverage@10": None}},
        "behaviours": {
            "like": {
                "auc": 0.7,
                "alpha": 0.4,
                "calibration": {"predicted": [0.1, 0.9], "observed": [0.2, 0.8]},
            },
            "_finish": {"auc": None, "alpha": 0.5, "calibration": {"predicted": [], "observed": []}},
        },
        "timing": {"users_per_second": 3000.0, "seconds": 0.02},
        "users_left_out": {"without_history": 3},
        "model": {"name": "last_item", "step": 7},
        "command": "python -m jaxrec.evaluate --workdir=w",
    }
    return values | changes


HISTORY = [
    {
        "step": step,
        "loss": 5.0 / step,
        "loss/next_item": 4.0 / step,
        "events_per_second": 100.0,
        "gradient_norm": 1.0,
    }
    | ({"validation/ndcg@10": step / 100, "validation/hr@10": step / 50} if step % 5 == 0 else {})
    for step in range(1, 21)
]
EXAMPLES = [
    ExampleUser(user_id="u<1>", history=["a"] * 30, recommendations=["b", NASTY], target=NASTY, rank=1),
    ExampleUser(user_id="2", history=[], recommendations=[]),
]


class Page(html.parser.HTMLParser):
    """What a browser would see: balanced tags, ids, and everything that points outside."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.links, self.text = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[name] for name in ("href", "src", "xlink:href", "data") if values.get(name)]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page(**changes):
    text = render_report(evaluation(**changes), HISTORY, EXAMPLES, {"data": {"path": NASTY}})
    return text, Page(text)


def test_the_page_is_whole_and_needs_nothing_else():
    text, found = page()
    assert len(found.ids) == len(set(found.ids))
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links), found.links
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    outside = set(re.findall(r"https?://[^\"' <]+", text))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    for color in (*plots.SERIES, plots.INK, plots.FAINT, plots.GRID):
        assert color not in text, "a stand-in colour was not replaced"


def test_text_from_the_data_is_shown_and_never_run():
    text, found = page(dataset=NASTY, command=NASTY, protocol=NASTY)
    assert "<script" not in text
    assert NASTY in "".join(found.text)


def test_every_part_is_shown():
    _, found = page()
    words = " ".join(" ".join(found.text).split())
    for expected in (
        "last_item on small", "0.2000", "item-kNN", "EASE is missing: 70,000 items are too many", "Loss by task",
        "Validation NDCG", "Throughput", "NDCG@10 by item popularity", "coverage@10", "Calibration", "User u<1>",
        "30 events", "which stands at rank 2", "data.path", "1,234 items", "3,000",
        "python -m jaxrec.evaluate --workdir=w",
    ):  # fmt: skip
        assert expected in words, expected


def test_drawings_describe_themselves():
    text, found = page()
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', text)
    assert len(labels) == found.tags.count("svg") >= 8
    assert any("model 0.2000" in label for label in labels)


def test_a_funnel_says_what_it_counted():
    counts = {"first": "<click>", "num_events": 4183, "labels": 23, "predicted": 0, "calibrated": 1}
    text = render_report(evaluation(funnels={"long_view": counts}), [], [], {})
    assert "long_view without &lt;click&gt;: 23 of 4,183 labels, 0 predictions." in text


def test_parts_that_are_absent_are_left_out():
    bare = {
        name: evaluation()[name]
        for name in (
            "dataset",
            "protocol",
            "split",
            "filter_seen",
            "num_users",
            "num_items",
            "metrics",
            "intervals",
        )
    }
    text = render_report(bare, [], [], {})
    Page(text)
    assert "Behaviours" not in text
    assert "Training" not in text


def test_the_same_numbers_give_the_same_page():
    assert page()[0] == page()[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_metric_that_broke_leaves_a_gap_in_its_curve(bad):
    history = [*HISTORY, {"step": 21, "loss/next_item": bad}]
    Page(render_report(evaluation(), history, [], {}))


def test_a_crash_while_writing_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_report(path, evaluation())
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_report(path, evaluation(dataset="other"))
    assert path.read_bytes() == before


def test_the_best_baseline_is_named():
    assert best_baseline(evaluation(), "ndcg@10") == "item_knn"
    assert best_baseline(evaluation(baselines={}), "ndcg@10") is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (True, "True"), (12345, "12,345"), (0.12345, "0.1235"), (1234.56, "1,234.6"), ("x", "x")],
)
def test_numbers_read_well(value, shown):
    assert report_elements.number(value) == shown


def test_a_behaviour_without_known_labels_hides_no_column_of_the_others():
    unknown = {"auc": None, "log_loss": None, "alpha": 0.5, "calibration": {"scale": 1.0, "bias": 0.0}}
    known = unknown | {"auc": 0.7, "log_loss": 0.4, "expected_calibration_error_before": 0.1}
    page = render_report(evaluation(behaviours={"like": unknown, "finish": known}), [], [], {})
    for name in ("auc", "log loss", "expected calibration error before"):
        assert f'<th scope="col">{name}</th>' in page
    assert "<td>0.7000</td>" in page
