"""The pipeline comparison as text and as docs/speed.md, from the result of pipeline.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from result_table import Table

Result = dict[str, Any]
Row = dict[str, Any]

OURS = "ours"
FEW = "ours, parity on 64"
AGAIN = "ours again, other target"
FLOAT_PART = "ours, up to the builder"
ENTROPY = "onnxruntime Entropy"
MINMAX = "onnxruntime MinMax"
TARGETS = (("wall_s", 3.0, "as fast"), ("peak_mib", 5.0, "as small"))
"""What the project wants of ours beside ONNX Runtime's entropy road at 512 images."""

INTRODUCTION = """# The whole road, beside the peers'

Made by `make benchmark-pipeline` ([benchmarks/pipeline.py](../benchmarks/pipeline.py),
[result](../benchmarks/results/pipeline.txt)): {processor}, {cores} cores, {memory_gib} GiB. From a
checkpoint in train form with random weights and a folder of 256 x 256 PNG files to INT8 at
{size} x {size}, imports and image decoding included.

* **ours**: `repvgg-export engine` with an empty stage cache. It fuses, exports, simplifies,
  calibrates, quantizes by `full`, builds the engine for one target, compares the INT8 graph with
  the original network on the calibration images (at most 512), the float stages before it on the
  first 64 of them, and publishes the bundle.
* **ours, up to the builder**: the same run without the seconds of the engine stage, and the memory
  of its first process alone.
* **ours, parity on 64**: the same road with the stages compared on 64 images.
* **ours again, other target**: the request once more for another target, with the stage cache that
  the first run left.
* **onnxruntime**: fuses, torch.onnx {torch}, onnxsim {onnxsim}, ONNX Runtime {onnxruntime}
  `quantize_static`, Q/DQ, by channel, symmetric. No engine, no comparison with the original.
* **modelopt**: fuses, torch.onnx, Model Optimizer {modelopt} `quantize`, which simplifies by
  itself. No engine, no comparison with the original.

Each side is a fresh process; memory is the largest sum of the resident sets of all its processes
at one moment. *x time* and *x memory* are multiples of ours at the same images: above 1 the side
is slower or larger. A side is stopped at {limits}; its figures are then
lower bounds, marked >. *Others* is what the rest of the machine did meanwhile, in processors: times
are comparable where it is near 0, ratios where it is alike. Everything takes about 40 minutes on
2 idle cores; single cases can be measured again, as the script says. {repeats}
"""


def text(result: Result) -> str:
    """benchmarks/results/pipeline.txt."""
    machine = result["machine"]
    head = [
        *(f"$ {command}" for command in result["commands"]),
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        f"a side is stopped at {limits(result)}",
        *summary(result),
        "",
    ]
    return "\n".join([*head, *(table.text() for table in tables(result))])


def page(result: Result) -> str:
    """docs/speed.md."""
    count = result["repeats"]
    told = INTRODUCTION.format(
        **result["machine"],
        size=result["size"],
        limits=limits(result),
        repeats="" if count == 1 else f"All sides ran {count} times in turns; the fastest counts.",
    ).strip()
    words = "\n".join(f"* {line}" for line in summary(result))
    return "\n\n".join([told, words, "\n".join(table.markdown() for table in tables(result))])


def limits(result: Result) -> str:
    """``18 GiB (A0 2048: 14) or 900 s``: the usual one, and where it was another."""
    found = {(row["variant"], row["images"]): row["limit_gib"] for row in result["rows"]}
    usual = max(found.values())
    others = [f"{m} {n}: {limit:g}" for (m, n), limit in found.items() if limit != usual]
    words = f" ({', '.join(others)})" if others else ""
    return f"{usual:g} GiB{words} or {result['limit_s']:g} s"


def tables(result: Result) -> Iterator[Table]:
    for variant, count in cases(result):
        yield comparison(result, variant, count)
    if len(cases(result)) > 1:
        yield growth(result)
    yield stages(result)


def cases(result: Result) -> list[tuple[str, int]]:
    return list(dict.fromkeys((row["variant"], row["images"]) for row in result["rows"]))


def rows_of(result: Result, variant: str, count: int) -> dict[str, Row]:
    """By method, with our road up to the builder after ours."""
    found: dict[str, Row] = {}
    for row in result["rows"]:
        if (row["variant"], row["images"]) != (variant, count):
            continue
        found[row["method"]] = row
        if row["method"] == OURS and "stages" in row:
            seconds = row["wall_s"] - row["stages"].get("engine", 0)
            found[FLOAT_PART] = {
                **row,
                "method": FLOAT_PART,
                "wall_s": seconds,
                "peak_mib": row["own_peak_mib"],
                "cpu_s": None,
            }
    return found


def ratio(row: Row | None, reference: Row | None, key: str) -> float | None:
    """How many times ``reference``'s; None where one of the two has no figure."""
    if row is None or reference is None or key not in row or key not in reference:
        return None
    return float(row[key] / reference[key])


def comparison(result: Result, variant: str, count: int) -> Table:
    """All sides on the same model and images."""
    found = rows_of(result, variant, count)
    size = result["size"]
    return Table(
        title=f"RepVGG-{variant}, {count} images",
        note=f"{size} x {size} pixels.",
        header=("side", "wall s", "CPU s", "peak MiB", "x time", "x memory", "others"),
        rows=tuple(_cells(method, row, found.get(OURS)) for method, row in found.items()),
    )


def _cells(method: str, row: Row, ours: Row | None) -> tuple[str, ...]:
    if "failure" in row:
        return (method, row["failure"], "", "", "", "", "")
    least = ">" if row["stopped"] else ""
    ratios = [ratio(row, ours, key) for key, *_ in TARGETS]
    cpu = "" if row["cpu_s"] is None else f"{least}{row['cpu_s']:.1f}"
    return (
        method,
        f"{least}{row['wall_s']:.1f}",
        cpu,
        f"{least}{row['peak_mib']:.0f}",
        *("" if value is None else f"{least}{value:.2f}" for value in ratios),
        f"{row['others']:.2f}",
    )


def growth(result: Result) -> Table:
    """Each side's figures from case to case, as multiples of its first."""
    methods = dict.fromkeys(row["method"] for row in result["rows"])
    every = {case: rows_of(result, *case) for case in cases(result)}
    first, *later = every
    lines = []
    for method in methods:
        cells = [method]
        for case in later:
            row, base = every[case].get(method), every[first].get(method)
            least = ">" if row and row.get("stopped") else ""
            for key in ("cpu_s", "peak_mib"):
                value = ratio(row, base, key)
                cells.append("" if value is None else f"{least}{value:.1f}")
        if any(cells[1:]):
            lines.append(tuple(cells))
    return Table(
        title="Growth",
        note=f"Multiples of the same side's own figures for {first[0]} and {first[1]} images. Time "
        "is processor time here, which other programs on the machine disturb less.",
        header=(
            "side",
            *(f"{model} {count}: {what}" for model, count in later for what in ("CPU", "memory")),
        ),
        rows=tuple(lines),
    )


def stages(result: Result) -> Table:
    """Where the time of ours goes, by the command's own account."""
    ours = [row for row in result["rows"] if row["method"] == OURS and "stages" in row]
    names = list(dict.fromkeys(name for row in ours for name in row["stages"]))
    return Table(
        title="Where our time goes",
        note="Seconds of each stage, as `--json` reports them; *rest* is the start of Python, "
        "imports and the end of the process.",
        header=("images", *names, "rest"),
        rows=tuple(
            (
                f"{row['variant']} {row['images']}",
                *(f"{row['stages'].get(name, 0):.1f}" for name in names),
                f"{row['wall_s'] - sum(row['stages'].values()):.1f}",
            )
            for row in ours
        ),
    )


def summary(result: Result) -> Iterator[str]:
    """What was wanted and what was found, in words."""
    found = rows_of(result, "A0", 512)
    peer = found.get(ENTROPY)
    if peer is None or "failure" in peer:
        return
    for method in (OURS, FEW, AGAIN):
        parts = []
        for key, wanted, words in TARGETS:
            value = ratio(peer, found.get(method), key)
            if value is None:
                break
            at_least = "at least " if peer["stopped"] else ""
            verdict = "reached" if value >= wanted else "not reached"
            parts.append(f"{at_least}{value:.1f} times {words} (wanted {wanted:g}: {verdict})")
        if len(parts) == len(TARGETS):
            yield f"{method}, A0, 512 images, beside {ENTROPY}: {', '.join(parts)}"
    least = ratio(peer, found.get(MINMAX), "wall_s")
    if least is not None:
        yield (
            f"{MINMAX}, the shortest road there is (it looks at each image once, keeps two numbers "
            f"a tensor and compares nothing), A0, 512 images, beside {ENTROPY}: {least:.1f} times "
            "as fast"
        )
