"""Build one tiny base model: `python -m sweep.tiny llama-code`; prints a line after each tenth step."""

import argparse
from pathlib import Path

from sweep.tiny import BASE_MODELS, build_base_model, default_cache_dir

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("name", choices=BASE_MODELS)
parser.add_argument("--cache-dir", type=Path, default=default_cache_dir())
args = parser.parse_args()
print(
    build_base_model(
        args.name,
        args.cache_dir,
        lambda step, loss_nats: print(f"step {step} loss {loss_nats:.3f}", flush=True),
    )
)
