"""Loads adapters that Loquetier exported into PEFT and compares their logits with the golden ones.

    python worker/tests/golden/check_export.py                       all of exports/
    python worker/tests/golden/check_export.py BASE ADAPTER EXPECTED one: two folders and a file
                                                                     with `ids` and `logits`

Ends with status 1 when a logit differs by more than TOLERANCE or PEFT leaves a weight unused.
"""

import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

HERE = Path(__file__).parent
TOLERANCE = 1e-5


def largest_difference(base, adapter, expected):
    """Largest difference of a logit; raises when PEFT complains about a key."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(model, adapter).eval()
    values = load_file(expected)
    with torch.no_grad():
        logits = model(input_ids=values["ids"][None].long(), use_cache=False).logits[0]
    return float((logits - values["logits"]).abs().max())


def main():
    torch.set_num_threads(1)
    if len(sys.argv) == 4:
        cases = [tuple(Path(argument) for argument in sys.argv[1:])]
    else:
        cases = [
            (HERE / "bases" / base, folder, HERE / "adapters" / name / "expected.safetensors")
            for name, base in (("all-linear", "llama3"), ("qv", "qwen3"), ("rslora", "qwen2"))
            for folder in [HERE / "exports" / name]
        ]
    failed = False
    for base, adapter, expected in cases:
        largest = largest_difference(base, adapter, expected)
        failed |= not largest <= TOLERANCE
        print(f"{adapter.name}: largest difference {largest:.2e}, allowed {TOLERANCE:.0e}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
