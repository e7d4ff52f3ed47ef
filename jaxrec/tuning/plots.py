"""Plots of a search, as SVG files: the best value so far, every trial's curve, and the value against each field."""

import warnings
from pathlib import Path

from matplotlib import pyplot
from matplotlib.figure import Figure
from optuna.study import Study
from optuna.trial import TrialState
from optuna.visualization import matplotlib as drawings


def write_plots(study: Study, workdir: Path, metric: str) -> list[Path]:
    """Writes `history.svg`, `curves.svg` and `fields.svg`; none where no trial has come to its end."""
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return []
    written = []
    with warnings.catch_warnings():
        # The drawings are called experimental, and a single trial has no range to draw.
        warnings.simplefilter("ignore")
        for name, draw in (
            ("history", drawings.plot_optimization_history),
            ("curves", drawings.plot_intermediate_values),
            ("fields", drawings.plot_slice),
        ):
            axes = draw(study)
            figure: Figure = getattr(axes, "flat", [axes])[0].figure
            figure.suptitle(f"{metric} on validation", fontsize=10)
            path = workdir / f"{name}.svg"
            figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
            pyplot.close(figure)
            written.append(path)
    return written
