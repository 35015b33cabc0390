"""Pictures of simulations. They need matplotlib, which is an extra of this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nf_scheduler.sim import SimulationReport

_FORMATS = (".svg", ".png", ".pdf")


def check_plots(path: str) -> None:
    """See before a long simulation whether its picture can be drawn.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the path has another ending, or its folder does not exist.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            "Pictures need matplotlib: pip install 'nanoflow-server[plot]', or use --no-plot."
        ) from None
    if Path(path).suffix not in _FORMATS:
        raise ValueError(f"--plot is {path!r}; expected a name that ends in {', '.join(_FORMATS)}.")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--plot is {path!r}, whose folder does not exist; make it first.")


def draw_timelines(reports: Mapping[str, SimulationReport], title: str, path: str) -> None:
    """Draw pages, requests and tokens over time, one line for each of several runs.

    Args:
        reports: by admission.
        title: of the picture.
        path: of the file; its ending says which format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("pages", "pages in use"),
        ("running", "requests running"),
        ("waiting", "requests waiting"),
        ("tokens", "tokens per iteration"),
    )
    figure, axes = pyplot.subplots(len(panels), 1, sharex=True, figsize=(9, 9))
    for axis, (name, label) in zip(axes, panels, strict=True):
        for admission, report in reports.items():
            columns = report.timeline.columns()
            axis.plot(columns["seconds"], columns[name], label=admission, linewidth=0.9)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_title(title)
    axes[0].legend(loc="lower right")
    axes[-1].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
