"""The end of a demo: what was measured, in tables, and in words no stronger than the rows can carry."""

from collections.abc import Sequence

from rich.console import Console

from command_line.output import bytes_text, print_table
from command_line.results import DemoResults, DeviceResult
from command_line.significance import Difference, difference
from protocol.runs import Scores


def print_report(out: Console, results: DemoResults) -> None:
    """Print every table and what can be said about them."""
    out.print()
    _print_models(out, results)
    out.print()
    _print_quality(out, results)
    out.print()
    _print_lines(out, verdict(results))
    out.print()
    _print_traffic(out, results)
    _print_lines(out, traffic_lines(results))
    out.print()
    _print_times(out, results)


def _print_lines(out: Console, lines: Sequence[str]) -> None:
    for line in lines:
        out.print(line, markup=False, soft_wrap=not out.is_terminal)


def _print_models(out: Console, results: DemoResults) -> None:
    rows = [
        [
            each.name,
            each.domain,
            each.architecture,
            f"{each.parameters / 1e6:.2f} M",
            each.tokenizer,
            each.training_rows,
        ]
        for each in results.devices
    ]
    rows += [
        [name, "mix", each.architecture, f"{each.parameters / 1e6:.2f} M", each.tokenizer, "public rows"]
        for name, each in (("LLM", results.llm), ("proxy", results.proxy))
    ]
    print_table(out, "Models", ["Model of", "Domain", "Architecture", "#Parameters", "Tokenizer", "#Learns from"], rows)


def _print_quality(out: Console, results: DemoResults) -> None:
    rows: list[list[object]] = []
    for device in results.devices:
        scores = (device.before, device.standalone, device.co_tuned)
        rows.append([device.name, device.domain, *_cells(scores), device.before.num_rows])
    for name, cloud in (("LLM", results.llm), ("proxy", results.proxy)):
        rows.append([name, "mix", *_cells((cloud.before, None, cloud.co_tuned)), cloud.before.num_rows])
    stages = _cell(["before", "alone", "co-tuned"])
    names = ("Exact match", "Rouge-L", "Bits a byte (less is better)")
    columns = ["Model of", "Domain", *(f"#{name}\n{stages}" for name in names), "#Test rows"]
    title = "Quality before tuning, after the device tuned alone, and after co-tuning"
    print_table(out, title, columns, rows)


def _cells(scores: Sequence[Scores | None]) -> list[str]:
    return [
        _cell(["-" if each is None else f"{getattr(each, metric):.{digits}f}" for each in scores])
        for metric, digits in (("exact_match", 1), ("rouge_l", 1), ("bits_per_byte", 3))
    ]


def _cell(parts: Sequence[str]) -> str:
    return "".join(f"{part:>{width}}" for part, width in zip(parts, (7, 7, 10), strict=True))


def verdict(results: DemoResults) -> list[str]:
    """Return what the exact-match scores show, a line a comparison, and what they cannot show."""
    lines = ["What these rows can show (exact match, 95% intervals):"]
    for device in results.devices:
        lines.append(_compare(f"{device.name}, co-tuned against standalone", device.standalone, device.co_tuned))
    lines.append(_pooled(results.devices))
    for name, cloud in (("LLM", results.llm), ("proxy", results.proxy)):
        lines.append(_compare(f"{name}, co-tuned against before", cloud.before, cloud.co_tuned))
    lines.append(
        "One run with one seed: how much another seed would change is not measured here. Both device columns had the"
        " same number of optimizer steps on the device's own model."
    )
    return lines


def _compare(what: str, before: Scores, after: Scores) -> str:
    return _sentence(what, difference(before.exact_match, after.exact_match, min(before.num_rows, after.num_rows)))


def _pooled(devices: Sequence[DeviceResult]) -> str:
    rows = sum(each.standalone.num_rows for each in devices)
    shares = [
        sum(scores.exact_match * scores.num_rows for scores in several) / max(1, rows)
        for several in ([each.standalone for each in devices], [each.co_tuned for each in devices])
    ]
    return _sentence("all devices together, co-tuned against standalone", difference(shares[0], shares[1], rows))


def _sentence(what: str, found: Difference) -> str:
    numbers = f"{found.points:+.1f} points on {found.num_rows} rows ({found.low:+.1f} to {found.high:+.1f})"
    if not found.shown:
        return f"  {what}: {numbers}: no difference that these rows can show"
    return f"  {what}: {numbers}: {'higher' if found.points > 0 else 'lower'}"


def _print_traffic(out: Console, results: DemoResults) -> None:
    rows = [
        [direction, kind, bytes_text(count)]
        for direction in ("up", "down")
        for kind, count in sorted(results.bytes.get(direction, {}).items())
    ]
    title = f"What crossed the network in {results.rounds} rounds with {len(results.devices)} devices"
    print_table(out, title, ["", "Kind", "#Bytes"], rows)


def traffic_lines(results: DemoResults) -> list[str]:
    """Return what crossed the network against what whole models would have cost."""
    sent = sum(sum(kinds.values()) for kinds in results.bytes.values())
    return [
        f"In all {bytes_text(sent)}. Whole models, down and up once a round for each device: the devices' own"
        f" {bytes_text(results.instead.slm_weights)} ({_ratio(results.instead.slm_weights, sent)}), the LLM"
        f" {bytes_text(results.instead.llm_weights)} ({_ratio(results.instead.llm_weights, sent)}).",
        f"Alignment between each device's tokenizer and the proxy's: {results.alignment['coverage']:.1%} of the"
        f" response bytes covered; first tokens of the same class in {results.alignment['class_agreement']:.1%} of"
        " spans.",
    ]


def _ratio(instead: int, sent: int) -> str:
    return f"{instead / sent:.1f} times as much" if sent else "nothing was sent"


STAGE_NAMES = {
    "base_models": "base models",
    "start": "start of the cloud",
    "enrol": "enrolment of the devices",
    "runs": "both runs, side by side:",
    "standalone": "  standalone run",
    "wait_for_worker": "  co-tuning: wait for a worker",
    "prepare_proxy": "  co-tuning: make the proxy",
    "devices": "  co-tuning: devices train",
    "aggregate": "  co-tuning: average the updates",
    "co_tune_llm": "  co-tuning: LLM and proxy",
    "evaluate": "  co-tuning: measure",
}


def _print_times(out: Console, results: DemoResults) -> None:
    rows = [[STAGE_NAMES.get(stage, stage), _tenths(seconds)] for stage, seconds in results.seconds_by_stage.items()]
    rows.append(["everything", _tenths(results.seconds)])
    rows.append(["processor time of all processes", _tenths(sum(results.cpu_seconds.values()))])
    print_table(out, "Seconds", ["Stage", "#Wall clock"], rows)
    out.print()
    stages = results.device_seconds_by_stage.items()
    print_table(
        out, "Seconds of the mean device", ["Stage", "#Wall clock"], [[name, _tenths(each)] for name, each in stages]
    )
    out.print()
    memory = [[name, bytes_text(count)] for name, count in results.peak_memory_bytes.items()]
    print_table(out, "Peak memory", ["Process", "#Resident"], memory)


def _tenths(seconds: float) -> str:
    return f"{seconds:.1f}"
