"""Logits of the engine against Hugging Face transformers in float32, on the same card.

    python tests/gpu/parity.py                                   # the small checkpoints of the tests
    python tests/gpu/parity.py --model ~/gemma-3-270m            # a real one, over 2,000 positions of prose
    python tests/gpu/parity.py --random gemma-3-1b               # random weights in a published shape

Needs torch and transformers besides what the engine needs. One line a way of computing: prompts, every row
through the kernels for single rows, decode steps, and some of it with 8-bit KV. `agree` is the share of
positions with the same likeliest token, `error` the largest difference of a logit over the largest logit,
`rms` the ratio of the root mean squares. Exit code 1 when a limit is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from wicore.engine.base import ImageRows, SequenceInput, StepPlan
from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.engine import TensorrtEngine
from wicore.engine.tensorrt.weights import load_weights
from wicore.gemma3.checkpoint import Checkpoint, open_checkpoint
from wicore.gemma3.config import Gemma3Config, published
from wicore.gemma3.hf_config import config_to_hf

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
BLOCK, CHUNK = 32, 700
WAYS: dict[str, dict[str, Any]] = {
    "prompts": {},
    "prompts, int8 KV": {"kv": "int8"},
    "single rows": {"invariant": True},
    "decode steps": {"steps": 64},
    "decode steps, int8 KV": {"steps": 64, "kv": "int8"},
}


def tokens_of(path: Path, count: int, vocab: int) -> NDArray[np.int32]:
    """Prose from Python's documentation, or random ids where the checkpoint has no tokenizer."""
    if (path / "tokenizer.model").exists() and vocab > 10_000:
        import pydoc_data.topics

        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
        text = "\n".join(pydoc_data.topics.topics[name] for name in ("objects", "types", "specialnames"))
        ids = [2, *processor.encode(text)]
    else:
        ids = [2, *np.random.default_rng(0).integers(5, vocab - 5, count).tolist()]
    return np.array(ids[:count], np.int32)


def reference(path: Path, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits at every position, by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32, attn_implementation="eager")
    model = model.to("cuda").eval()
    with torch.no_grad():
        ids = torch.tensor(tokens[None].astype(np.int64), device="cuda")
        logits = model(input_ids=ids).logits[0].float().cpu().numpy()
    del model
    torch.cuda.empty_cache()
    found: NDArray[np.float32] = logits
    return found


def ours(
    checkpoint: Checkpoint,
    tokens: NDArray[np.int32],
    *,
    kv: str = "float16",
    invariant: bool = False,
    steps: int = 0,
    images: Sequence[ImageRows] = (),
    device: Device | None = None,
) -> NDArray[np.float32]:
    """Logits at every position; the last `steps` of them one at a time. `images` must lie within chunks of
    CHUNK. `device`: closed at the end; None: the card."""
    device = device or CudaDevice()
    blocks = -(-len(tokens) // BLOCK) + 1
    engine = TensorrtEngine(
        load_weights(device, checkpoint, int8_kv=kv == "int8"),
        checkpoint.config,
        device,
        block_tokens=BLOCK,
        global_blocks=blocks,
        window_blocks=blocks,
        kv=kv,  # type: ignore[arg-type]
        token_budget=1024,
        invariant=invariant,
    )
    table = np.random.default_rng(1).permutation(blocks).astype(np.int32)
    parts, start = [], 0
    first = len(tokens) - steps
    for size in [*(min(CHUNK, first - at) for at in range(0, first, CHUNK)), *[1] * steps]:
        end = start + size
        inside = [image for image in images if image.start < end and image.end > start]
        piece = SequenceInput(0, tokens[start:end], start, table, table, 0, None, images=inside)
        parts.append(engine.logits(StepPlan((piece,)))[0])
        start += size
    engine.close()
    return np.concatenate(parts)


def made_up(config: Gemma3Config, folder: Path) -> Path:
    """A checkpoint of random half weights in this shape, as transformers saves it."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    fields = config_to_hf(config, "float16")
    for name in ("architectures", "model_type", "torch_dtype"):
        fields.pop(name, None)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**fields)).half()
    model.save_pretrained(folder)
    return folder


def lines(path: Path, count: int) -> Iterator[tuple[str, float, float, float]]:
    checkpoint = open_checkpoint(path)
    tokens = tokens_of(path, min(count, checkpoint.config.max_context), checkpoint.config.vocab_size)
    expected = reference(path, tokens)
    for way, options in WAYS.items():
        found = ours(checkpoint, tokens, **options)
        steps = options.get("steps", 0)
        a, b = found[-steps:] if steps else found, expected[-steps:] if steps else expected
        error = float(np.abs(a - b).max() / np.abs(b).max())
        rms = float(np.sqrt(np.square(a - b).mean() / np.square(b).mean()))
        yield way, float((a.argmax(-1) == b.argmax(-1)).mean()), error, rms


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, action="append", default=[])
    parser.add_argument("--random", metavar="NAME")
    parser.add_argument("--positions", type=int, default=2000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = list(given.model)
        if given.random:
            config = published(given.random)
            if config is None:
                parser.error(f"--random: {given.random} is no published model")
            models.append(made_up(config, Path(folder)))
        if not models:
            models = [FIXTURES / name for name in ("tiny", "tiny-mqa", "tiny-image")]
        print(f"{'model':24} {'way':22} {'agree':>7} {'error':>9} {'rms':>9}")
        missed = False
        for path in models:
            for way, agree, error, rms in lines(path, given.positions):
                # 8-bit KV is shown beside the others and judged by nobody; random weights by the error alone.
                bad = "int8" not in way and (error > 1e-2 or (not given.random and agree < 0.98))
                missed |= bad
                note = "  <- over the limit" if bad else ""
                print(f"{path.name[-24:]:24} {way:22} {agree:7.4f} {error:9.2e} {rms:9.2e}{note}", flush=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
