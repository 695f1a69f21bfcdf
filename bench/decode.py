"""How fast is beam search over VC-GPT? With the cache beside without, and beside transformers' `generate`.

    python bench/decode.py                      sizes of --preset base, then tiny: 4 pictures, beam 5, 20 tokens
    python bench/decode.py --sizes tiny         a few seconds

Every caption has full length on both sides: there is no end token. Random weights and pictures, float32, CPU. Before
anything is timed, greedy captions must be equal, and those of the beam of equal score. Medians of alternating runs:

cache     `decoding.beam_search` over `vcgpt.Decoder`, pictures encoded beforehand. Goal: 3 times as fast with it.
generate  The variant `vanilla` beside GPT2LMHeadModel(add_cross_attention=True).generate(num_beams=5), same weights,
          keys and values of the pictures made inside both. Goal: no slower. The vision tower has no blocks here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from timing import compare, describe_machine

import decoding
import vcgpt

NO_END = -1  # an end token that no vocabulary has


def network(size: str, variant: str):
    torch.manual_seed(0)
    sizes = {**vcgpt.PRESETS[size], "clip": "none", "gpt2": "none", "dropout": 0.0, "vision_layers": 0}
    return vcgpt.VCGPT(vcgpt.Config(**sizes, variant=variant)).eval()


def beam_search(model, decoder, beam: int, max_new: int):
    B = decoder.kvs[0].size(1)
    return decoding.beam_search(decoder, B, beam, 0, NO_END, max_new, model.cfg.length_penalty)


def bench_cache(size: str, variant: str, pixels, beam: int, max_new: int, repeats: int) -> None:
    model = network(size, variant)
    decoders = {cached: vcgpt.Decoder(model, pixels, cached) for cached in (True, False)}

    def run(cached):
        if cached:
            decoders[cached].caches = [{} for _ in decoders[cached].caches]
        return beam_search(model, decoders[cached], beam, max_new)

    (with_ids, with_scores), (ids, scores) = run(True), run(False)
    torch.testing.assert_close(with_scores, scores, atol=1e-4, rtol=1e-4)
    same = (with_ids == ids).all(1).sum()
    print(f"{size}, {variant}: {same} of {len(ids)} captions of beam {beam} equal, all of equal score")
    compare(f"  beam {beam}", {"cached": lambda: run(True), "without": lambda: run(False)}, repeats)


def transformers_twin(model):
    """GPT2LMHeadModel with cross-attention, and its weights in our model."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    cfg = model.cfg
    torch.manual_seed(1)
    twin = GPT2LMHeadModel(GPT2Config(
        vocab_size=cfg.vocab_size, n_positions=cfg.positions, n_embd=cfg.width, n_layer=cfg.layers, n_head=cfg.heads,
        n_inner=cfg.mlp or None, add_cross_attention=True, initializer_range=cfg.init_std,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )).eval()  # fmt: skip
    vcgpt.load_gpt2(model.gpt2, twin.state_dict())
    return twin


def bench_generate(size: str, pixels, beam: int, max_new: int, repeats: int) -> None:
    model = network(size, "vanilla")
    twin = transformers_twin(model)
    memory = model.project(model.clip((pixels.float() - model.mean) / model.std))
    start = torch.zeros(len(pixels), 1, dtype=torch.long)

    def ours(beam=beam):
        return beam_search(model, vcgpt.Decoder(model, pixels), beam, max_new)[0]

    def theirs(beam=beam):
        return twin.generate(
            start, attention_mask=torch.ones_like(start), encoder_hidden_states=memory, num_beams=beam, do_sample=False,
            max_new_tokens=max_new, length_penalty=model.cfg.length_penalty, use_cache=True,
        )[:, 1:]  # fmt: skip

    def log_p(ids):
        """[B] summed log p of whole captions, by our model."""
        log_p = model(pixels, torch.cat([start, ids[:, :-1]], dim=1)).log_softmax(-1)
        return log_p.gather(2, ids[:, :, None]).sum(dim=(1, 2))

    assert torch.equal(ours(1), theirs(1)), "greedy captions differ"
    same = (ours() == theirs()).all(1).sum()
    torch.testing.assert_close(log_p(ours()), log_p(theirs()), atol=1e-3, rtol=0)
    print(f"{size}, vanilla: greedy captions equal; {same} of {len(pixels)} of beam {beam}, all of equal score")
    compare(f"  beam {beam}", {"ours": ours, "transformers": theirs}, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["base", "tiny"], help="presets of vcgpt.py")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--max-new", type=int, default=20, help="tokens per caption")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each, 5 or more")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{describe_machine()}; {options.images} pictures, {options.max_new} tokens; "
          f"medians of {max(5, options.repeats)}")  # fmt: skip
    settings = (options.beam, options.max_new, options.repeats)
    for size in options.sizes:
        side = vcgpt.Config(**vcgpt.PRESETS[size]).image_size
        generator = torch.Generator().manual_seed(2)
        pixels = torch.randint(0, 256, (options.images, 3, side, side), generator=generator).to(torch.uint8)
        with torch.inference_mode():
            bench_cache(size, "vcgpt", pixels, *settings)
            bench_generate(size, pixels, *settings)


if __name__ == "__main__":
    main()
