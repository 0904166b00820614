"""Compare adapters that are written here with what PEFT makes of them.

    python tools/compare/compare_adapters_out.py [--tuned | --adapters | --together] [NAME …]

Needs `peft` (and `accelerate`) beside what the tests need. Three comparisons, over the models and adapters of
`compare_peft.py`:

- `--tuned`: every parameter of a small random model is changed, the adapter of the change is extracted at full rank, and
  PEFT puts it on the base. What it merges must be the changed model.
- `--adapters`: an adapter of random numbers, saved as PEFT saves it, is written again by `output: lora`, and PEFT merges both.
  Where an adapter acts on a tied embedding or head, the logits under the adapters are compared instead.
- `--together`: adapters of all kinds on one Llama, and variants of them in other dtypes and ranks, are merged to one adapter with
  equal weights. What PEFT merges must be the mean of its merges of each.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from compare_peft import CASES, LOGITS
from peft import LoraConfig, PeftModel, get_peft_model

from streammerge.api import merge
from streammerge.config.lora import extraction
from streammerge.errors import StreammergeError

RANK = 64


def _model(name: str, room: Path) -> tuple[Any, Any]:
    """Return the class and a random model of a case; it is saved as the base."""
    (auto, kind, settings), _ = CASES[name]
    torch.manual_seed(7)
    made = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(kind, **settings))
    made.save_pretrained(room / "base")
    return getattr(transformers, auto), made


def tuned(name: str, room: Path) -> str:
    """Return how far PEFT's merge of an extracted adapter is from the fine-tuned model."""
    auto, model = _model(name, room)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not re.search(
                r"cls_token|A_log|\.D$|position_embeddings$|class_embedding|input_projection_weight", key
            ):
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(room / "tuned")
    wanted: dict[str, Any] = {"rank": RANK, "energy": None, "dtype": None}
    merge(extraction(str(room / "tuned"), str(room / "base"), **wanted), room / "adapter", progress=False)
    adapted = PeftModel.from_pretrained(auto.from_pretrained(room / "base"), room / "adapter")
    return _compared(adapted.merge_and_unload().state_dict(), model.state_dict())


def adapter(name: str, room: Path) -> str:
    """Return how far PEFT's merges of an adapter and of its copy are from each other."""
    auto, model = _model(name, room)
    adapted = get_peft_model(model, LoraConfig(**CASES[name][1]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(room / "own")
    said = _logits(adapted) if name in LOGITS else None
    wanted: dict[str, Any] = {"rank": RANK, "energy": None, "dtype": None}
    merge(
        extraction(f"{room / 'base'}+{room / 'own'}", str(room / "base"), **wanted),
        room / "adapter",
        progress=False,
    )
    copy = PeftModel.from_pretrained(auto.from_pretrained(room / "base"), room / "adapter")
    if said is not None:
        distance = ((_logits(copy) - said).abs().max() / said.abs().max()).item()
        return f"{'equal' if distance < 1e-5 else 'DIFFERENT'}: logits {distance:.1g} apart"
    return _compared(copy.merge_and_unload().state_dict(), adapted.merge_and_unload().state_dict())


def together(name: str, room: Path) -> str:
    """Return how far PEFT's merge of an adapter is from the mean of its merges of those that it is made of."""
    auto, _ = _model(name, room)
    kinds = [CASES[case][1] for case in CASES if CASES[case][0] == CASES[name][0]]
    kinds += [{"r": rank, "lora_alpha": 3, "target_modules": "all-linear"} for rank in (1, 2, 8, 16)]
    kinds += [
        {"r": 8, "target_modules": ["gate_proj", "up_proj"], "bias": "none", "dtype": dtype}
        for dtype in ("bfloat16", "float16")
    ]
    mean: dict[str, Any] = {}
    for number, kind in enumerate(kinds):
        torch.manual_seed(number)
        settings = dict(kind)
        dtype = settings.pop("dtype", None)
        adapted = get_peft_model(auto.from_pretrained(room / "base"), LoraConfig(**settings))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                    if dtype is not None:
                        parameter.copy_(parameter.to(getattr(torch, dtype)))
        adapted.save_pretrained(room / f"adapter-{number}")
        for key, value in adapted.merge_and_unload().state_dict().items():
            mean[key] = mean.get(key, 0.0) + value.double() / len(kinds)
    models = [{"model": f"{room / 'base'}+{room / f'adapter-{i}'}"} for i in range(len(kinds))]
    config = {
        "merge_method": "linear",
        "models": models,
        "output": {"kind": "lora", "base": str(room / "base")},
    }
    merge({**config, "rank": RANK}, room / "adapter", progress=False)
    one = PeftModel.from_pretrained(auto.from_pretrained(room / "base"), room / "adapter")
    return f"{_compared(one.merge_and_unload().state_dict(), mean)}, {len(kinds)} adapters in one"


def _compared(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if ours.keys() != theirs.keys():
        return f"DIFFERENT NAMES: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    worst, where = 0.0, ""
    for key, value in theirs.items():
        scale = torch.finfo(torch.float32).eps * value.abs().max().item()
        distance = (ours[key] - value).abs().max().item() / max(scale, 1e-30)
        worst, where = max((worst, where), (distance, key))
    return f"{'equal' if worst <= 8 else 'DIFFERENT'}: at most {worst:.1f} roundings apart ({where})"


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model.eval()(input_ids=torch.tensor([[3, 4, 5, 1, 7, 90]])).logits)


def _models() -> list[str]:
    """Return one case for each kind of model."""
    return list({CASES[name][0][1] + str("tie" in str(CASES[name][0])): name for name in CASES}.values())


def main() -> int:
    """Run the cases; return how many are not equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--tuned", action="store_true")
    kinds.add_argument("--adapters", action="store_true")
    kinds.add_argument("--together", action="store_true")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    runs: list[tuple[Callable[[str, Path], str], str]] = []
    every = not (given.tuned or given.adapters or given.together)
    runs += [(tuned, name) for name in given.names or _models() if every or given.tuned]
    runs += [(adapter, name) for name in given.names or list(CASES) if every or given.adapters]
    runs += [(together, name) for name in given.names or ["lora"] if every or given.together]
    failed = 0
    for run, name in runs:
        with tempfile.TemporaryDirectory() as room:
            try:
                line = run(name, Path(room))
            except StreammergeError as error:
                line = f"REFUSED: {re.sub(re.escape(room), '', str(error))}"
            except Exception as error:  # PEFT's own
                line = f"PEFT: {type(error).__name__}: {error}"
        failed += not line.startswith("equal")
        print(f"{run.__name__}: {name}: {line}", flush=True)
    print(f"{len(runs) - failed} of {len(runs)} equal")
    return failed


if __name__ == "__main__":
    sys.exit(main())
