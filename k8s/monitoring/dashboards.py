"""Grafana's dashboards, as code: `make dashboards` writes `dashboards/*.json` beside this file, and `alerts.yaml`, the
rules as Prometheus's operator takes them.

Every query is run by `make check-ops` against a real Prometheus that scrapes a running stack, and must return data.
"""

from __future__ import annotations

import json
import string
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import prometheus, timeseries
from grafana_foundation_sdk.builders.common import VizLegendOptions
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef

FOLDER = Path(__file__).with_name("dashboards")
RATE = "$__rate_interval"

_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH, _HEIGHT = 8, 8  # of 24 columns: three panels a row


@dataclass(frozen=True)
class Panel:
    """A plot: what it is called, in which unit of Grafana's, and its queries, each with the legend of its series."""

    title: str
    unit: str
    queries: Sequence[tuple[str, str]]
    about: str = ""


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: Sequence[Panel]


def rate(metric: str, by: str, where: str = "") -> str:
    """Events a second."""
    return f"sum by ({by}) (rate({metric}{where}[{RATE}]))"


def quantiles(metric: str, by: str = "", where: str = "") -> list[tuple[str, str]]:
    """The median and the slowest twentieth and hundredth of a histogram."""
    labels, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    return [
        (f"histogram_quantile({q}, {rate(metric + '_bucket', labels, where)})", f"p{round(100 * q)}{legend}")
        for q in (0.5, 0.95, 0.99)
    ]


FIRST_TOKEN = Panel(
    "First token", "s", quantiles("thumbwheel_policy_first_token_seconds"), "From a streamed call to its first token."
)
CLICK_TO_LIVE = Panel(
    "Click to live",
    "s",
    [
        (
            f"histogram_quantile({q}, sum by (le, role) (increase(thumbwheel_click_to_live_seconds_bucket[1h])))",
            f"p{p} {{{{role}}}}",
        )
        for q, p in ((0.5, 50), (0.9, 90))
    ],
    "From the commit of feedback until a version that learnt from it was served; of the last hour.",
)
VERDICTS = Panel(
    "What users say",
    "short",
    [(rate("thumbwheel_collector_verdicts_total", "kind, verdict"), "{{kind}} {{verdict}}")],
    "Votes a second.",
)
KL = Panel(
    "KL to the reference",
    "none",
    [('thumbwheel_trainer_measure{measure="kl"}', "{{task}}")],
    "Nats a response. How far the policy has gone from where it began.",
)
LAG = Panel(
    "Lag", "short", [("thumbwheel_stream_consumer_lag", "{{group}} {{topic}}")], "Records that a reader is behind."
)
SWAPS = Panel(
    "Swaps",
    "short",
    [("sum by (job, outcome) (increase(thumbwheel_swaps_total[1h]))", "{{job}} {{outcome}}")],
    "Of the last hour. Refused and rolled back: it goes on with the version it had.",
)
LIVE = Panel(
    "Versions",
    "none",
    [
        ("thumbwheel_live_version_sequence", "{{job}} live"),
        ("thumbwheel_trainer_published_version", "{{task}} published"),
    ],
    "Number of the version, by role. Live follows published by seconds.",
)
PREFERENCE = Panel(
    "Accuracy on the last step's preferences",
    "percentunit",
    [('thumbwheel_trainer_measure{measure="accuracy"}', "{{task}}")],
    "Share of pairs ranked as the user ranked them, before the step.",
)
MARGIN = Panel("Margin", "none", [('thumbwheel_trainer_measure{measure="margin"}', "{{task}}")])

WHEEL = [
    Row("The wheel", [LIVE, CLICK_TO_LIVE, VERDICTS]),
    Row(
        "What is learnt",
        [
            PREFERENCE,
            MARGIN,
            KL,
            Panel("Waiting to be learnt", "short", [("thumbwheel_trainer_pending_samples", "{{task}}")]),
            Panel(
                "Learnt",
                "short",
                [(rate("thumbwheel_trainer_samples_learnt_total", "task"), "{{task}}")],
                "Samples a second.",
            ),
            SWAPS,
        ],
    ),
    Row(
        "What is served",
        [
            Panel("Tokens", "short", [(rate("thumbwheel_policy_tokens_total", "kind"), "{{kind}}")], "A second."),
            Panel(
                "Length of responses",
                "short",
                [
                    (
                        f'sum(rate(vllm:request_generation_tokens_sum{{job=~".*policy"}}[{RATE}])) '
                        f'/ sum(rate(vllm:request_generation_tokens_count{{job=~".*policy"}}[{RATE}]))',
                        "tokens",
                    )
                ],
                "Mean, in tokens. A rise that users do not like better is over-optimisation; DPO is known for it.",
            ),
            Panel("Scores", "none", quantiles("thumbwheel_reward_score"), "Quantiles of what the reward model gave."),
        ],
    ),
]

SERVING = [
    Row(
        "Calls",
        [
            Panel("Calls", "reqps", [(rate("grpc_server_handled_total", "grpc_method"), "{{grpc_method}}")]),
            Panel(
                "Not OK",
                "reqps",
                [
                    (
                        rate("grpc_server_handled_total", "grpc_method, grpc_code", '{grpc_code!="OK"}'),
                        "{{grpc_method}} {{grpc_code}}",
                    )
                ],
            ),
            Panel("Time of a call", "s", quantiles("grpc_server_handling_seconds", "grpc_method")),
            FIRST_TOKEN,
            Panel("In flight", "short", [("sum by (job) (thumbwheel_calls_in_flight)", "{{job}}")]),
            Panel(
                "Admission",
                "s",
                [("max by (job) (thumbwheel_admission_wait_seconds)", "{{job}} expected wait")],
                "What a call taken in now is expected to wait. Above the limit, calls are told to retry.",
            ),
        ],
    ),
    Row(
        "Engine",
        [
            Panel(
                "Sequences",
                "short",
                [("vllm:num_requests_running", "{{job}} running"), ("vllm:num_requests_waiting", "{{job}} waiting")],
            ),
            Panel("KV cache", "percentunit", [("vllm:kv_cache_usage_perc", "{{job}}")], "Share in use."),
            Panel(
                "Prefix cache hits",
                "percentunit",
                [
                    (
                        f"sum by (job) (rate(vllm:prefix_cache_hits_total[{RATE}])) "
                        f"/ sum by (job) (rate(vllm:prefix_cache_queries_total[{RATE}]))",
                        "{{job}}",
                    )
                ],
            ),
            Panel("Between tokens", "s", quantiles("vllm:inter_token_latency_seconds", "job", '{job=~".*policy"}')),
            Panel(
                "Tokens",
                "short",
                [
                    (rate("vllm:generation_tokens_total", "job"), "{{job}} generated"),
                    (rate("vllm:prompt_tokens_total", "job"), "{{job}} read"),
                ],
            ),
            Panel(
                "In bulk",
                "short",
                [("sum by (job) (thumbwheel_policy_bulk_running)", "{{job}}")],
                "Responses being generated for training.",
            ),
        ],
    ),
    Row(
        "Swaps and recording",
        [
            SWAPS,
            Panel(
                "Pause of a swap",
                "s",
                [
                    (
                        "sum by (job, step) (increase(thumbwheel_swap_seconds_sum[1h])) "
                        "/ sum by (job, step) (increase(thumbwheel_swap_seconds_count[1h]))",
                        "{{job}} {{step}}",
                    )
                ],
                "Mean of each step in the last hour; `paused` is how long no token came.",
            ),
            Panel(
                "Probe deviation",
                "none",
                [("thumbwheel_swap_probe_deviation", "{{job}}")],
                "What the live version computes here against what its manifest says.",
            ),
            Panel(
                "Generations that wait",
                "short",
                [("thumbwheel_recorder_waiting", "{{job}}")],
                "Not with the broker yet.",
            ),
            Panel("Spool", "bytes", [("thumbwheel_recorder_spool_bytes", "{{job}}")]),
            Panel(
                "Scored", "short", [(rate("thumbwheel_reward_scored_total", "job"), "{{job}}")], "Responses a second."
            ),
        ],
    ),
]

FEEDBACK = [
    Row(
        "What comes in",
        [
            VERDICTS,
            Panel(
                "Vote rate",
                "percentunit",
                [
                    (
                        "sum by (kind) (increase(thumbwheel_collector_verdicts_total[1h])) "
                        "/ scalar(sum(increase(thumbwheel_collector_generations_total[1h])))",
                        "{{kind}}",
                    )
                ],
                "Thumbs and comparisons to a response that people were shown, of the last hour. Who votes is "
                "self-selected: the fewer do, the less their thumbs say of the others.",
            ),
            Panel(
                "Where it came to stand",
                "short",
                [(rate("thumbwheel_collector_feedback_total", "kind, state"), "{{kind}} {{state}}")],
            ),
            Panel(
                "Not taken, or known",
                "short",
                [
                    (rate("thumbwheel_collector_refused_total", "reason"), "{{reason}}"),
                    (f"sum(rate(thumbwheel_collector_duplicates_total[{RATE}]))", "sent again"),
                ],
            ),
        ],
    ),
    Row(
        "Durable",
        [
            Panel(
                "Commit",
                "s",
                quantiles("thumbwheel_collector_commit_seconds"),
                "From asking for a write until it is durable.",
            ),
            Panel("Writes a commit", "short", quantiles("thumbwheel_collector_commit_writes")),
            Panel("Database", "bool_on_off", [("thumbwheel_collector_database_up", "{{job}}")]),
        ],
    ),
    Row(
        "Published",
        [
            Panel(
                "Outbox",
                "short",
                [
                    ("thumbwheel_collector_inbox_depth", "acknowledged, not recorded"),
                    ("thumbwheel_collector_outbox_depth", "waiting"),
                    ("thumbwheel_collector_held", "held for a generation"),
                ],
            ),
            Panel("Age of the oldest", "s", [("thumbwheel_collector_outbox_oldest_seconds", "in inbox or outbox")]),
            Panel("Published", "short", [(rate("thumbwheel_collector_published_total", "topic"), "{{topic}}")]),
            LAG,
            Panel(
                "Put aside",
                "short",
                [
                    (rate("thumbwheel_stream_dead_letters_total", "topic"), "{{topic}}"),
                    (f"sum(rate(thumbwheel_collector_dead_letters_total[{RATE}]))", "by the collector"),
                ],
                "Records that cannot be used, a second.",
            ),
            Panel(
                "Broker",
                "short",
                [
                    ("thumbwheel_stream_up", "{{job}} reaches it"),
                    ("increase(thumbwheel_collector_broker_losses_total[1h])", "times it lost its log"),
                ],
            ),
        ],
    ),
]

TRAINING = [
    Row(
        "Learning",
        [
            Panel("Loss", "none", [("thumbwheel_trainer_loss", "{{task}}")]),
            PREFERENCE,
            MARGIN,
            KL,
            Panel("Gradient", "none", [("thumbwheel_trainer_grad_norm", "{{task}}")], "Norm before clipping."),
            Panel("Everything measured", "none", [("thumbwheel_trainer_measure", "{{task}} {{measure}}")]),
        ],
    ),
    Row(
        "Rounds",
        [
            Panel(
                "Rounds",
                "short",
                [("sum by (task) (increase(thumbwheel_trainer_rounds_total[1h]))", "{{task}}")],
                "Of the last hour.",
            ),
            Panel(
                "Phases",
                "s",
                [
                    (
                        "sum by (task, phase) (increase(thumbwheel_trainer_phase_seconds_sum[1h])) "
                        "/ sum by (task, phase) (increase(thumbwheel_trainer_phase_seconds_count[1h]))",
                        "{{task}} {{phase}}",
                    )
                ],
                "Mean time of the last hour's.",
            ),
            Panel(
                "Feedback to publication",
                "s",
                [
                    (
                        "histogram_quantile(0.9, sum by (le, task) "
                        "(increase(thumbwheel_trainer_feedback_to_publish_seconds_bucket[1h])))",
                        "p90 {{task}}",
                    )
                ],
            ),
            Panel(
                "Waiting",
                "short",
                [("thumbwheel_trainer_pending_samples", "{{task}}")],
                "Samples that wait for a round.",
            ),
            Panel("Published version", "none", [("thumbwheel_trainer_published_version", "{{task}}")]),
            LAG,
        ],
    ),
    Row(
        "Reward model",
        [
            Panel(
                "Accuracy and calibration",
                "none",
                [
                    ('thumbwheel_reward_watch{measure=~"fresh_accuracy|fresh_ece_calibrated"}', "{{measure}}"),
                    ('thumbwheel_reward_watch{measure="length_correlation"}', "{{measure}}"),
                ],
                "On the newest comparisons, each before it was learnt from.",
            ),
            Panel(
                "Scores by policy version",
                "none",
                [
                    ("thumbwheel_reward_policy_score_mean", "{{version}} mean"),
                    ("thumbwheel_reward_policy_score_std", "{{version}} spread"),
                ],
                "Of what each wrote, of the newest comparisons.",
            ),
            Panel(
                "Newer version preferred",
                "percentunit",
                [
                    ("thumbwheel_reward_newer_preferred_ratio", "by people"),
                    ("thumbwheel_reward_over_optimised", "over-optimised"),
                ],
                "In comparisons of two versions. Scores that rise while this does not are over-optimisation.",
            ),
        ],
    ),
]

SLO = [
    Row(
        "Objectives",
        [
            Panel(
                "Calls that failed",
                "percentunit",
                [("thumbwheel:calls_failed:ratio_rate1h", "{{grpc_service}}"), ("vector(0.005)", "objective")],
                "Of the last hour. The budget is half a per cent.",
            ),
            Panel(
                "First tokens after 1.6 s",
                "percentunit",
                [("thumbwheel:first_tokens_late:ratio_rate1h", "late"), ("vector(0.05)", "objective")],
            ),
            Panel(
                "Clicks live after 30 minutes",
                "percentunit",
                [("thumbwheel:clicks_late:ratio_increase6h", "{{role}}"), ("vector(0.1)", "objective")],
            ),
            Panel(
                "Budget burnt",
                "none",
                [
                    ("thumbwheel:calls_failed:ratio_rate1h / 0.005", "{{grpc_service}}"),
                    ("thumbwheel:first_tokens_late:ratio_rate1h / 0.05", "first token"),
                    ("thumbwheel:clicks_late:ratio_increase6h / 0.1", "click to live, {{role}}"),
                ],
                "How many times faster than sustainable. Pages at 14.4.",
            ),
            FIRST_TOKEN,
            CLICK_TO_LIVE,
        ],
    ),
    Row(
        "Parts",
        [
            Panel("Up", "bool_on_off", [("up", "{{job}} {{instance}}")]),
            Panel(
                "Release",
                "none",
                [("count by (process, version) (thumbwheel_build_info)", "{{process}} {{version}}")],
                "Processes of each release.",
            ),
            Panel(
                "Alerts",
                "short",
                [('count by (alertname) (ALERTS{alertstate="firing"}) or vector(0)', "{{alertname}}")],
            ),
            Panel("Disk free", "percentunit", [("thumbwheel_disk_free_bytes / thumbwheel_disk_size_bytes", "{{job}}")]),
            Panel(
                "Memory",
                "bytes",
                [
                    ("process_resident_memory_bytes", "{{job}}"),
                    ("thumbwheel_stream_broker_resident_bytes", "embedded broker"),
                ],
            ),
            Panel("Files open", "short", [("process_open_fds", "{{job}}")]),
        ],
    ),
]

DASHBOARDS = {
    "wheel": ("Thumbwheel: wheel", WHEEL),
    "serving": ("Thumbwheel: serving", SERVING),
    "feedback": ("Thumbwheel: feedback", FEEDBACK),
    "training": ("Thumbwheel: training", TRAINING),
    "slo": ("Thumbwheel: objectives", SLO),
}


def render(name: str) -> str:
    """The JSON of a dashboard, as it is committed."""
    title, rows = DASHBOARDS[name]
    made = build.Dashboard(title).uid(f"thumbwheel-{name}").tags(["thumbwheel"]).refresh("30s").time("now-6h", "now")
    made = made.editable().with_variable(build.DatasourceVariable("datasource").type("prometheus").label("Data source"))
    for row in rows:
        made = made.with_row(build.Row(row.title))
        for panel in row.panels:
            made = made.with_panel(_plot(panel))
    return json.dumps(json.loads(JSONEncoder(sort_keys=True).encode(made.build())), indent=1, sort_keys=True) + "\n"


def _plot(panel: Panel) -> timeseries.Panel:
    legend = VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
    plot = timeseries.Panel().title(panel.title).unit(panel.unit).datasource(_SOURCE).description(panel.about)
    plot = plot.legend(legend).span(_WIDTH).height(_HEIGHT)
    for letter, (expr, name) in zip(string.ascii_uppercase, panel.queries, strict=False):
        query = prometheus.Dataquery().expr(expr).legend_format(name).ref_id(letter).range()
        plot = plot.with_target(query.exemplar("_bucket" in expr))
    return plot


def operators_rules() -> str:
    """`rules.yaml` as a custom resource."""
    groups = (FOLDER.parent / "rules.yaml").read_text().partition("\ngroups:\n")[2]
    head = "# Written by `make dashboards` from rules.yaml; do not edit.\napiVersion: monitoring.coreos.com/v1\n"
    head += "kind: PrometheusRule\nmetadata:\n  name: thumbwheel\nspec:\n  groups:\n"
    return head + textwrap.indent(groups, "  ")


def written() -> dict[Path, str]:
    """All that `main` writes."""
    found = {FOLDER / f"{name}.json": render(name) for name in DASHBOARDS}
    return found | {FOLDER.parent / "alerts.yaml": operators_rules()}


def main() -> None:
    """Writes all of them; says which have changed."""
    FOLDER.mkdir(exist_ok=True)
    for path, text in written().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
