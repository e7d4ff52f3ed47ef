"""The config of a run, composed of the configs of the rooms, and the one place where they are checked together."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from jaxrec.data.config import DataConfig, LeaveOneOut
from jaxrec.embedding.engine import Exchange
from jaxrec.embedding.placement import Placement
from jaxrec.embedding.row_optimizer import Adam, RowOptimizer
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.tasks.base import Task
from jaxrec.tasks.ranking import RankingTask
from jaxrec.training.balance import Balance, FixedWeights
from jaxrec.training.optimizer import OptimizerConfig

INFER = -1


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One of the runs of a config with stages: what it has in place of the config's own; none = the same.

    Attributes:
      init_from: an earlier stage by its name, or the workdir of another run; none = the stage before, for the first
        one the config's `init_from`; "" = fresh.
      init_without: see `TrainConfig`; none = nothing, for the first one the config's.
    """

    data: DataConfig | None = None
    model: TwoTowerConfig | None = None
    tasks: Mapping[str, Task] | None = None
    optimizer: OptimizerConfig | None = None
    row_optimizer: RowOptimizer | None = None
    num_train_steps: int | None = None
    global_batch_size: int | None = None
    evaluation: EvaluationConfig | None = None
    init_from: str | None = None
    init_without: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run: what it trains on, what it trains, and for how long.

    Attributes:
      name: of the run, in reports and logs.
      data: the data set and how it is read.
      model: the shape of the two towers.
      tasks: the objectives that are trained jointly, each under a name of its own.
      balance: how the tasks share the model: FixedWeights, UncertaintyWeights or GradientSurgery.
      optimizer: of the dense parameters; its schedule scales the tables' rate too.
      row_optimizer: of the rows of the tables.
      exchange: how ids, rows and their gradients cross the network.
      cache_rows: tables that live in the host's memory, by name, and how many of their rows the devices hold.
      placement: how tables lie on the devices, by name; the planner chooses for those that are left out.
      num_train_steps: updates until the end.
      global_batch_size: packed rows an update, over all devices.
      accumulation_steps: microbatches that an update is computed in, one after the other.
      mesh_shape: devices along (data, model); -1 is inferred.
      init_from: workdir of another run whose parameters this one starts from, its best ones by validation, else its
        newest; rows by the keys of items and users. "" = fresh. It counts when a run starts, not when it resumes.
      init_without: glob patterns of the parameters and tables that start fresh although that run has them.
      stages: runs that follow each other, each with a config of its own that differs from this one in some parts
        (`config.stages`); {} = one run.
      seed: of the initial parameters, the order of the data, the dropout and the sampling.
      log_every_steps: interval of the metrics.
      checkpoint_every_steps: interval of the checkpoints.
      keep_checkpoints: how many of the newest checkpoints stay.
      evaluation: what is measured, and how often while training.
    """

    name: str
    data: DataConfig = DataConfig()
    model: TwoTowerConfig = TwoTowerConfig()
    tasks: Mapping[str, Task]
    balance: Balance = FixedWeights()
    optimizer: OptimizerConfig = OptimizerConfig()
    row_optimizer: RowOptimizer = Adam()
    exchange: Exchange = Exchange()
    cache_rows: Mapping[str, int] = field(default_factory=dict)
    placement: Mapping[str, Placement] = field(default_factory=dict)
    num_train_steps: int
    global_batch_size: int
    accumulation_steps: int = 1
    mesh_shape: tuple[int, int] = (INFER, 1)
    init_from: str = ""
    init_without: tuple[str, ...] = ()
    stages: Mapping[str, Stage] = field(default_factory=dict)
    seed: int = 0
    log_every_steps: int = 20
    checkpoint_every_steps: int = 200
    keep_checkpoints: int = 2
    evaluation: EvaluationConfig = EvaluationConfig()


def validate(config: TrainConfig, num_devices: int) -> None:
    """Checks what the rooms cannot check alone; call it once, at the start.

    Raises:
        ValueError: every problem, each with the value, the constraint and the remedy.
    """
    checks = (_size_problems, _data_problems, _task_problems)
    problems = [problem for check in checks for problem in check(config)]
    problems += _mesh_problems(config, num_devices)
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError(
            f"the config {config.name!r} has {len(problems)} problems:\n"
            + "\n".join(f"  - {p}" for p in problems)
        )


def _size_problems(config: TrainConfig) -> Iterator[str]:
    for name in (
        "num_train_steps",
        "global_batch_size",
        "accumulation_steps",
        "log_every_steps",
        "checkpoint_every_steps",
        "keep_checkpoints",
    ):
        if getattr(config, name) < 1:
            yield f"{name}={getattr(config, name)} must be at least 1."
    if not 0 <= config.seed < 2**31:
        yield f"seed={config.seed} must be at least 0 and below 2**31."
    text = config.model.text
    adapted = [("model.encoder", config.model.encoder, "set")]
    if text is not None and not text.checkpoint:
        adapted.append(("model.text.encoder", text.encoder, "set text.checkpoint, or"))
    for path, encoder, remedy in adapted:
        if encoder.lora_rank and not config.init_from:
            yield (
                f"{path}.lora_rank={encoder.lora_rank} freezes the kernels that it adapts, and a fresh run has nothing "
                f"in them; {remedy} init_from to the run that trained them, or lora_rank to 0."
            )
    if config.stages:
        yield f"stages={', '.join(config.stages)} are several runs; take one of config.stages.stage_configs."
    if config.init_without and not config.init_from:
        yield f"init_without={config.init_without} leaves out parts of nothing; set init_from, or leave it empty."


def _data_problems(config: TrainConfig) -> Iterator[str]:
    positions = config.model.encoder.max_positions
    if config.data.history_length > positions:
        yield (
            f"data.history_length={config.data.history_length} is more than model.encoder.max_positions={positions};"
            f" set model.encoder.max_positions={config.data.history_length} or shorten the histories."
        )
    split, interval = config.data.split, config.evaluation.every_steps
    if isinstance(split, LeaveOneOut) and not split.validation and interval:
        yield (
            f"evaluation.every_steps={interval}, but data.split.validation=false leaves nothing to validate on; set "
            "evaluation.every_steps=0."
        )


def _task_problems(config: TrainConfig) -> Iterator[str]:
    if not config.tasks:
        yield "tasks is empty, and a run needs at least one; add one, such as tasks={'next_item': NextItem()}."
    elif not any(task.weight > 0 for task in config.tasks.values()):
        yield f"the weights of all tasks ({', '.join(config.tasks)}) are 0; give at least one a weight above 0."
    counted = [name for name, task in config.tasks.items() if task.weight > 0]
    if len(counted) == 1 and not isinstance(config.balance, FixedWeights):
        yield (
            f"balance={type(config.balance).__name__} balances tasks, and {counted[0]!r} is the only one with a weight "
            "above 0; add another, or use FixedWeights."
        )
    every = config.evaluation.every_steps
    if every and config.tasks and not any(isinstance(task, RankingTask) for task in config.tasks.values()):
        yield (
            f"evaluation.every_steps={every} validates by ranking items, and no task of {', '.join(config.tasks)} does "
            "that; set evaluation.every_steps=0, or add a NextItem or MaskedItem task."
        )
    if config.model.encoder.compression is not None:
        for name, task in config.tasks.items():
            if "masked" in task.encodings:
                yield (
                    f"model.encoder.compression groups what is past, and task {name!r} ({type(task).__name__}) reads "
                    "histories both ways; use causal tasks, or set compression to none."
                )
    for name in config.tasks:
        # The name becomes a key of metrics and of overrides.
        if not name.isidentifier():
            yield f"the task name {name!r} must consist of letters, digits and underscores; rename it."


def _mesh_problems(config: TrainConfig, num_devices: int) -> Iterator[str]:
    shape = config.mesh_shape
    if any(size < 1 and size != INFER for size in shape) or shape.count(INFER) > 1:
        yield f"mesh_shape={shape} must hold positive numbers, and {INFER} at most once; use ({INFER}, 1)."
        return
    known = 1
    for size in shape:
        known *= size if size != INFER else 1
    if num_devices % known or (INFER not in shape and known != num_devices):
        yield (
            f"mesh_shape={shape} does not fit the {num_devices} devices of this run; its product must be {num_devices},"
            f" such as ({INFER}, 1)."
        )
    rows, parts = config.global_batch_size, config.accumulation_steps
    if rows < 1 or parts < 1:
        return
    unit = num_devices * parts
    if rows % unit:
        micro = f" in each of the accumulation_steps={parts} microbatches" if parts > 1 else ""
        remedy = f"{-(-rows // unit) * unit}" + (f" or {rows // unit * unit}" if rows >= unit else "")
        yield (
            f"global_batch_size={rows} does not divide evenly over {num_devices} devices{micro}; use a multiple of"
            f" {unit}, such as {remedy}."
        )
