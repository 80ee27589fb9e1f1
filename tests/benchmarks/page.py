"""All results of tests/benchmarks/results on one page, tests/benchmarks/bench.html: aims beside what was measured, and pictures. No script, no network."""
import json
import math
from pathlib import Path

from rlworkbench.core.files import write_text
from rlworkbench.serving.report import PAGE, table
from rlworkbench.show.axes import text
from rlworkbench.show.curves import bars_svg, curves_svg
from rlworkbench.show.palette import css, drawing, number, paint, plain
from tests.benchmarks.bars import BARS

RESULTS, OUT = Path(__file__).parent / "results", Path(__file__).parent / "bench.html"
STYLE = ".scroll td:first-child{min-width:13rem}td:nth-child(n+2):nth-last-child(n+2){white-space:nowrap}.met{font-weight:600;white-space:nowrap}.met.no{color:var(--rlw-negative)}.met.yes{color:var(--rlw-positive)}figure svg{margin:.2rem 0}"


def read(folder=RESULTS) -> dict:
    "{name of a benchmark: its result}"
    found = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(Path(folder).glob("*.json"))]
    return {r["name"]: r for r in found}


def judged(results: dict) -> list:
    "(bar, value, low, high, met, whether the interval says so, too) of every aim; None where it was not measured."
    out = []
    for bar in BARS:
        try:
            found = results[bar.benchmark]["found"]
            out.append((bar, *bar.read(found), bar.met(found), bar.sure(found)))
        except (KeyError, ValueError):
            out.append((bar, None, None, None, None, None))
    return out


def load_of(result: dict) -> str:
    "The machine's load before, and after where that is known."
    return " to ".join(f"{x:.1f}" for x in result["load"]) if result.get("load") else "not noted"


def aims(results: dict) -> str:
    "Every bar beside its measured value."
    rows = []
    for bar, value, low, high, met, sure in judged(results):
        result = results.get(bar.benchmark)
        measured = "not measured" if value is None else number(value) + bar.unit + (f" [{number(low)}, {number(high)}]" if low is not None else "")
        rows.append((bar.says, measured, bar.aim(), (met, sure), result["date"] if value is not None else "", load_of(result) if value is not None else ""))
    mark = {(True, True): '<span class="met yes">met</span>', (True, False): '<span class="met yes">met</span> <span class=soft>not by the whole range</span>', (False, True): '<span class="met no">not met</span>',
            (False, False): '<span class="met no">not met</span> <span class=soft>its range reaches there</span>', (None, None): "<span class=soft>—</span>"}
    cells = "".join("<tr>" + "".join(f"<td>{mark[x] if i == 3 else plain(x)}</td>" for i, x in enumerate(row)) + "</tr>" for row in rows)
    return "<div class=scroll><table><tr>" + "".join(f"<th>{h}</th>" for h in ("what", "measured", "aim", "", "day", "load")) + f"</tr>{cells}</table></div>"


def ranges_svg(rows: list, width: int = 860):
    "One line per ratio: a dot, its interval, and the aim as a bar across; logarithmic."
    rows = [r[:-1] for r in rows if r[1] is not None and r[0].unit == " ×"]
    ends = [x for bar, *values, _ in rows for x in (*values, bar.least, bar.most) if x]
    low, high = math.log(min(ends) * .9), math.log(max(ends) * 1.1)
    left, right, each = 290, width - 60, 24
    at = lambda x: left + (right - left) * (math.log(x) - low) / (high - low)
    marks = [t for t in (.1, .2, .5, 1, 2, 5, 10, 20) if low <= math.log(t) <= high]
    bottom = 16 + each * len(rows)
    shapes = [f'<path d="M{at(t):.1f} 10V{bottom}" {paint(stroke="rule")}/>' + text(f"{t:g}", at(t), bottom + 16, "middle") for t in marks]
    for k, (bar, value, lo, hi, met) in enumerate(rows):
        y, key = 26 + each * k, "positive" if met else "negative"
        shapes.append(text(bar.brief, left - 14, y + 4, "end"))
        shapes += [f'<path d="M{at(x):.1f} {y - 9}V{y + 9}" stroke-width="2" {paint(stroke="soft")}/>' for x in (bar.least, bar.most) if x]
        if lo is not None:
            shapes.append(f'<path d="M{at(lo):.1f} {y}H{at(hi):.1f}" stroke-width="3" {paint(stroke=key)}/>')
        shape = f'<circle cx="{at(value):.1f}" cy="{y}" r="4.5" {paint(key)}/>' if met else f'<rect x="{at(value) - 4.5:.1f}" y="{y - 4.5}" width="9" height="9" {paint(key)}/>'
        shapes += [shape, text(number(value), right + 12, y + 4)]
    return drawing(shapes, width, bottom + 30, "measured ratios and their aims")


def learning(found: dict) -> str:
    "Two curves."
    steps = list(range(1, found["steps"] + 1))
    lines = {"this workbench": found["curves"]["ours"], "TRL 1.16": found["curves"]["trl"]}
    says = (f"Share of right replies in each step, mean of {found['seeds']} seeds: {found['bed']}, the same weights, problems and order; other random numbers. Areas: ratio {found['ratio']:.3f} "
            f"[{found['low']:.3f}, {found['high']:.3f}], Student's interval over seeds. Last ten steps: {found['last_ten']['ours']:.3f} and {found['last_ten']['trl']:.3f}.")
    return figure(curves_svg(lines, steps, "Plain GRPO learns alike", "step", "share right", width=760), says)


def figure(picture, says: str) -> str:
    "A picture and what to notice."
    return f"<figure><div class=scroll>{picture}</div><figcaption>{plain(says)}</figcaption></figure>"


def scaling(found: dict) -> str:
    "Exponents as a table, times and shares of the peak as curves."
    axes = [k for k in found if isinstance(found[k], dict) and "exponents" in found[k]]
    rows = [(axis, ", ".join(f"{x:,}" for x in found[axis]["sizes"]), *(f"{found[axis]['exponents'][k]:.2f} ({found[axis]['last_exponents'][k]:.2f})" for k in ("seconds", "rollout", "update", "megabytes"))) for axis in axes]
    out = f'<div class=scroll>{table(["axis", "sizes", "step", "rollout", "update", "memory"], rows, (2, 3, 4, 5))}</div>'
    out += "<p class=soft>Exponents over all four sizes; in brackets between the last two. A step at its usual size: 4 problems, 8 replies, 32 tokens, 36 image tokens, 96 words. Fixed costs make exponents below 1.</p>"
    for what, title, y_title in (("seconds", "CPU time of a step", "CPU seconds, log₂"), ("megabytes", "Memory on top of the model", "megabytes, log₂")):
        lines = {axis: [math.log2(y) for y in found[axis][what]] for axis in axes}
        out += figure(curves_svg(lines, [1, 2, 3, 4], title, "first to fourth size of the axis", y_title, width=680), "Each line is one axis; sizes as in the table.")
    shares = {f"{axis}, {k}": [100 * s for s in found[axis]["share_of_peak"][k]] for axis in ("replies", "tokens", "image tokens", "words") if axis in found for k in ("rollout", "update")}
    return out + figure(curves_svg(shares, [1, 2, 3, 4], "Share of the GEMM peak", "first to fourth size of the axis", "per cent", width=760, height=340),
                        f"Multiplications and additions of matrix products over CPU time, as a share of {found['gemm_peak_gflops']:.0f} GFLOP/s: the fastest 1024 × 1024 product in the same processes, one thread.")


def binds(found: dict) -> str:
    "Where a step's time goes; what was tried."
    cases = list(found["shares"])
    rows = [(part, *(f"{100 * found['shares'][c][part]:.0f} %" for c in cases)) for part in found["shares"][cases[0]] if part != "seconds"]
    out = f'<div class=scroll>{table(["part of a step", *cases], rows, tuple(range(1, len(cases) + 1)))}</div>'
    out += ("<p class=soft>Shares of the CPU time of a step, as a profiler of Python sees them; being watched makes Python's own share larger. Drawing is a part of its own where a random number is drawn for every word.</p>")
    tried = {"weights laid out (in, out)": "Matrix products of decoding with weights laid out (in, out), CPU time over that of the usual layout. Not done: the gain is none or small where it would count, and a second copy of all weights is held.",
             "a number for each row": "Drawing words: torch.multinomial, which draws a random number for each word, over one number for each row and a running sum. Done beyond 4,096 words; below, the draws of earlier runs stay what they were."}
    for name, says in tried.items():
        rows = [(k, f"{number(r['ratio'])} × [{number(r['ratio_low'])}, {number(r['ratio_high'])}]") for k, r in found[name].items()]
        out += f"<p>{plain(says)}</p><div class=scroll>{table(['size', 'ratio'], rows, (1,))}</div>"
    return out


def memory(found: dict) -> str:
    "Peaks of whole processes."
    s, m = found["studio"], found["smollm2"]
    values = {"loaded": m["loaded"], "one piece": m["megabytes"], "16 at once": found.get("smollm2, 16 at once", {}).get("megabytes"), **{f"studio, {k}": v for k, v in s.items()}}
    return figure(bars_svg(list(values.values()), list(values), "Peak memory of whole processes", "", "megabytes", width=760),
                  f"smollm2: {m['parameters']:,} parameters in float32, adapters of rank 16, 8 × 8 replies of at most 24 tokens: loaded, a step in one piece, a step with 16 replies at once; {m['cpu_seconds_per_step']:.0f} CPU seconds a step. "
                  "studio: when it says its address, when each page has been opened, after three rounds of a visitor on recorded pages.")


def flat(found, path="") -> list:
    "Nested results as (name, number) rows; long lists are left out."
    if isinstance(found, dict):
        return [row for k, v in found.items() for row in flat(v, f"{path}, {k}" if path else str(k))]
    if isinstance(found, list):
        return [(path, ", ".join(number(x) if isinstance(x, (int, float)) else str(x) for x in found))] if len(found) <= 8 else []
    return [(path, number(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else str(found))]


def details(results: dict) -> str:
    "All numbers of all results, folded."
    out = []
    for name, r in results.items():
        about = [f"measured {r['date']}", f"load {load_of(r)}", ", ".join(f"{k} {v}" for k, v in r["versions"].items())]
        out.append(f"<details><summary>{plain(name)} <span class=soft>{plain('; '.join(about[:2]))}</span></summary><p class=soft>{plain(about[2])}</p><div class=scroll>{table(['', ''], flat(r['found']), (1,))}</div></details>")
    return "".join(out)


def page(results: dict) -> str:
    "The page as HTML."
    rows = judged(results)
    machines = {f"{r['machine']['processor']}, {r['machine']['cores']} cores, {r['machine']['gigabytes']:g} GB" for r in results.values()}
    met, missed = sum(r[4] is True for r in rows), sum(r[4] is False for r in rows)
    parts = {"Aims and measurements": aims(results), "Ratios": figure(ranges_svg(rows), "A dot within its aim, a square beyond it; the line is the 95 % interval (of whole steps, attribution and older results the range of neighbouring processes); the upright stroke is the aim.")}
    for title, name, draw in (("Learning", "learning", learning), ("Growth", "scaling", scaling), ("What binds", "what binds", binds), ("Memory", "memory", memory)):
        if name in results:
            parts[title] = draw(results[name]["found"])
    parts["All numbers"] = details(results)
    body = "".join(f"<h2>{title}</h2>{part}" for title, part in parts.items())
    head = (f"<h1>Benchmarks</h1><p>{plain('; '.join(sorted(machines)))}. One thread, CPU time, ways in turn (A B B A), medians. "
            f"Of {len(rows)} aims {met} are met, {missed} are not, {len(rows) - met - missed} are not measured. Other work shared the machine; the load is noted beside each result. "
            "Comparisons with TRL are of CPUs: on a GPU TRL has other kernels, and nothing here says which is faster there.</p>")
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>Benchmarks of rlworkbench</title>'
            f"<style>{css()}{PAGE}{STYLE}</style></head><body>{head}{body}</body></html>\n")


def write_page(folder=RESULTS, out=OUT) -> Path:
    "Write the page of all results. Raises ValueError if there are none."
    results = read(folder)
    if not results:
        raise ValueError(f"no results in {folder}")
    write_text(out, page(results))
    return out


if __name__ == "__main__":
    print(write_page())
