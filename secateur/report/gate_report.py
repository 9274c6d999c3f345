"""What the gate found, for machines that run it: JUnit XML for a list of tests, Markdown for a pull request."""

from __future__ import annotations

from xml.etree import ElementTree

from secateur.evaluation.eval_text import with_bos
from secateur.evaluation.gate.checks import FAILED, UNCLEAR, Check
from secateur.evaluation.gate.gate import GateResult

_MARKS = {"ok": "✅", FAILED: "❌", UNCLEAR: "⚠️"}


def figures(check: Check) -> tuple[str, str, str, str]:
    """The value, the baseline's, the change and its interval, as a person reads them."""
    form = {"perplexity": "{:.3f}", "size": "{:,.0f} B", "kl": "{:.4f}"}.get(check.name, "{:.2%}")
    share = "{:+.4f}" if check.name == "kl" else "{:+.2%}"
    return (
        form.format(check.value),
        form.format(check.baseline) if check.baseline is not None else "–",
        share.format(check.change) if check.change is not None else "–",
        f"{share.format(check.interval[0])} to {share.format(check.interval[1])}" if check.interval else "–",
    )


def markdown(result: GateResult) -> str:
    """A table with a heading, as GitHub and GitLab show it."""
    state = "passed" if result.passed else "failed"
    lines = [
        f"### secateur gate: {state}",
        "",
        f"`{result.model}` against `{result.baseline}`, on windows {with_bos(result.evaluation.text['bos'])}",
        "",
        f"| | figure | now | baseline | change | {result.confidence:.0%} interval | |",
        "|---|---|---|---|---|---|---|",
    ]
    for check in result.checks:
        cells = [_MARKS[check.verdict], check.name, *figures(check), check.words]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", *(f"- `{note.replace('`', ' ')}`" for note in result.notes), *([""] if result.notes else [])]
    return "\n".join(lines)


def junit(result: GateResult) -> str:
    """A test suite with one test for each figure, as XML; what is unclear counts as passed and says so in its output."""
    failures = sum(check.verdict == FAILED for check in result.checks)
    suites = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        suites,
        "testsuite",
        name="secateur gate",
        tests=str(len(result.checks)),
        failures=str(failures),
        errors="0",
        skipped="0",
        time=f"{result.evaluation.seconds:.3f}",
    )
    for check in result.checks:
        case = ElementTree.SubElement(suite, "testcase", classname=_xml(result.model), name=check.name)
        value, baseline, change, between = figures(check)
        if check.verdict == FAILED:
            ElementTree.SubElement(
                case, "failure", message=_xml(check.words), type="regression"
            ).text = f"{check.name} is {value}, the baseline {baseline}: {change} ({between})"
        ElementTree.SubElement(case, "system-out").text = f"{check.verdict}: {check.words}"
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _xml(text: str) -> str:
    """Without the characters that XML has no way to write."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
