"""The page's charts, as Vega-Lite specifications without data: `page.py` hands the data to all of them once."""

from typing import Any

import altair as alt

# Tableau's, which are told apart on white and on black; after twenty runs they begin again.
COLOURS = [
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#ff9da6", "#9d755d", "#bab0ac",
    "#9ecae9", "#ffbf79", "#88d27a", "#d6a5c9", "#83bcb6", "#b79a20", "#d67195", "#8ca252", "#7b6fd0", "#c44e52",
]  # fmt: skip
KINDS = ["ema", "raw", "linear"]  # losses by timestep: of averaged and plain weights, of the best linear denoiser
_PAN = "[mousedown, window:mouseup] > window:mousemove!"  # a finger scrolls the page
_ZOOM = "wheel![event.ctrlKey || event.metaKey || event.shiftKey]"  # a wheel alone does, too

Spec = dict[str, Any]


def colour_of(number: int) -> str:
    """A run's colour, in charts and beside its name."""
    return COLOURS[number % len(COLOURS)]


def _rows(name: str) -> alt.Chart:
    """A chart of one of the page's tables, of the runs that are shown."""
    return alt.Chart(alt.NamedData(name)).transform_filter("indexof(shown, datum.run) >= 0")


def _colour(num_runs: int) -> alt.Color:
    numbers = list(range(num_runs))
    scale = alt.Scale(domain=numbers, range=[colour_of(number) for number in numbers])
    return alt.Color("run:N", scale=scale, legend=None)


def _tooltip(*fields: tuple[str, str, str]) -> list[alt.Tooltip]:
    numbers = [alt.Tooltip(field, title=title, format=form) for field, title, form in fields]
    return [alt.Tooltip("label:N", title="run"), *numbers]


def _finish(layers: list[alt.Chart], num_runs: int, description: str) -> Spec:
    """The specification, with zoom and the parameter by which the page says which runs are shown."""
    chart = alt.LayerChart(layer=layers).add_params(
        alt.param(name="shown", value=list(range(num_runs))),
        alt.selection_interval(bind="scales", translate=_PAN, zoom=_ZOOM),
    )
    return chart.properties(width="container", height=320, description=description).to_dict()


def _points(chart: alt.Chart, tooltip: list[alt.Tooltip]) -> alt.Chart:
    """The chart's points, each seen only under the pointer, with a tooltip."""
    # Not `nearest=True`: Vega-Lite 6.4 then leaves texts out of tooltips.
    under = alt.selection_point(fields=["run", "step"], on="pointerover", clear="pointerout", empty=False)
    opacity = alt.when(under).then(alt.value(1)).otherwise(alt.value(0))
    return chart.mark_point(filled=True, size=200).encode(opacity=opacity, tooltip=tooltip).add_params(under)


def _over_images(num_runs: int) -> alt.Chart:
    x = alt.X("images:Q", title="images seen", axis=alt.Axis(format="~s", tickCount=6))
    return _rows("lines").encode(x=x, color=_colour(num_runs))


def _log(field: str, title: str) -> alt.Y:
    return alt.Y(field, title=title, scale=alt.Scale(type="log", nice=False, padding=8), axis=alt.Axis(format="~g"))


def loss_chart(num_runs: int, description: str, *, has_band: bool) -> Spec:
    """The training loss against images seen: raw and smoothed, with the references' bands if there are any."""
    band = alt.Chart(alt.NamedData("band")).encode(
        x=alt.X("start:Q"),
        x2="end:Q",
        tooltip=[
            alt.Tooltip("name:N", title="reference"),
            alt.Tooltip("reference:Q", title="its loss", format=".4~g"),
            alt.Tooltip("low:Q", title="from", format=".4~g"),
            alt.Tooltip("high:Q", title="to", format=".4~g"),
        ],
    )
    area = band.mark_rect(opacity=0.22, color="#888888").encode(y=_log("low:Q", "training loss"), y2="high:Q")
    middle = band.mark_rule(strokeDash=[4, 3], color="#888888", strokeWidth=1.5).encode(y=alt.Y("reference:Q"))
    lines = _over_images(num_runs)
    raw = lines.mark_line(opacity=0.35, strokeWidth=1).encode(y=_log("loss:Q", "training loss"))
    smoothed = lines.mark_line(strokeWidth=2).encode(y=alt.Y("smoothed:Q"))
    tooltip = _tooltip(
        ("images:Q", "images", ",d"), ("step:Q", "step", ",d"), ("smoothed:Q", "smoothed", ".4~g"),
        ("loss:Q", "raw", ".4~g"),
    )  # fmt: skip
    points = _points(lines.encode(y=alt.Y("smoothed:Q")), tooltip)
    bands = [area, middle] if has_band else []
    return _finish([*bands, raw, smoothed, points], num_runs, description)


def line_chart(num_runs: int, field: str, title: str, description: str) -> Spec:
    """Another column of the lines against images seen."""
    tooltip = _tooltip(("images:Q", "images", ",d"), ("step:Q", "step", ",d"), (f"{field}:Q", title, ".4~g"))
    y = alt.Y(f"{field}:Q", title=title, scale=alt.Scale(zero=True))
    lines = _over_images(num_runs).encode(y=y)
    return _finish([lines.mark_line(), _points(lines, tooltip)], num_runs, description)


def bins_chart(num_runs: int, description: str) -> Spec:
    """The held-out loss by timestep, of averaged and plain weights and of the best linear denoiser."""
    rows = _rows("bins").encode(
        x=alt.X("t:Q", title="timestep / T", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=10)),
        y=_log("loss:Q", "held-out loss"),
        color=_colour(num_runs),
        detail="kind:N",
    )
    scale = alt.Scale(domain=KINDS, range=[[1, 0], [4, 3], [1, 3]])
    dash = alt.StrokeDash("kind:N", title="denoiser", scale=scale)
    tooltip = [
        *_tooltip(("loss:Q", "loss", ".4~g")),
        alt.Tooltip("kind:N", title="denoiser"),
        alt.Tooltip("timesteps:N"),
    ]
    lines = rows.mark_line(strokeWidth=2).encode(strokeDash=dash.legend(orient="bottom", symbolStrokeColor="#888888"))
    points = rows.mark_point(filled=True, size=35).encode(tooltip=tooltip)
    return _finish([lines, points], num_runs, description)
