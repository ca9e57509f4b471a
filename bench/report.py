"""Makes bench/RESULTS.md and the table in README.md from bench/results/*.json.

    python bench/report.py [--check] [FILE…]

FILEs hold figures as `loquetier bench --json` and bench/peft.py append them, one JSON object a
line: the last of an id takes the place of what was kept. With --check nothing is written: it fails
where the pages do not agree with what is kept. Nothing but the standard library.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = ROOT / "bench/results/h200.json"
THEIRS = ROOT / "bench/results/h200-peft.json"
CPU = ROOT / "bench/results/cpu.json"
PAGE = ROOT / "bench/RESULTS.md"
README = ROOT / "README.md"
BEGIN = "<!-- figures: made by ./dev bench-report -->"
END = "<!-- end of figures -->"

FIELDS = ["id", "value", "unit", "ceiling", "peer", "command", "commit", "date"]

# Every figure, in the order of the tables: what it is, whether less is better, who the peer is.
FIGURES = {
    "F1": ("fine-tuning, 4×2048 full rows, r 16", False, "PEFT, torch.compile"),
    "F2": ("fine-tuning, GSM8K packed, real tokens", False, "PEFT, the faster of its settings"),
    "F3": ("four unlike jobs at once, of one alone", False, ""),
    "F4": ("training memory a row", True, ""),
    "D1-base": ("decode, 1 sequence, base", False, "vLLM"),
    "D1-adapter": ("decode, 1 sequence, adapter", False, "vLLM"),
    "D2": ("decode, 64 sequences, 32 adapters", False, "vLLM"),
    "D3-1": ("cost of LoRA, 64 sequences, 1 adapter", True, "vLLM"),
    "D3-32": ("cost of LoRA, 64 sequences, 32 adapters", True, "vLLM"),
    "D4": ("prefill, 16×2048, 16 adapters", False, "vLLM"),
}
# On the CPU: what gateway and queue cost.
GATEWAY = {
    "G1-first": ("time that gateway and Redis add to the first token, P50", True, ""),
    "G1-token": ("the same, to each next token, P50", True, ""),
    "G2": ("one gateway process on one core, 256 open streams", False, ""),
}
PEFT = {
    "PEFT-F1": "PEFT, 4×2048 full rows",
    "PEFT-F1-compile": "PEFT, 4×2048 full rows, torch.compile",
    "PEFT-F2-padded": "PEFT, GSM8K padded to 1024, real tokens",
    "PEFT-F2-packed": "PEFT, GSM8K packed into 2048, real tokens",
    "PEFT-F2-packed-compile": "PEFT, GSM8K packed into 2048, torch.compile, real tokens",
}


def fail(text):
    sys.exit(f"bench-report: {text}")


def check(figure, names, origin):
    if list(figure) != FIELDS:
        fail(f"{origin}: the fields must be {', '.join(FIELDS)}: {figure}")
    if figure["id"] not in names:
        fail(f"{origin}: no figure is called {figure['id']}")


def kept(path, names):
    figures = json.loads(path.read_text()) if path.exists() else []
    for figure in figures:
        check(figure, names, path.name)
    return {figure["id"]: figure for figure in figures}


def take(file, *groups):
    for line in Path(file).read_text().splitlines():
        figure = json.loads(line)
        check(figure, [*FIGURES, *PEFT, *GATEWAY], file)
        for names, figures in groups:
            if figure["id"] in names:
                figures[figure["id"]] = figure


def ordered(by_id, names):
    return [by_id[name] for name in names if name in by_id]


def number(value):
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3g}"


def row(figure):
    what, less, peer = (FIGURES | GATEWAY)[figure["id"]]
    value = figure["value"]
    of_it = ratio = "–"
    if figure["ceiling"] and value > 0:
        share = figure["ceiling"] / value if less else value / figure["ceiling"]
        of_it = f"{100 * share:.0f} %"
    if figure["peer"] and value > 0:
        share = figure["peer"] / value if less else value / figure["peer"]
        ratio = f"{share:.2f}×"
    theirs = f"{number(figure['peer'])} ({peer})" if figure["peer"] else "–"
    ours = f"**{number(value)} {figure['unit']}**"
    cells = [figure["id"], what, ours, number(figure["ceiling"]), of_it, theirs, ratio]
    return "| " + " | ".join(cells) + " |"


def table(figures):
    if not figures:
        return "No figures have been taken yet."
    head = [
        "| | figure | here | ceiling | of it | peer | against it |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(head + [row(figure) for figure in figures])


def page(figures, theirs, cpu):
    parts = [
        "# Results",
        "Made by `./dev bench-report` from `bench/results/h200.json`; not written by hand.\n\n"
        "One NVIDIA H200, the Llama-3-8B shape (random bf16 weights), LoRA r 16 on all seven\n"
        "linear modules unless said otherwise. \"Real\" tokens never count padding; fine-tuning\n"
        "includes the optimizer; decoding is 128 tokens in, 128 out, prefill excluded. Ceilings\n"
        "are what the hardware allows, measured on one H200. Where less is better, the ratios are\n"
        "turned round.",
        table(figures),
    ]
    if theirs:
        lines = [f"| {PEFT[f['id']]} | {number(f['value'])} tokens/s |" for f in theirs]
        parts += ["## PEFT on the same machine", "\n".join(["| setting | |", "|---|---|", *lines])]
    if cpu:
        parts += [
            "## Gateway and queue on the CPU",
            "Two cores, a real Redis, the demo base; each request sent when the one before had\n"
            "ended. What P99 was is printed by the command.",
            table(cpu),
        ]
    lines = [
        f"| {figure['id']} | `{figure['command']}` | {figure['commit']} | {figure['date']} |"
        for figure in [*figures, *theirs, *cpu]
    ]
    head = ["| figure | command | commit | date |", "|---|---|---|---|"]
    parts += ["## Commands", "\n".join(head + lines)]
    return "\n\n".join(parts) + "\n"


def into_readme(text, figures):
    if BEGIN not in text or END not in text:
        fail(f"README.md needs the lines {BEGIN} and {END}")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}\n{table(figures)}\n{END}{after}"


def as_array(figures):
    lines = ["  " + json.dumps(figure, ensure_ascii=False) for figure in figures]
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


def main():
    ours, theirs, cpu = kept(OURS, FIGURES), kept(THEIRS, PEFT), kept(CPU, GATEWAY)
    for file in sys.argv[1:]:
        if file != "--check":
            take(file, (FIGURES, ours), (PEFT, theirs), (GATEWAY, cpu))
    # The peer's fastest setting counts, be it of this run or of an earlier one.
    for name in ["F1", "F2"]:
        rivals = [theirs[id]["value"] for id in theirs if id.startswith(f"PEFT-{name}")]
        if name in ours and rivals:
            earlier = ours[name]["peer"] if name == "F1" else None
            ours[name]["peer"] = max([*rivals, earlier or 0])
    ours, theirs, cpu = ordered(ours, FIGURES), ordered(theirs, PEFT), ordered(cpu, GATEWAY)
    wanted = {
        OURS: as_array(ours),
        THEIRS: as_array(theirs),
        CPU: as_array(cpu),
        PAGE: page(ours, theirs, cpu),
        README: into_readme(README.read_text(), ours),
    }
    for path, text in wanted.items():
        if not path.exists() or path.read_text() != text:
            if "--check" in sys.argv:
                fail(f"{path.relative_to(ROOT)} is not of these figures: run ./dev bench-report")
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")


main()
