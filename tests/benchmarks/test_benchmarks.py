"""The benchmark programs' own arithmetic: a benchmark that cannot fail shows nothing."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.histories import Histories
from jaxrec.embedding.table import TableSpec
from jaxrec.metrics.binary import auc
from jaxrec.training.checkpoint import Checkpoints


@pytest.mark.parametrize(
    ("value", "limit", "at_most", "met"),
    [(4.0, 4.0, False, True), (3.99, 4.0, False, False), (0, 0, True, True), (1, 0, True, False)],
)
def test_bar_holds_at_its_limit(module, value, limit, at_most, met):
    assert module("record").Bar(name="x", value=value, limit=limit, at_most=at_most).met is met


@pytest.mark.parametrize("at_most", [False, True])
def test_nan_meets_no_bar(module, at_most):
    assert not module("record").Bar(name="x", value=float("nan"), limit=1.0, at_most=at_most).met


@pytest.mark.parametrize(("value", "status", "verdict"), [(2.0, 0, "PASS"), (0.5, 1, "FAIL")])
def test_finish_writes_the_figures_and_says_the_verdict_last(
    module, tmp_path, capsys, value, status, verdict
):
    record = module("record")
    bar = record.Bar(name="speed", value=value, limit=1.0)
    assert record.finish("probe", {"speed": value}, [bar], results=tmp_path) == status
    assert capsys.readouterr().out.splitlines()[-1] == f"probe: {verdict}"
    document = json.loads((tmp_path / "probe.json").read_text())
    assert document["figures"] == {"speed": value}
    assert document["bars"][0]["met"] is (status == 0)
    assert {"command", "commit", "load_average", "machine"} <= document.keys()


def test_no_bars_is_no_pass(module, tmp_path):
    assert module("record").finish("probe", {}, [], results=tmp_path) == 1


def test_training_flops_are_those_of_the_matrix_products(module):
    dim, mlp_dim, length, num_items, rows = 8, 16, 4, 10, 3

    def forward(x, qkvo, mlp_in, mlp_out, items):
        q, k, v = (x @ qkvo[i] for i in range(3))
        attended = jnp.einsum("bqk,bkd->bqd", jnp.einsum("bqd,bkd->bqk", q, k), v) @ qkvo[3]
        return (attended @ mlp_in @ mlp_out) @ items

    shapes = [(rows, length, dim), (4, dim, dim), (dim, mlp_dim), (mlp_dim, dim), (dim, num_items)]
    arguments = [jnp.zeros(shape) for shape in shapes]
    expected = jax.jit(forward).lower(*arguments).compile().cost_analysis()["flops"]
    found = module("flops").training_flops(
        rows * length, length, rows * length, dim=dim, mlp_dim=mlp_dim, num_layers=1, num_items=num_items
    )
    assert found == pytest.approx(3 * expected)


COMPILED = """
  %all-gather.1 = s32[512]{0} all-gather(%x), dimensions={0}
  %all-gather.2 = f32[512,16]{1,0} all-gather(%rows), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %all-gather-start = (f32[1216,16]{1,0}, f32[9728,16]{1,0}) all-gather-start(%table), dimensions={0}
  %all-reduce.1 = f32[9728,16]{1,0} all-reduce(%all-gather.2), to_apply=%add
"""


def test_a_gathered_table_is_found_among_honest_gathers(module):
    inspect_step = module("inspect_step")
    shapes = inspect_step.all_gathers(COMPILED)
    assert shapes == [[512], [512, 16], [9728, 16]]
    setup = types.SimpleNamespace(
        tables={"item": TableSpec(num_rows=9725, dim=16), "bias": TableSpec(num_rows=9725, dim=1)}
    )
    mesh = types.SimpleNamespace(size=8)
    assert [inspect_step.of_a_table(shape, setup, mesh) for shape in shapes] == [False, False, True]
    assert inspect_step.of_a_table([9728], setup, mesh), "a bias table has the rows, if not the size"
    assert inspect_step.of_a_table([8, 1216, 1], setup, mesh)


def test_a_changed_bit_of_a_checkpoint_is_a_difference(module, tmp_path):
    runs, kill_resume = module("training_runs"), module("kill_resume")
    for name, value in (("a", 1.0), ("b", 1.0), ("c", np.nextafter(np.float32(1), np.float32(2)))):
        with Checkpoints(str(tmp_path / name / "checkpoints"), keep=1, save_every_steps=1) as checkpoints:
            checkpoints.save(3, {"tables": {"item": jnp.full((4, 2), value)}, "step": jnp.int32(3)})
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5}\n{"step": 4, "lo')
    run = {name: runs.Run(config="x.py", workdir=tmp_path / name) for name in "abc"}
    assert kill_resume.differences(run["a"], run["b"]) == []
    assert kill_resume.differences(run["a"], run["c"]) == ["checkpoints: tables.item"]
    assert runs.losses(tmp_path / "a") == {3: 1.5}


def test_missing_steps_are_an_infinite_difference(module):
    compare = module("mesh_parity").largest_relative_difference
    assert compare({1: 2.0, 2: 1.0002}, {1: 2.0, 2: 1.0}) == pytest.approx(2e-4)
    assert compare({1: 2.0}, {1: 2.0, 2: 1.0}) == float("inf")
    assert compare({}, {}) == float("inf")


def test_promises_hold_for_the_worst_seed(module):
    promises, suite = module("promises"), module("suite")
    promise = next(one for one in promises.PROMISES if one.variant.name == "ml1m_sasrec")

    def seed(ndcg: float, transition: float = 0.1597):
        baselines = {"transition": {"ndcg@10": transition}}
        sittings = [{"seconds": 3000.0, "processor_seconds": 3600.0}]
        figures = {"metrics": {"ndcg@10": ndcg, "hr@10": 0.31}, "baselines": baselines, "sittings": sittings}
        return suite.Seed(figures, np.zeros(0, np.int64))

    assert all(bar.met for bar in promises.check(promise, [seed(0.176), seed(0.18)]))
    assert not all(bar.met for bar in promises.check(promise, [seed(0.176), seed(0.174)]))
    assert not all(bar.met for bar in promises.check(promise, [seed(0.176, transition=0.163)]))


def test_variants_are_compared_on_the_mean_of_their_seeds(module):
    suite, random = module("suite"), np.random.default_rng(0)
    worse = [suite.Seed({}, random.integers(0, 20, 500)) for _ in range(3)]
    better = [suite.Seed({}, np.maximum(seed.ranks - 4, 0)) for seed in worse]
    found = suite.compare_variants(worse, better)
    assert found.low > 0
    assert suite.paired_bar("x", found).met
    assert not suite.paired_bar("x", suite.compare_variants(worse, worse)).met
    others = [dataclasses.replace(seed, users=np.arange(500)) for seed in better]
    with pytest.raises(ValueError, match="ranked other users"):
        suite.compare_variants(worse, others)


def test_an_override_of_a_stage_is_for_the_configs_that_have_it(module, repository, monkeypatch):
    monkeypatch.chdir(repository)
    suite = module("suite")
    given = types.SimpleNamespace(override=["num_train_steps=2", "stages.pretrain.num_train_steps=3"])
    names = ("configs/ml1m_pretrain.py", "configs/ml1m_pretrain.py:scratch")
    staged, plain = (suite.tried(suite.Variant(name="v", config=name), given).overrides for name in names)
    assert (staged, plain) == (tuple(given.override), ("num_train_steps=2",))


def test_a_kept_seed_is_read_until_its_config_changes(module, tmp_path, repository, monkeypatch):
    monkeypatch.chdir(repository)
    suite, trained = module("suite"), []

    def train(run, name):
        trained.append(name)
        (run.workdir).mkdir(parents=True, exist_ok=True)
        evaluation = {
            "metrics": dict.fromkeys(suite.SHOWN, 0.1),
            "intervals": {},
            "baselines": {},
            "paired": {},
        }
        (run.workdir / "evaluation.json").write_text(json.dumps(evaluation))
        (run.workdir / "train_seconds.json").write_text('[{"seconds": 60.0}]')
        lines = [{"validation/ndcg@10": value} for value in (0.1, 0.3, 0.2)]
        (run.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        table = pa.table({"user_id": [5, 7], "rank": [0, 3]})
        pq.write_table(table, run.workdir / "ranks.parquet")
        if "cold" in run.workdir.name:
            evaluation["cold_items"] = {"num_targets": 1}
            (run.workdir / "evaluation.json").write_text(json.dumps(evaluation))
            pq.write_table(table.slice(1), run.workdir / "cold_ranks.parquet")

    monkeypatch.setattr(suite, "train_and_evaluate", train)
    results = tmp_path / "results"
    for overrides in ((), (), ("num_train_steps=7",)):
        variant = suite.Variant(name="v", config="configs/debug.py", overrides=overrides, data="set")
        # The data may lie elsewhere the next time.
        seeds = suite.run_seeds(variant, 2, tmp_path / str(len(trained)), tmp_path / "runs", results)
        assert [seed.ranks.tolist() for seed in seeds] == [[0, 3]] * 2
    assert trained == ["v, seed 0", "v, seed 1"] * 2
    assert seeds[0].users.tolist() == [5, 7] and seeds[0].figures["validation"] == 0.3
    drawn = suite.Variant(name="cold", config="configs/debug.py", overrides=("data.cold_items.seed={seed}",))
    drawn = dataclasses.replace(drawn, overrides=("data.cold_items=ColdItems", *drawn.overrides))
    seeds = suite.run_seeds(drawn, 2, tmp_path, tmp_path / "runs", results)
    assert [seed.figures["config"]["data"]["cold_items"]["seed"] for seed in seeds] == [0, 1]
    assert (seeds[1].cold_users.tolist(), seeds[1].cold_ranks.tolist()) == ([7], [3])


@pytest.fixture
def multitask(module):
    """The program, six events of each of eight users, and predictions of every variant for the last four of them."""
    program = module("multitask")
    rng = np.random.default_rng(0)
    labels = (rng.random((48, 4)) < 0.5).astype(np.int8)
    histories = Histories(
        offsets=np.arange(0, 49, 6),
        item_ids=rng.integers(1, 6, 48).astype(np.int32),
        timestamps=np.arange(48),
        labels=labels,
    )
    dataset = PreparedDataset.from_histories(
        histories, num_items=5, behaviours=program.BEHAVIOURS, train_end=np.full(8, 2),
        validation_end=np.full(8, 2),
    )  # fmt: skip
    asked = np.arange(48) % 6 >= 2
    events = {
        "user_id": dataset.user_keys[np.repeat(np.arange(8), 4)],
        "item_id": dataset.item_keys[histories.item_ids[asked] - 1],
    }

    def columns(variant, seed):
        learned = program.BEHAVIOURS if variant in program.JOINT else [variant.removeprefix("single_")]
        found = dict(events)
        noise = np.random.default_rng([seed, program.VARIANTS.index(variant)])
        for name in ["long_view"] if variant == "second_stage" else learned:
            label = labels[asked, program.BEHAVIOURS.index(name)]
            found |= {name: label, f"{name}_logit": label + noise.normal(size=32).astype(np.float32)}
        if variant == "esmm":
            found["long_view_logit"] = np.minimum(found["long_view_logit"], found["click_logit"])
        return found

    return program, dataset, columns


def test_counting_takes_the_rates_of_the_training_events(multitask):
    program, dataset, columns = multitask
    events = columns("joint", 0)
    found = program.counted_logits(dataset, events)["comment"]
    histories = dataset.histories(np.arange(8))
    users, comments = np.repeat(np.arange(8), 6), histories.labels[:, 3]
    trained = np.arange(48) % 6 < 2
    mean = comments[trained].mean()
    for place, (user, item) in enumerate(zip(events["user_id"], events["item_id"], strict=True)):
        expected = 0.0
        for of, prior in (
            (dataset.user_keys[users] == user, 10),
            (dataset.item_keys[histories.item_ids - 1] == item, 5),
        ):
            rate = (comments[trained & of].sum() + prior * mean) / (np.sum(trained & of) + prior)
            expected += np.log(rate / (1 - rate))
        assert found[place] == pytest.approx(expected)


def test_the_comparison_of_variants_runs_through(multitask, monkeypatch, tmp_path, capsys):
    program, dataset, columns = multitask
    run = {"minutes": 1.0, "command": "python -m jaxrec.train"}
    monkeypatch.setattr(program, "run_variant", lambda variant, seed, _: (run, columns(variant, seed)))
    monkeypatch.setattr(program.PreparedDataset, "open", lambda path: dataset)
    monkeypatch.setattr("sys.argv", ["multitask.py", "--seeds=2", f"--results={tmp_path}"])
    program.main()
    assert capsys.readouterr().out.splitlines()[-1].startswith("quality_multitask: ")
    document = json.loads((tmp_path / "quality_multitask.json").read_text())
    figures = document["figures"]
    assert len(figures["runs"]) == 2 * len(program.VARIANTS)
    assert set(figures["auc"]) == {*program.BEHAVIOURS, "long_view given click"}
    assert figures["violations"]["esmm"] == [0, 0]
    assert min(figures["violations"]["joint"]) > 0
    expected = [
        auc(columns("joint", seed)["comment_logit"], columns("joint", 0)["comment"]) for seed in (0, 1)
    ]
    assert figures["auc"]["comment"]["joint"]["auc_of_seeds"] == pytest.approx(expected)
    rows = {(row["of"], row["against"], row["asked"]): row for row in figures["comparisons"]}
    assert len(rows) == 4 * 4 + 2 + 2 + 2
    one = rows["joint", "single", "comment"]
    assert one["difference"] == pytest.approx(
        figures["auc"]["comment"]["joint"]["auc"] - figures["auc"]["comment"]["single"]["auc"]
    )
    assert one["adjusted_p_value"] >= one["p_value"]


def test_runs_that_judged_other_events_are_not_compared(multitask):
    program, _, columns = multitask
    runs = {variant: [columns(variant, 0)] for variant in program.VARIANTS}
    runs["mmoe"][0]["item_id"] = runs["mmoe"][0]["item_id"][::-1]
    with pytest.raises(AssertionError, match="item_id: the runs judged other events"):
        program.report(runs, {})
