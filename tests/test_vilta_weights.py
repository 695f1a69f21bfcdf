"""ViLTA from weights that others trained: CLIP and RoBERTa as transformers saves them, METER's checkpoints."""

import json

import pytest
import torch

import data
import language
import vilta
import weights
from common import UserError

SAYS = ["a red circle and a blue square", "two dogs run across the green field"] * 3
TEXT = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, layer_norm_eps=1e-5,
            max_position_embeddings=30, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2)  # fmt: skip
VISION = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, patch_size=8,
              image_size=32)  # fmt: skip


def shaken(module):
    """Numbers that are none of those that anything starts from, norms and biases too."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return module.eval()


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Folders as save_pretrained leaves them, and the modules: clip (the full model), vision (its tower alone), roberta
    with word head and tokenizer, bare (the same encoder without a word head)."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, RobertaConfig, RobertaForMaskedLM
    from transformers import RobertaTokenizerFast as Fast

    folder = tmp_path_factory.mktemp("official")
    tok = language.Tokenizer.train(SAYS, 400, "roberta")
    model = json.loads(tok.backend.to_str())["model"]
    torch.manual_seed(0)
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    clip = shaken(CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=16)))
    vision = CLIPVisionModel(clip.config.vision_config).eval()
    vision.load_state_dict(clip.vision_model.state_dict() if "pre_layrnorm.weight" in vision.state_dict() else
                           {f"vision_model.{k}": x for k, x in clip.vision_model.state_dict().items()})  # fmt: skip
    roberta = shaken(RobertaForMaskedLM(RobertaConfig(vocab_size=tok.vocab_size, **TEXT)))
    for name, module in (("clip", clip), ("vision", vision), ("roberta", roberta), ("bare", roberta.roberta)):
        module.save_pretrained(folder / name)
    for name in ("roberta", "bare"):
        merges = [tuple(pair) for pair in model["merges"]]
        Fast(vocab=model["vocab"], merges=merges, add_prefix_space=False).save_pretrained(folder / name)
    tok.save(folder / "words")
    return folder, clip, roberta


def tiny(**changes):
    plain = dict(image_size=32, positions=30, max_len=20, width=32, heads=2, layers=1, mlp=48)
    return vilta.Config(**{**vilta.PRESETS["tiny"], **plain, **changes})


def built(official, clip="clip", roberta="roberta", corpus=None, **changes):
    return vilta.build(tiny(clip=str(official[0] / clip), roberta=str(official[0] / roberta), **changes), corpus)


def texts(model):
    return model.tokenized(["a red circle and a blue square", "two dogs"])


@pytest.mark.parametrize("clip", ["clip", "vision"])
@torch.no_grad()
def test_the_vision_encoder_is_clips_without_its_last_block(official, clip):
    model = built(official, clip).eval()
    cfg = model.cfg
    assert (cfg.vision_layers, cfg.vision_heads, cfg.vision_width, cfg.vision_mlp) == (2, 4, 32, 56)
    assert (cfg.patch, cfg.stem, cfg.start_steps) == (8, "patch", 0) and not hasattr(model, "word_head")
    pixels = torch.randint(256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (vilta.CLIP_MEAN, vilta.CLIP_STD))
    tower = official[1].vision_model
    states = tower(((pixels / 255) - mean) / std, output_hidden_states=True).hidden_states
    assert len(states) == 4  # what goes into the first block, and what leaves each of the three
    torch.testing.assert_close(model.vision(pixels), tower.post_layernorm(states[-2]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_language_encoder_its_word_head_and_the_teacher_are_robertas(official):
    model, roberta = built(official).eval(), official[2]
    cfg, rows = model.cfg, texts(model)
    ids, keep = rows["ids"], rows["keep_mask"]
    assert not keep.all(), "one of the texts is padded"
    assert (cfg.text_layers, cfg.text_heads, cfg.text_width, cfg.text_mlp, cfg.positions) == (2, 3, 24, 40, 30)
    assert cfg.vocab_size == roberta.config.vocab_size == model.tokenizer.vocab_size and model.tokenizer.mask == 4
    states = roberta.roberta(ids, attention_mask=keep.long()).last_hidden_state[keep]
    torch.testing.assert_close(model.text(ids, keep)[keep], states, atol=1e-5, rtol=1e-5)
    logits = roberta(ids, attention_mask=keep.long()).logits[keep]
    torch.testing.assert_close(model.lm_head(states, model.text.word.weight), logits, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(model.teacher(ids, keep, keep), logits, atol=1e-4, rtol=1e-5)
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_the_tokenizer_is_the_folders_or_the_one_that_was_asked_for(official):
    ids = built(official).tokenizer.encode("a red circle")
    assert ids == language.Tokenizer.load(official[0] / "words").encode("a red circle") and len(ids) == 3
    language.Tokenizer.train(SAYS, 300, "roberta").save(official[0] / "few")
    model = built(official, tokenizer=str(official[0] / "few"))
    assert model.tokenizer.vocab_size < model.cfg.vocab_size == len(model.text.word.weight), "RoBERTa's rows all stay"


def test_roberta_without_its_word_head_is_for_the_baseline(official):
    for arm in ("cd", "hn", "cd+hn"):
        with pytest.raises(UserError, match="teacher and writer need RoBERTa with its word head.*--arm baseline"):
            built(official, roberta="bare", arm=arm)
    model = built(official, roberta="bare", arm="baseline")
    assert not hasattr(model, "teacher") and not hasattr(model, "lm_head")
    whole = built(official, arm="baseline")
    assert all(torch.equal(x, whole.text.state_dict()[name]) for name, x in model.text.state_dict().items())
    assert built(official, roberta="bare", task="ve").text.word.weight.shape == model.text.word.weight.shape
    with pytest.raises(UserError, match="teacher and writer need RoBERTa"):  # CLIP alone has no words at all
        vilta.build(tiny(clip=str(official[0] / "clip"), tokenizer=str(official[0] / "words")), None)


def test_a_clip_that_is_not_openais_is_refused(official, tmp_path):
    from safetensors.torch import save_file

    config, state = weights.read_weights(str(official[0] / "vision"))
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(UserError, match="was trained with gelu: take a CLIP of OpenAI's"):
        built(official, clip=str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# METER's checkpoints: heads are 64 wide there, and so they are here

ANSWERS = ("yes", "no", "two", "red")
LEFT_OVER = {  # what a file of METER's holds beside: CLIP's text tower, RoBERTa's pooler
    "vit_model.positional_embedding": (77, 8), "vit_model.ln_final.weight": (8,), "vit_model.ln_final.bias": (8,),
    "text_transformer.pooler.dense.weight": (64, 64), "text_transformer.embeddings.position_ids": (1, 30),
}  # fmt: skip


def meter(task, **changes):
    """A model of METER's form with random numbers, and its tensors in METER's names, as the notes list them."""
    sizes = dict(stem="patch", patch=8, vision_width=64, vision_heads=1, vision_layers=2, vision_mlp=96, text_width=64,
                 text_heads=1, text_layers=2, text_mlp=80, width=128, heads=2, layers=2, mlp=112, start_steps=0,
                 arm="baseline", vocab_size=350, task=task)  # fmt: skip
    torch.manual_seed(len(task))
    model = shaken(vilta.ViLTA(tiny(**{**sizes, **changes}), None, ANSWERS if task == "vqa" else ()))
    state = {}
    for ours, theirs in vilta.official_names(model).items():
        theirs = [theirs] if isinstance(theirs, str) else theirs
        state |= dict(zip(theirs, model.state_dict()[ours].clone().chunk(len(theirs)), strict=True))
    for i in range(2):  # OpenAI's attention has the three in one
        for part in ("weight", "bias"):
            at = f"vit_model.visual.transformer.resblocks.{i}.attn."
            state[f"{at}in_proj_{part}"] = torch.cat([state.pop(f"{at}{x}_proj.{part}") for x in "qkv"])
    return model, state | {name: torch.zeros(shape) for name, shape in LEFT_OVER.items()}


def saved(folder, state):
    torch.save({"state_dict": state, "epoch": 3, "global_step": 100}, folder / "meter.ckpt")
    return str(folder / "meter.ckpt")


def from_file(official, path, task, corpus=None, **changes):
    words = str(official[0] / "words")
    return vilta.build(tiny(task=task, init=path, tokenizer=words, **{"arm": "baseline", **changes}), corpus)


def differing(model, other, but=()):
    ours, theirs = model.state_dict(), other.state_dict()
    return [name for name in {*ours, *theirs} if not name.startswith(but)
            and not (name in ours and name in theirs and torch.equal(ours[name], theirs[name]))]  # fmt: skip


@pytest.mark.parametrize("task", vilta.TASKS)
def test_meters_checkpoints_come_back_tensor_for_tensor(official, task, tmp_path):
    model, state = meter(task)
    names = {"pretrain": "mlm_score.transform.LayerNorm.bias", "retrieval": "rank_output.weight",
             "vqa": "vqa_classifier.3.weight", "nlvr2": "nlvr2_classifier.3.bias",
             "ve": "snli_classifier.1.weight"}  # fmt: skip
    assert names[task] in state and "cross_modal_image_layers.1.crossattention.self.key.bias" in state
    (tmp_path / "answers.json").write_text(json.dumps(ANSWERS))
    mine = from_file(official, saved(tmp_path, state), task)
    assert differing(model, mine) == []
    cfg = mine.cfg
    assert (cfg.vision_heads, cfg.text_heads, cfg.heads) == (1, 1, 2) and (cfg.layers, cfg.mlp) == (2, 112)
    assert (cfg.vision_layers, cfg.text_layers, cfg.stem, cfg.start_steps) == (2, 2, "patch", 0)
    assert (cfg.vision_mlp, cfg.text_mlp, cfg.vocab_size, cfg.positions) == (96, 80, 350, 30)
    assert mine.answers == (ANSWERS if task == "vqa" else ())
    keep = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    batch = {"ids": torch.tensor([[0, 300, 301, 302, 2], [0, 303, 2, 1, 1]]), "keep_mask": keep,
             "pixels": torch.zeros((2, 2, 3, 32, 32) if task == "nlvr2" else (2, 3, 32, 32), dtype=torch.uint8)}
    if task != "retrieval":
        assert torch.equal(model.eval().judge(batch), mine.eval().judge(batch))


def test_a_vqa_checkpoint_needs_the_list_of_its_answers(official, tmp_path):
    path = saved(tmp_path, meter("vqa")[1])
    with pytest.raises(UserError, match="which answer is which in .*meter.ckpt"):
        from_file(official, path, "vqa")


def test_pre_trained_for_a_task(official, tmp_path):
    """Of a pre-training file what the task can use: of NLVR2 the second picture starts with the type of the first, and
    the ranking head is the row of ITM's that says match. Heads of answers are new."""
    model, state = meter("pretrain")
    path = saved(tmp_path, state)
    heads = ("mlm_head.", "itm_head.", "answer_head.", "rank_head.", "types.")
    for task in ("vqa", "ve", "nlvr2", "retrieval"):
        corpus = data.Corpus("x", {}, answers=("a", "b"))
        mine = from_file(official, path, task, corpus)
        assert differing(model, mine, but=heads) == []
        assert any("METER: has" in note for note in corpus.notes)
        types = [0, 1, 1] if task == "nlvr2" else [0, 1]
        assert torch.equal(mine.types.weight, model.types.weight[types])
        if task == "vqa":
            assert mine.answers == ("a", "b") and mine.answer_head[3].out_features == 2
        if task == "retrieval":
            assert torch.equal(mine.itm_head.weight, model.itm_head.weight)
            assert torch.equal(mine.rank_head.weight, model.itm_head.weight[1:])
            assert torch.equal(mine.rank_head.bias, model.itm_head.bias[1:])
    three, state = meter("nlvr2")  # and the way back: a third row is left out
    assert torch.equal(from_file(official, saved(tmp_path, state), "ve").types.weight, three.types.weight[:2])


def test_pictures_of_another_size(official, tmp_path):
    model, state = meter("ve")
    mine = from_file(official, saved(tmp_path, state), "ve", image_size=48)
    assert differing(model, mine) == ["vision.positional_embedding"]
    table = weights.resize_positions(model.vision.positional_embedding, 6)
    assert torch.equal(mine.vision.positional_embedding, table) and len(table) == 37


def test_meter_with_robertas_word_head(official, tmp_path):
    """The encoder is METER's, teacher and writer's head are RoBERTa's; of one form, or it is an error."""
    roberta, sizes = official[2], dict(text_width=24, text_heads=3, text_mlp=40)
    model, state = meter("pretrain", vocab_size=roberta.config.vocab_size, **sizes)
    state["text_transformer.pooler.dense.weight"] = torch.zeros(24, 24)
    path = saved(tmp_path, state)
    mine = from_file(official, path, "pretrain", arm="cd+hn", roberta=str(official[0] / "roberta")).eval()
    assert differing(model, mine, but=("teacher.", "lm_head.")) == [] and mine.cfg.text_heads == 3
    rows = texts(mine)
    keep = rows["keep_mask"]
    with torch.no_grad():
        logits = roberta(rows["ids"], attention_mask=keep.long()).logits[keep]
        torch.testing.assert_close(mine.teacher(rows["ids"], keep, keep), logits, atol=1e-4, rtol=1e-5)
    with pytest.raises(UserError, match="teacher and writer need RoBERTa"):
        from_file(official, path, "pretrain", arm="cd")


@pytest.mark.parametrize("task", ["pretrain", "vqa"])
def test_files_that_are_not_whole_or_not_meters_are_named(official, task, tmp_path):
    state = meter(task)[1]
    (tmp_path / "answers.json").write_text(json.dumps(ANSWERS))
    head = {"pretrain": "mlm_score.decoder.weight", "vqa": "vqa_classifier.1.bias"}[task]
    for key in (head, "text_transformer.encoder.layer.1.output.dense.bias",
                "vit_model.visual.transformer.resblocks.0.attn.in_proj_bias"):  # fmt: skip
        lacking = {name: x for name, x in state.items() if name != key}
        told = key.replace("in_proj_bias", "q_proj.bias")
        with pytest.raises(UserError, match=f"missing in the file: {told}"):
            from_file(official, saved(tmp_path, lacking), task)
    with pytest.raises(UserError, match="unknown in the file: mystery.weight"):
        from_file(official, saved(tmp_path, {**state, "mystery.weight": torch.zeros(1)}), task)
    with pytest.raises(UserError, match="no checkpoint of METER's: it begins with a.weight"):
        from_file(official, saved(tmp_path, {"a.weight": torch.zeros(1)}), task)
    swin = {**state, "vit_model.layers.0.blocks.0.norm1.weight": torch.zeros(8)}
    with pytest.raises(UserError, match="Swin Transformer is not read here: take a CLIP16"):
        from_file(official, saved(tmp_path, swin), task)
