"""One page on a reward version: how right it is, how calibrated, what it owes to length, and its worst errors.

It is judged on pairs that neither it nor its parents learnt from. The page is one file, pictures included.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thumbwheel import errors
from thumbwheel.auth import ManifestVerifier
from thumbwheel.checkpoints.store import SAMPLES, LocalStore, VerifiedVersion
from thumbwheel.v1.rollout_pb2 import ModelRole
from trainer import balance, calibration, runtime
from trainer.encode import record_encoder
from trainer.reward import pairs as reading
from trainer.reward.config import ReportSettings
from trainer.samples import Pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from trainer.judge import Judged

WORST = 12
_STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}
td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{white-space:pre-wrap;background:#f6f6f6;padding:.5rem}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:.7rem}details{margin:.6rem 0}small{color:#666}"""


def run(settings: ReportSettings, stop: Callable[[], bool]) -> Path:
    """Writes the page; returns where. Raises `errors.NotFound` for a version that is not there, and what is wrong with
    the data.
    """
    store = LocalStore(settings.home / "store", ManifestVerifier.load(settings.home / "keys"))
    version = store.load(settings.version)
    if version.manifest.role != ModelRole.MODEL_ROLE_REWARD:
        raise errors.InvalidArgument(
            f"is {settings.version}, which is no reward model.", field="version", remedy="See `thumbwheel versions`."
        )
    pairs = _unseen(settings, store, version, stop)[: settings.limit]
    from trainer.judge import judge_by

    runtime.quiet_transformers()

    def judged(path: Path) -> Judged:
        return judge_by(path, pairs, max_tokens=runtime.pass_tokens(settings.micro_batch_tokens), stop=stop)

    print(f"judging {version.manifest.version} on {len(pairs):,} pairs", file=sys.stderr)
    now = judged(version.path)
    before = None
    parent = version.manifest.parent
    if parent and (store.root / parent).exists() and not store.is_thin(parent):
        print(f"judging {parent}, the one before", file=sys.stderr)
        before = judged(store.load(parent).path)
    output = settings.output or Path(f"{settings.version}.html")
    figures, page = write(version, now, before, _decoder(version.path))
    output.write_text(page, encoding="utf-8")
    if settings.json_output:
        print(json.dumps(figures))
    print(f"written to {output}", file=sys.stderr)
    return output


def _unseen(
    settings: ReportSettings, store: LocalStore, version: VerifiedVersion, stop: Callable[[], bool]
) -> list[Pair]:
    """The pairs of the file, but for what the version and its parents learnt from."""
    found = reading.read(settings.data, record_encoder(version.path, settings.max_length), stop=stop)
    learnt = set[str]()
    name = version.manifest.version
    while name and (store.root / name).exists():
        link, _, _ = store.describe(name)
        if link.sequence:
            learnt.update(store.read(name, SAMPLES).decode().split())
        name = link.parent
    unseen = [pair for pair in found if pair.id not in learnt and not pair.tie]
    if not unseen:
        raise errors.FailedPrecondition(
            f"{version.manifest.version} learnt from all {len(found)} pairs: none is left to judge it on.",
            remedy="Name other pairs by --data.",
        )
    return unseen


def _decoder(path: Path) -> Callable[[Sequence[int]], str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path))
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def write(
    version: VerifiedVersion, now: Judged, before: Judged | None, text: Callable[[Sequence[int]], str]
) -> tuple[dict[str, Any], str]:
    """The figures, and the page."""
    margins, longer = now.margins, now.longer
    ece, temperature = calibration.cross_fitted_ece(margins)
    figures: dict[str, Any] = {
        "version": version.manifest.version,
        "pairs": len(margins),
        "accuracy": calibration.accuracy(margins),
        "accuracy_interval": calibration.wilson(int((margins > 0).sum()), len(margins)),
        "ece": calibration.ece(margins),
        "ece_calibrated": ece,
        "temperature": temperature,
        "length_correlation": calibration.correlation(margins, longer),
        "score_length_correlation": calibration.correlation(now.scores[:, :, 0].ravel(), now.lengths),
        "score_mean": float(now.scores[:, :, 0].mean()),
        "score_std": float(now.scores[:, :, 0].std()),
    }
    if now.heads.ensemble:
        wrong, right = now.uncertainty[margins <= 0], now.uncertainty[margins > 0]
        figures["uncertainty_when_right"] = float(right.mean()) if len(right) else 0.0
        figures["uncertainty_when_wrong"] = float(wrong.mean()) if len(wrong) else 0.0
    if before is not None:
        figures["agreement_with_parent"] = float(np.mean((margins > 0) == (before.margins > 0)))
        figures["parent_accuracy"] = calibration.accuracy(before.margins)
    groups = {
        "by aspect": {aspect: now.aspect_margins(aspect) for aspect in now.heads.aspects},
        "by source": _grouped(now, lambda pair: pair.source or "(none given)"),
        "by length": _grouped(now, _bucket),
    }
    lineage = version.manifest.lineage
    body = [
        f"<h1>{version.manifest.version}</h1>",
        f"<p>Trained from {html.escape(version.manifest.parent or 'nothing')} on {lineage.sample_count:,} pairs, "
        f"{lineage.steps:,} steps since {html.escape(version.manifest.base_model)}. Judged on {len(margins):,} pairs "
        "that neither it nor its parents learnt from.</p>",
        _table(("figure", "value"), ((name, _shown(value)) for name, value in figures.items() if name != "version")),
        "<h2>Accuracy</h2>",
        *(
            _accuracies(title, {name: m for name, m in members.items() if len(m)})
            for title, members in groups.items()
            if any(map(len, members.values()))
        ),
        "<h2>Calibration</h2>",
        _picture(lambda axes: _reliability(axes, margins, temperature)),
        "<h2>Scores</h2>",
        _picture(lambda axes: _distribution(axes, now), lambda axes: _length(axes, now)),
        "<h2>Worst disagreements</h2>",
        "<p>People chose the left one; the model is surest of the right one.</p>",
        *_worst(now, text),
    ]
    title = f"<title>{version.manifest.version}</title>"
    page = f"<!doctype html><meta charset=utf-8>{title}<style>{_STYLE}</style>{''.join(body)}\n"
    return figures, page


def _grouped(judged: Judged, name: Callable[[Pair], str]) -> dict[str, calibration.Array]:
    names = sorted({name(pair) for pair in judged.pairs})
    return {wanted: judged.of(lambda pair, wanted=wanted: name(pair) == wanted).margins for wanted in names}  # type: ignore[misc]  # mypy cannot infer a lambda with a default


def _bucket(pair: Pair) -> str:
    """By the difference of lengths, four of the buckets that balancing uses in one."""
    if not pair.longer:
        return "equal"
    edges = (*balance.EDGES[::4], 1 << 31)
    size = abs(pair.longer)
    low, high = next((low, high) for low, high in itertools.pairwise(edges) if low <= size < high)
    side = "longer" if pair.longer > 0 else "shorter"
    return f"the {side} by {low:>3} to {high - 1 if high < 1 << 31 else '…'} tokens was chosen"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " to ".join(f"{part:.3f}" for part in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _accuracies(title: str, members: dict[str, calibration.Array]) -> str:
    def rows() -> Iterator[Sequence[str]]:
        for name, margins in members.items():
            low, high = calibration.wilson(int((margins > 0).sum()), len(margins))
            yield name, f"{len(margins):,}", f"{calibration.accuracy(margins):.3f}", f"{low:.3f} to {high:.3f}"

    return _table((title, "pairs", "accuracy", "95 % interval"), rows())


def _picture(*draw: Callable[[Axes], None]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(draw), 3.6), layout="constrained")
    for axes, drawn in zip(np.atleast_1d(figure.subplots(1, len(draw))), draw, strict=True):
        drawn(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _reliability(axes: Axes, margins: calibration.Array, temperature: float) -> None:
    axes.plot([0, 1], [0, 1], color="0.8")
    for label, value in (("as it is", 1.0), (f"temperature {temperature:.2g}", temperature)):
        bins = calibration.reliability(margins, value)
        axes.plot([bin.predicted for bin in bins], [bin.observed for bin in bins], "o-", label=label)
    axes.set_xlabel("probability given to the first")
    axes.set_ylabel("share in which it was preferred")
    axes.legend(fontsize=8)


def _distribution(axes: Axes, judged: Judged) -> None:
    scores = judged.scores[:, :, 0]
    axes.hist(list(scores.T), bins=40, histtype="step", label=["chosen", "rejected"])
    axes.set_xlabel("score")
    axes.set_ylabel("responses")
    axes.legend(fontsize=8)


def _length(axes: Axes, judged: Judged) -> None:
    axes.scatter(judged.longer, judged.margins, s=5, alpha=0.4)
    axes.axhline(0, color="0.8", zorder=0)
    axes.axvline(0, color="0.8", zorder=0)
    axes.set_xscale("symlog", linthresh=16)
    axes.set_xlabel("tokens by which chosen is longer")
    axes.set_ylabel("margin")


def _worst(judged: Judged, text: Callable[[Sequence[int]], str]) -> Iterator[str]:
    for index in np.argsort(judged.margins)[:WORST]:
        if judged.margins[index] >= 0:
            return
        pair, (chosen, rejected) = judged.pairs[index], judged.scores[index, :, 0]
        columns = "".join(
            f"<div><small>{name}, {score:.2f}</small><pre>{html.escape(text(ids))}</pre></div>"
            for name, score, ids in (("chosen", chosen, pair.chosen), ("rejected", rejected, pair.rejected))
        )
        yield (
            f"<details><summary>{judged.margins[index]:.2f} <small>{html.escape(pair.id)}</small></summary>"
            f"<pre>{html.escape(text(pair.prompt))}</pre><div class=pair>{columns}</div></details>"
        )
