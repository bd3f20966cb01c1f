"""All measured results in one document: benchmarks/results/*/*.json as one Markdown table per kind.

    python -m benchmarks.collect            # writes docs/performance.md
    python -m benchmarks.collect --check    # fails when the document is not what the results say

The page opens with what GPUs gave, or with what was and was not shown without one. Every row names its file; machine,
commit and command of each file stand at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.shown import shown
from mpl_scale.config.names import Registry

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"

TITLE = "# Performance\n"
GPU_KIND = "gpu_suite"
WITHOUT_GPU = """\
No GPU has run this yet; proved without one, by tests, is that sharded, split, recomputed and resumed steps equal plain
ones, that a step reads nothing of the device on the host, and that every part of `make bench-gpu` runs at toy size. Not
proved are a capture and its replay, any time or memory on a GPU, NCCL, and DALI's decoding in hardware, which
[two commands](quickstart.md#if-you-have-a-gpu) measure.
"""
SOURCES = """\
## Where the numbers come from

Written by `python -m benchmarks.collect` from `benchmarks/results`, where the raw numbers are. Compare times within one
file only; ratios were taken within rounds, A B A B. A + after a commit: files had changed.
"""

Row = dict[str, str]
KINDS: Registry[Callable[[Mapping[str, Any]], Iterator[Row]]] = Registry("kind of result")
register_kind = KINDS.register
"""Make rows of the results whose "kind" has that name; others are listed with their command alone."""


@register_kind("throughput")
def throughput_rows(document: Mapping[str, Any]) -> Iterator[Row]:
    """benchmarks/throughput.py: one row per configuration."""
    for name, row in document["configurations"].items():
        ratio = document["ratios"][name]
        yield {
            "configuration": name,
            "networks": f"{row['teacher']} / {row['student']} @ {row['image_size']}",
            "batch": f"{row['labelled']} + {row['unlabelled']}",
            "engine, ZeRO": f"{row['engine']} {row['zero_stage']}{', bf16' if row['bf16'] else ''}",
            "ranks": str(document["ranks"]),
            "img/s": f"{row['images_per_second']:.1f}",
            "ms a step": f"{row['ms_per_step']:.1f}",
            "MFU": "" if row["mfu"] is None else f"{100 * row['mfu']:.2f}%",
            "time / first": f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})",
        }


@register_kind("gpu_suite")
def gpu_suite_rows(document: Mapping[str, Any]) -> Iterator[Row]:
    """benchmarks/gpu_suite.py: a row for each step that was timed, one for each other part."""
    for part, result in document["parts"].items():
        if "mfu" not in next(iter(result.get("rows", {}).values()), {}):
            yield {"part": part, "what": shown(result), "img/s": "", "MFU": "", "time / first": "", "peak GiB": ""}
            continue
        for name, row in result["rows"].items():
            yield {
                "part": part,
                "what": name,
                "img/s": f"{row['images_per_second']:.1f}",
                "MFU": "" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%",
                "time / first": f"{result['time_ratios'][name]['median']:.3f}",
                "peak GiB": f"{row['peak_bytes'] / 2**30:.1f}",
            }


@register_kind("spatial")
def spatial_rows(document: Mapping[str, Any]) -> Iterator[Row]:
    """benchmarks/spatial.py: one row per width."""
    for width, row in document["widths"].items():
        yield {
            "network": f"{document['options']['model']} @ {document['options']['size']}",
            "ranks": str(document["ranks"]),
            "width": width,
            "ms a step": f"{1e3 * statistics.median(row['seconds_per_step']):.1f}",
            "time / first": f"{row['ratio_median']:.3f}",
        }


@register_kind("index_build")
def index_build_rows(document: Mapping[str, Any]) -> Iterator[Row]:
    """benchmarks/index_build.py: one row per build."""
    for build in document["builds"]:
        busy = build["processor_us_per_row"]
        yield {
            "source": build["source"],
            "rows": f"{build['rows']:,}",
            "workers": str(build["workers"]),
            "seconds": f"{build['seconds']:.1f}",
            "rows/s": f"{build['rows_per_second']:,}",
            "processor, us a row": "" if busy is None else f"{busy:.2f}",
            "rows a processor second": "" if busy is None else f"{1e6 / busy:,.0f}",
            "private memory, MB": f"{build['private_bytes'] / 1e6:.0f}",
        }


def kind_of(document: Mapping[str, Any]) -> str:
    """Its "kind", or what its fields show it to be."""
    return str(document.get("kind") or ("spatial" if "widths" in document else "other"))


def render(results: Path) -> str:
    """The Markdown of all results below a folder.

    Raises:
        ValueError: a file that is no JSON object, by name.
    """
    documents = {path.relative_to(results).as_posix(): _read(path) for path in sorted(results.glob("*/*.json"))}
    tables: dict[str, list[Row]] = {}
    for file, document in documents.items():
        kind = kind_of(document)
        if kind in KINDS:
            tables.setdefault(kind, []).extend({**row, "file": file} for row in KINDS[kind](document))
    on_gpu = any(kind_of(document) == GPU_KIND and not document["tiny"] for document in documents.values())
    parts = [TITLE, "" if on_gpu else WITHOUT_GPU]
    parts += [f"## {kind}\n\n{_table(tables[kind])}\n" for kind in sorted(tables, key=lambda k: (k != GPU_KIND, k))]
    sources = [
        {
            "file": file,
            "machine": str(document.get("machine") or document.get("device") or "not recorded"),
            "commit": _commit(document),
        }
        for file, document in documents.items()
    ]
    commands = (f"- `{file}`" + (f": `{d['command']}`" if d.get("command") else "") for file, d in documents.items())
    parts.append("\n".join([SOURCES, _table(sources), "", *commands, ""]))
    return "\n".join(part for part in parts if part)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}; measure it again or remove it") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path}: must hold a JSON object; measure it again or remove it")
    return document


def _commit(document: Mapping[str, Any]) -> str:
    commit = str(document.get("commit") or "not recorded")[:12]
    return commit + ("+" if document.get("changed_files") else "")


def _table(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or with --check compare it with the one on disk; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the document is stale")
    options = parser.parse_args(arguments)
    text = render(options.results)
    if options.check:
        if options.document.exists() and options.document.read_text() == text:
            return 0
        print(
            f"{options.document} is not what {options.results} says; run python -m benchmarks.collect", file=sys.stderr
        )
        return 1
    options.document.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
