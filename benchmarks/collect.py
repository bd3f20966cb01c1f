"""All measured results in one document: benchmarks/results/*/*.json as one Markdown table per kind.

    python -m benchmarks.collect            # writes docs/performance.md
    python -m benchmarks.collect --check    # fails when the document is not what the results say

Every row ends with what produced it: file, machine, commit and, below the table, the command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mpl_scale.config.names import Registry

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"

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
    """benchmarks/gpu_suite.py: one row per step timed; parts that failed with their reason."""
    for part, result in document["parts"].items():
        if "rows" not in result or "time_ratios" not in result:
            text = result.get("error") or result.get("skipped")
            if "largest_labelled" in result:
                text = f"largest labelled batch at mu 8: {result['largest_labelled']}"
            elif "kept_bytes_per_image_bf16" in result:
                text = f"kept for backward: {result['kept_bytes_per_image_bf16'] / 1e9:.3f} GB an image"
            if text:
                yield {"part": part, "variant": text, "img/s": "", "MFU": "", "time / first": "", "peak GiB": ""}
            continue
        for name, row in result["rows"].items():
            ratio = result["time_ratios"][name]
            yield {
                "part": part,
                "variant": name,
                "img/s": f"{row['images_per_second']:.1f}",
                "MFU": "" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%",
                "time / first": f"{ratio['median']:.3f}",
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


def kind_of(document: Mapping[str, Any]) -> str:
    """Its "kind", or what its fields show it to be."""
    return str(document.get("kind") or ("spatial" if "widths" in document else "other"))


def render(results: Path) -> str:
    """The Markdown of all results below a folder.

    Raises:
        ValueError: a file that is no JSON object, by name.
    """
    tables: dict[str, list[Row]] = {}
    commands: dict[str, list[str]] = {}
    for path in sorted(results.glob("*/*.json")):
        try:
            document = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON: {error}; measure it again or remove it") from None
        if not isinstance(document, dict):
            raise ValueError(f"{path}: must hold a JSON object; measure it again or remove it")
        kind = kind_of(document)
        source = {
            "file": path.relative_to(results).as_posix(),
            "machine": str(document.get("machine") or document.get("device") or "not recorded"),
            "commit": _commit(document),
        }
        rows = KINDS[kind](document) if kind in KINDS else iter([{}])
        tables.setdefault(kind, []).extend({**row, **source} for row in rows)
        command = document.get("command")
        commands.setdefault(kind, []).append(
            f"- `{source['file']}`: `{command}`" if command else f"- `{source['file']}`"
        )
    parts = [
        "# Performance\n\nWritten by `python -m benchmarks.collect` from `benchmarks/results`; raw numbers are there. "
        "Times of one process are comparable within a row's file only; ratios were taken within rounds, A B A B.\n"
        "A commit with a + had changed files.\n"
    ]
    for kind in sorted(tables, key=lambda kind: (kind == "other", kind)):
        listed = "\n".join(commands[kind])
        parts.append(f"## {kind}\n\n{_table(tables[kind])}\n\n{listed}\n")
    return "\n".join(parts)


def _commit(document: Mapping[str, Any]) -> str:
    commit = str(document.get("commit") or "not recorded")[:12]
    return commit + ("+" if document.get("changed_files") else "")


def _table(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
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
