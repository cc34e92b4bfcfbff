"""The peer on a CPU: llama.cpp, through llama-cpp-python (`pip install wicore[bench]`).

It gets the same weights, rounded to its Q8_0, the same threads, contexts and batches, and samples with
its own samplers at the same settings.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import numpy as np

from wicore.errors import EngineError
from wicore.gemma3.checkpoint import Checkpoint
from wicore.gemma3.gguf import LAYER_NAMES
from wicore.request import SamplingParams

_NAMES = {ours: theirs for theirs, ours in LAYER_NAMES.items()}


def write_q8_0(checkpoint: Checkpoint, path: Path) -> None:
    """Write the text model as a Q8_0 GGUF file that llama.cpp reads; without a usable tokenizer."""
    import gguf

    config = checkpoint.config
    writer = gguf.GGUFWriter(str(path), "gemma3")
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for name in config.tensor_shapes():
        weight = checkpoint.read(name)
        if "norm" in name:
            writer.add_tensor(_gguf_name(name), weight + 1)
        else:
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(weight, q8_0), raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, *rest, _ = name.split(".")
    return f"blk.{layer}.{_NAMES['.'.join(rest)]}.weight"


class LlamaCpp:
    """llama.cpp with the interface that `wicore.bench.engine` measures."""

    def __init__(
        self, checkpoint: Checkpoint, folder: Path, threads: int, sequences: int, context: int
    ) -> None:
        """Raises EngineError when llama-cpp-python is missing or refuses the model."""
        try:
            import llama_cpp
        except ImportError:
            raise EngineError("--peer llama.cpp: not installed; run `pip install 'wicore[bench]'`") from None
        self._api: Any = llama_cpp
        path = folder / f"{checkpoint.fingerprint[:16]}-q8_0.gguf"
        if not path.exists():
            partial = path.with_suffix(".partial")
            write_q8_0(checkpoint, partial)
            partial.rename(path)
        self.name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__}) Q8_0"
        self._vocab = checkpoint.config.vocab_size
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not model:
            raise EngineError(f"--peer llama.cpp: cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * context
        params.n_batch = max(2048, sequences)
        params.n_ubatch = 512
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def prefill(self, tokens: int) -> float:
        """Seconds from an empty cache to the first sampled token of one prompt."""
        self._clear()
        prompt = self._prompt(tokens)
        sampler = self._sampler(SamplingParams())
        start = time.perf_counter()
        self._decode([(t, p, 0, p == tokens - 1) for p, t in enumerate(prompt)])
        self._api.llama_sampler_sample(sampler, self._context, tokens - 1)
        taken = time.perf_counter() - start
        self._api.llama_sampler_free(sampler)
        return taken

    def decode(self, batch: int, context: int, steps: int, params: SamplingParams) -> list[float]:
        """Seconds of each step of `batch` sequences of `context` tokens, sampling included."""
        self._clear()
        samplers = [self._sampler(params) for _ in range(batch)]
        for sequence in range(batch):
            prompt = self._prompt(context)
            self._decode([(t, p, sequence, p == context - 1) for p, t in enumerate(prompt)])
        tokens = self._prompt(batch)
        times = []
        for step in range(steps):
            start = time.perf_counter()
            self._decode([(tokens[s], context + step, s, True) for s in range(batch)])
            tokens = [self._api.llama_sampler_sample(samplers[s], self._context, s) for s in range(batch)]
            times.append(time.perf_counter() - start)
        for sampler in samplers:
            self._api.llama_sampler_free(sampler)
        return times

    def _prompt(self, tokens: int) -> list[int]:
        drawn = np.random.default_rng(0).integers(1000, self._vocab - 1000, tokens)
        return [int(token) for token in drawn]

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        code = self._api.llama_decode(self._context, batch)
        if code:
            raise EngineError(f"llama.cpp: llama_decode returned {code}")

    def _sampler(self, params: SamplingParams) -> Any:
        api = self._api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if params.temperature == 0:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_greedy())
            return chain
        if params.top_k:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_top_k(params.top_k))
        if params.top_p < 1:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_top_p(params.top_p, 1))
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_temp(params.temperature))
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_dist(1))
        return chain
