"""What must hold for VC-GPT beyond its reference tensors: wiring, information flow, gradients, decoding, loading."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import vcgpt
import weights
from common import UserError

V = 37


def tiny(variant="vcgpt", **changes):
    settings = dict(
        variant=variant, fusion_layers=2, image_size=32, patch=8, vision_width=24, vision_layers=1, vision_heads=2,
        width=32, layers=2, heads=4, positions=20, vocab_size=V, dropout=0.0, init_std=0.2, max_len=15,
    )  # fmt: skip
    return vcgpt.Config(**{**settings, **changes})


def network(variant="vcgpt", seed=0, **changes):
    torch.manual_seed(seed)
    return vcgpt.VCGPT(tiny(variant, **changes)).eval()


def inputs(B=2, k=3, T=7, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (B, 3, 32, 32), generator=g).to(torch.uint8), torch.randint(
        0, V, (B * k, T), generator=g
    )


@torch.no_grad()
def test_without_fusion_head_the_logits_are_gpt2s():
    model, (pixels, ids) = network(), inputs()
    with_picture = model(pixels, ids)
    model.w_fuse.weight.zero_()
    alone = F.linear(model.gpt2(ids), model.gpt2.wte.weight)
    assert torch.equal(model(pixels, ids), alone)
    assert torch.equal(model(255 - pixels, ids), alone)
    assert (with_picture - alone).abs().max() > 0.1


@torch.no_grad()
def test_self_ensemble_is_a_plain_sum():
    pixels, ids = inputs()
    full, without = network("vcgpt"), network("vcgpt_wo_se")
    without.load_state_dict(full.state_dict())
    single_modal = F.linear(full.gpt2(ids), full.gpt2.wte.weight)
    torch.testing.assert_close(without(pixels, ids), full(pixels, ids) - single_modal, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["vcgpt", "vcgpt_wo_se", "vanilla"])
@torch.no_grad()
def test_no_later_token_and_no_other_picture_leaks(variant):
    model, (pixels, ids) = network(variant), inputs()
    before = model(pixels, ids)
    for t in range(1, ids.size(1)):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 1) % V
        after = model(pixels, changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-5, rtol=0)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3
    other = pixels.clone()
    other[1] = 255 - other[1]
    after = model(other, ids)
    assert torch.equal(after[:3], before[:3]), "rows of the first picture depend on the second"
    assert ((after[3:] - before[3:]).abs().amax(dim=(1, 2)) > 1e-3).all(), "every caption row must see its picture"


@torch.no_grad()
def test_readings_a_and_b_of_the_figure():
    (pixels, ids), a, b = inputs(), network(memory="A"), network(memory="B")
    b.load_state_dict(a.state_dict())
    assert (a(pixels, ids) - b(pixels, ids)).abs().max() > 1e-3
    for model, wanted in ((a, [0, 1]), (b, [1, 1])):
        outputs = []
        hooks = [
            block.register_forward_hook(lambda _, __, out, kept=outputs: kept.append(out)) for block in model.visual
        ]
        kvs = model.encode_image(pixels)
        for hook in hooks:
            hook.remove()
        for block, kv, layer in zip(model.text, kvs, wanted, strict=True):
            assert torch.equal(kv, block.keys_values(outputs[layer]))


@pytest.mark.parametrize("variant", ["vcgpt", "vcgpt_wo_se", "vanilla"])
@pytest.mark.parametrize("changes", [{}, {"memory": "B"}, {"stem": "conv"}, {"clip_post_norm": True}])
def test_every_trainable_parameter_gets_a_gradient_and_one_optimizer_group(variant, changes):
    model, (pixels, ids) = network(variant, **changes), inputs()
    model(pixels, ids).square().sum().backward()
    lost = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert all(".attn.qkv.bias" in name for name in lost), lost
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    post_norm = {"clip.post_norm.weight", "clip.post_norm.bias"}
    assert frozen == (set() if changes.get("clip_post_norm") else post_norm)
    optimizer = vcgpt.make_optimizer(model.cfg, model)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_two_rates_and_no_decay_on_norms_biases_embeddings():
    model = network("vanilla", clip="here", gpt2="here", lr=1e-4, lr_backbone=2e-5, weight_decay=0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: g for g in vcgpt.make_optimizer(model.cfg, model).param_groups for p in g["params"]}
    rate, decay = {n: g["peak"] for n, g in found.items()}, {n: g["weight_decay"] for n, g in found.items()}
    assert rate["clip.patches.weight"] == rate["gpt2.blocks.0.attn.qkv.weight"] == 2e-5
    assert (
        rate["gpt2.blocks.0.cross.q.weight"] == rate["gpt2.blocks.0.norm_cross.bias"] == rate["project.weight"] == 1e-4
    )
    assert decay["gpt2.blocks.0.mlp.up.weight"] == decay["clip.patches.weight"] == 0.01
    no_decay = "gpt2.wte.weight gpt2.wpe.weight clip.positions gpt2.ln_f.weight clip.blocks.0.mlp.up.bias".split()
    assert not any(decay[name] for name in no_decay)


def test_loss_by_hand():
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.5, 3.0]])
    targets = torch.tensor([1, 0])
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    plain = -(np.log(p[0, 1]) + np.log(p[1, 0])) / 2
    assert vcgpt.loss_lm(logits, targets).item() == pytest.approx(plain, abs=1e-6)
    uniform = -np.log(p).mean()  # label smoothing 0.1: 0.9 on the target and 0.1 spread evenly over all words
    assert vcgpt.loss_lm(logits, targets, 0.1).item() == pytest.approx(0.9 * plain + 0.1 * uniform, abs=1e-6)


@torch.no_grad()
def test_training_logits_are_those_of_the_real_targets():
    model, (pixels, ids) = network(), inputs()
    targets = torch.full_like(ids, -100)
    targets[0, :3], targets[4, :6] = 5, 6
    torch.testing.assert_close(model(pixels, ids, targets), model(pixels, ids)[targets != -100])


def test_micro_batches_give_the_gradient_of_the_whole():
    pixels, ids = inputs(B=4, k=2)
    targets = ids.roll(-1, 1)
    targets[::3, 2:] = -100  # rows of different length: a mean of means would be wrong
    batch = {"pixels": pixels, "ids": ids, "targets": targets}
    grads = []
    for micro in (0, 2, 5):
        model = network(captions_per_image=2, micro_batch=micro)
        total, pieces = (targets != -100).sum(), 0
        for p, i, t in vcgpt.micro_batches(batch, model.cfg):
            real = t[t != -100]
            (vcgpt.loss_lm(model(p, i, t), real) * len(real) / total).backward()
            pieces += 1
        assert pieces == {0: 1, 2: 4, 5: 2}[micro]
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(grads[0], grads[2], atol=1e-5, rtol=1e-4)


class Letters:
    """A tokenizer of single letters: enough to read captions back."""

    bos = eos = pad = 0

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids[: ids.index(0) if 0 in ids else None])


@pytest.mark.parametrize("variant", ["vcgpt", "vanilla"])
def test_overfits_eight_pictures_and_reads_their_captions_back(variant):
    g = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), generator=g).to(torch.uint8)
    words = torch.randint(1, 27, (8, 5), generator=g)
    ids = F.pad(words, (1, 0))
    targets = F.pad(words, (0, 1))
    model = network(variant, init_std=0.1, max_new=8)
    model.tokenizer = Letters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = vcgpt.loss_lm(model(pixels, ids, targets), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05
    with torch.no_grad():
        other = vcgpt.loss_lm(model(pixels.roll(1, 0), ids, targets), targets.flatten())
    assert other > 1.0, "the captions are known by heart without the pictures"
    wanted = [Letters().decode(row) for row in words.tolist()]
    assert vcgpt.generate(model, pixels, beam=1) == wanted
    assert vcgpt.generate(model, pixels, beam=3) == wanted


@pytest.mark.parametrize("variant", ["vcgpt", "vcgpt_wo_se", "vanilla"])
@torch.no_grad()
def test_cached_decoding_is_uncached_decoding(variant):
    import decoding

    model, (pixels, _) = network(variant, init_std=0.4), inputs(B=3)
    found = []
    for cached in (True, False):
        decoder = vcgpt.Decoder(model, pixels, cached)
        greedy, logp = decoding.greedy(decoder, 3, 0, 1, 10, pixels.device)
        decoder = vcgpt.Decoder(model, pixels, cached)
        beam, score = decoding.beam_search(decoder, 3, 4, 0, 1, 10, 1.0, pixels.device)
        decoder = vcgpt.Decoder(model, pixels, cached)
        beam1, _ = decoding.beam_search(decoder, 3, 1, 0, 1, 10, 1.0, pixels.device)
        assert torch.equal(beam1, greedy)
        found.append((greedy, logp, beam, score))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][2], found[1][2])
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0][3], found[1][3], atol=1e-4, rtol=1e-4)
    assert len({tuple(row) for row in found[0][0].tolist()}) > 1, "all pictures alike: the test would prove little"


@torch.no_grad()
def test_larger_pictures_get_interpolated_positions():
    positions = torch.randn(17, 24)
    table = weights.resize_positions(positions, 6)
    assert table.shape == (37, 24) and torch.equal(table[0], positions[0])
    assert weights.resize_positions(positions, 4) is positions
    positions[1:] = 3.0
    torch.testing.assert_close(weights.resize_positions(positions, 6)[1:], torch.full((36, 24), 3.0))


# ---------------------------------------------------------------------------------------------------------------------
# Official weights


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Directories as transformers writes them: a small CLIP, a small GPT-2 with its tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("official")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["a red circle"], trainers.BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, unk_token=end).save_pretrained(
        folder / "gpt2"
    )
    torch.manual_seed(0)
    config = CLIPConfig(
        vision_config=dict(hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                           patch_size=8, image_size=32, projection_dim=16),
        text_config=dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                         vocab_size=50, projection_dim=16), projection_dim=16,
    )  # fmt: skip
    clip = CLIPModel(config).eval()
    gpt2 = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=bpe.get_vocab_size(), n_positions=30)
    ).eval()
    for module in (clip, gpt2):
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.2)
    clip.save_pretrained(folder / "clip")
    gpt2.save_pretrained(folder / "gpt2")
    return folder, clip, gpt2


def built(official, variant="vcgpt", **changes):
    cfg = tiny(variant, clip=str(official[0] / "clip"), gpt2=str(official[0] / "gpt2"), **changes)
    return vcgpt.build(cfg, None)


@torch.no_grad()
def test_official_weights_meet_pictures_of_another_size(official):
    """--image-size 48 with a checkpoint for 32: the table is resized once, at loading."""
    small, large = built(official), built(official, image_size=48)
    assert len(large.clip.positions) == 37 and large.cfg.image_size == 48
    assert built(official, image_size=0).cfg.image_size == 32, "0: the checkpoint's own"
    torch.testing.assert_close(large.clip.positions, weights.resize_positions(small.clip.positions, 6))


@pytest.mark.parametrize("variant", ["vcgpt", "vcgpt_wo_se", "vanilla"])
@torch.no_grad()
def test_build_from_transformers_directories(official, variant):
    _, clip, gpt2 = official
    model, (pixels, ids) = built(official, variant).eval(), inputs()
    normalised = (pixels.float() / 255 - torch.tensor(vcgpt.CLIP_MEAN).view(3, 1, 1)) / torch.tensor(
        vcgpt.CLIP_STD
    ).view(3, 1, 1)
    theirs = clip.vision_model(normalised).last_hidden_state
    torch.testing.assert_close(model.clip((pixels - model.mean) / model.std), theirs, atol=1e-4, rtol=1e-4)
    logits = F.linear(model.gpt2(ids), model.gpt2.wte.weight)
    torch.testing.assert_close(logits, gpt2(ids).logits, atol=1e-4, rtol=1e-4)
    assert model.cfg.layers == 2 and model.cfg.vision_layers == 2 and model.cfg.vocab_size == gpt2.config.vocab_size
    assert model.tokenizer.bos == model.tokenizer.eos == model.tokenizer.pad


def test_old_and_new_spellings_load_alike(official):
    _, clip, gpt2 = official
    full = dict(clip.state_dict())
    vision = {k.removeprefix("vision_model."): v for k, v in full.items() if k.startswith("vision_model.")}
    with_buffer = {**full, "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    towers = []
    for state in (full, vision, {"vision_model." + k: v for k, v in vision.items()}, with_buffer):
        model = network(vision_layers=2)
        vcgpt.load_clip(model.clip, state)
        towers.append(torch.cat([p.flatten() for p in model.clip.parameters()]))
    assert all(torch.equal(towers[0], tower) for tower in towers[1:])

    bare = {k.removeprefix("transformer."): v for k, v in gpt2.state_dict().items() if k != "lm_head.weight"}
    old = {
        **bare,
        **{f"h.{i}.attn.bias": torch.ones(1, 1, 30, 30) for i in range(2)},
        "h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    loaded = []
    for state in (dict(gpt2.state_dict()), bare, old):
        model = network(vocab_size=gpt2.config.vocab_size, positions=30)
        vcgpt.load_gpt2(model.gpt2, state)
        loaded.append(torch.cat([p.flatten() for p in model.gpt2.parameters()]))
    assert all(torch.equal(loaded[0], other) for other in loaded[1:])


def test_weights_that_do_not_fit_say_so(official):
    folder, clip, gpt2 = official
    state = dict(clip.state_dict())
    with pytest.raises(UserError, match="unknown in the file: encoder.layers.1"):
        vcgpt.load_clip(network(vision_layers=1).clip, state)
    with pytest.raises(UserError, match="missing in the file: encoder.layers.2"):
        vcgpt.load_clip(network(vision_layers=3).clip, state)
    with pytest.raises(UserError, match="unknown in the file: mystery"):
        vcgpt.load_clip(network(vision_layers=2).clip, {**state, "mystery": torch.zeros(1)})
    with pytest.raises(UserError, match="sizes.*class_embedding: \\(24,\\) in the file, \\(32,\\) here"):
        vcgpt.load_clip(network(vision_layers=2, vision_width=32).clip, state)
    with pytest.raises(UserError, match="not GPT-2"):
        vcgpt.load_gpt2(network().gpt2, state)
    with pytest.raises(UserError, match="no config.json"):
        vcgpt.build(tiny(clip=str(folder)), None)


def test_hub_out_of_reach_says_what_to_do(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match="Give a local directory"):
        vcgpt.build(tiny(clip="openai/clip-vit-base-patch16"), None)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_with_code_is_refused(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 24}))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="nothing in it was run"):
        vcgpt.build(tiny(clip=str(tmp_path)), None)
    assert not (tmp_path / "pwned").exists()


def test_exact_sizes_of_the_base_model():
    """Parameter counts of the paper's parts at ViT-B/16 + GPT-2 small, N = 6 (arithmetic of the published sizes)."""
    with torch.device("meta"):
        model = vcgpt.VCGPT(vcgpt.Config())
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count["clip"] == 85_799_424 and count["gpt2"] == 124_439_808 and count["w_fuse"] == 38_597_376
    assert count["text"] == 6 * 9_453_312 and count["visual"] == 6 * 7_087_872
    with torch.device("meta"):
        vanilla = vcgpt.VCGPT(vcgpt.Config(variant="vanilla"))
    assert sum(p.numel() for p in vanilla.gpt2.parameters()) - 124_439_808 == 12 * (2_362_368 + 1_536)


def test_normalisation_is_clips():
    model = network()
    grey = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    seen = []
    hook = model.clip.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.encode_image(grey)
    hook.remove()
    assert seen[0][0, :, 0, 0].tolist() == pytest.approx(
        [(1 - m) / s for m, s in zip(vcgpt.CLIP_MEAN, vcgpt.CLIP_STD, strict=True)]
    )


def test_data_of_a_step_fits_the_model():
    """ids start with bos, targets end with eos: the first word is predicted from bos, the end from the last word."""
    batch = data.pad_captions([[5, 6], [7]], 0, 0, 0)
    assert batch["ids"].tolist() == [[0, 5, 6], [0, 7, 0]] and batch["targets"].tolist() == [[5, 6, 0], [7, 0, -100]]
