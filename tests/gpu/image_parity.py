"""Logits of prompts with images against Hugging Face transformers in float32, on the same card.

    python tests/gpu/image_parity.py                       # the small text model of the tests
    python tests/gpu/image_parity.py --random gemma-3-1b   # random weights in a published shape

A made-up model with a small tower, whose images take 256 tokens, as published ones do. Their rows are those
that transformers computes, so that nothing but the text model is compared. Lines and limits are those of
parity.py, which says what is needed; `in images` is the error at their positions.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu.parity import FIXTURES, WAYS, ours
from wicore.engine.base import ImageRows
from wicore.gemma3.checkpoint import open_checkpoint
from wicore.gemma3.config import Gemma3Config, published
from wicore.gemma3.hf_config import config_to_hf

SIDE, TOKENS, STARTS, POSITIONS = 224, 256, (37, 420, 1100), 1500
"""Images lie within chunks of 700 and cross windows and blocks."""
LIMIT = 1e-2


@dataclass(frozen=True)
class Reference:
    ids: NDArray[np.int32]
    """With -1 in images."""
    images: list[ImageRows]
    logits: NDArray[np.float32]


def made_up(text: Gemma3Config, folder: Path) -> Reference:
    """Save a model of random half weights, and give what transformers makes of a prompt."""
    import torch
    from transformers import Gemma3Config as Config
    from transformers import Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    where = "cuda" if torch.cuda.is_available() else "cpu"
    fields: dict[str, Any] = config_to_hf(text, "float16")
    for name in ("architectures", "torch_dtype"):
        fields.pop(name, None)
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    soft = text.vocab_size - 1
    config = Config(
        text_config=fields,
        vision_config={**tower, "image_size": SIDE, "patch_size": 14, "vision_use_head": False},
        mm_tokens_per_image=TOKENS,
        boi_token_index=soft - 2,
        eoi_token_index=soft - 1,
        image_token_index=soft,
    )
    Gemma3ForConditionalGeneration(config).half().save_pretrained(folder)
    # Read again: what is no weight, as the frequencies of RoPE are, was made half too.
    model = Gemma3ForConditionalGeneration.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager"
    )
    model = model.to(where).eval()
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((len(STARTS), 3, SIDE, SIDE), np.float32).clip(-1, 1)
    ids = rng.integers(5, soft - 5, POSITIONS)
    for start in STARTS:
        ids[start : start + TOKENS] = soft
    with torch.no_grad():
        given = {"input_ids": torch.tensor(ids[None], device=where)}
        given["pixel_values"] = torch.tensor(pixels, device=where)
        given["token_type_ids"] = (given["input_ids"] == soft).long()
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        features = model.model.get_image_features(given["pixel_values"])
        rows = getattr(features, "pooler_output", features)
        logits = model(**given).logits[0].float().cpu().numpy()
    images = [
        ImageRows(start, values.float().cpu().numpy()) for start, values in zip(STARTS, rows, strict=True)
    ]
    tokens = np.where(ids == soft, -1, ids).astype(np.int32)
    return Reference(tokens, images, logits)


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--random", metavar="NAME")
    given = parser.parse_args()
    text = published(given.random) if given.random else open_checkpoint(FIXTURES / "tiny-image").config
    if text is None:
        parser.error(f"--random: {given.random} is no published model")
    text = replace(text, sliding_window=max(text.sliding_window, TOKENS), vision=None)
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        expected = made_up(text, Path(folder))
        checkpoint = open_checkpoint(folder)
        print(f"{'way':22} {'agree':>7} {'error':>9} {'in images':>9}")
        for way, options in WAYS.items():
            found = ours(checkpoint, expected.ids, images=expected.images, **options)
            steps = options.get("steps", 0)
            off, scale = np.abs(found - expected.logits).max(1), np.abs(expected.logits).max()
            agree = (found[-steps:].argmax(-1) == expected.logits[-steps:].argmax(-1)).mean()
            error, inside = off[-steps:].max() / scale, off[expected.ids < 0].max() / scale
            bad = "int8" not in way and error > LIMIT
            missed |= bad
            note = "  <- over the limit" if bad else ""
            print(f"{way:22} {agree:7.4f} {error:9.2e} {inside:9.2e}{note}", flush=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
