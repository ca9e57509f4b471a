"""Prints how our fine-tuning figures stand to PEFT's: python bench/ratios.py FILE…"""

import json
import sys
from pathlib import Path

PAIRS = [
    ("F1", "PEFT-F1"),
    ("F1", "PEFT-F1-compile"),
    ("F2", "PEFT-F2-padded"),
    ("F2", "PEFT-F2-packed"),
    ("F2", "PEFT-F2-packed-compile"),
]

values = {}
for name in sys.argv[1:]:
    for line in Path(name).read_text().splitlines():
        figure = json.loads(line)
        values[figure["id"]] = figure["value"]
for ours, theirs in PAIRS:
    if ours in values and theirs in values:
        ratio = values[ours] / values[theirs]
        print(f"{ours} {values[ours]:.0f}  {theirs} {values[theirs]:.0f}  {ratio:.2f}x")
