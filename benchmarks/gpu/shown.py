"""One line of a part's result, for the terminal."""

from __future__ import annotations

from benchmarks.gpu.parts import Result


def shown(result: Result) -> str:
    """What matters of it, or why there is nothing."""
    said = [f"{key}: {result[key]}" for key in ("error", "skipped") if key in result]
    return "; ".join([*said, *_lines(result), *(f"{name} failed: {why}" for name, why in _failures(result))]) or "done"


def _failures(result: Result) -> list[tuple[str, str]]:
    return list(result.get("failures", {}).items())


def _lines(result: Result) -> list[str]:
    if "rows" in result and "time_ratios" in result:
        return [
            f"{name} {row['images_per_second']:.1f} img/s"
            + ("" if row["mfu"] is None else f" ({100 * row['mfu']:.1f}%)")
            for name, row in result["rows"].items()
        ]
    if "rows" in result:
        return [f"{name} {row['share_of_copy']:.0%} of a copy" for name, row in result["rows"].items()]
    if "ms_per_step" in result:
        return [f"{name} {ms:.1f} ms" for name, ms in result["ms_per_step"].items()]
    if "memory" in result:
        return [f"{policy} {_bytes(row)}" for policy, row in result["memory"].items()]
    if "decoding" in result:
        return [
            f"{name} {row['images_per_second']['device']:.0f} img/s, {'equal' if row['bitwise_equal'] else 'not equal'}"
            for name, row in result["decoding"].items()
        ]
    if "bitwise_equal" in result:
        share = result["whole"]["data_wait_share"]
        equal = "bitwise equal" if result["bitwise_equal"] else f"off by {result['largest_difference']:.1e}"
        return [f"resumed run {equal}", f"waits {100 * share:.1f}% of a step"]
    if "time_ratios" in result:
        return [f"{name} {ratio['median']:.2f} of flat's time" for name, ratio in result["time_ratios"].items()]
    if "differences" in result:
        return [f"{result['backend']}: off by {max(result['differences'].values()):.1e}"]
    if "reached" in result:
        peak, bandwidth = result["device"]["peak"], result["device"]["bandwidth"]
        return [f"{peak / 1e12:.1f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s"]
    return [f"{key} {value}" for key, value in result.items() if key == "largest_labelled"]


def _bytes(row: Result) -> str:
    if "bytes" not in row:
        return row.get("out_of_memory", "not measured")
    words = [
        f"{name} {found['planned'] / 1e9:.3g} planned, {found['measured'] / 1e9:.3g} measured GB"
        for name, found in row["bytes"].items()
        if found["planned"] is not None and found["measured"] is not None
    ]
    return ", ".join(words) or "not measured"
