"""Weights that others trained: every key is used or excused, or nothing is changed."""

import json

import pytest
import torch
from torch import nn

import corpora
import data
import language
import weights
from common import UserError


class Net(nn.Module):
    def __init__(self, outs=2):
        super().__init__()
        self.trunk, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, outs)


NAMES = {"trunk.weight": ["q.weight", "k.weight"], "trunk.bias": ["q.bias", "k.bias"],
         **{f"norm.{name}": f"bn.{name}" for name in Net().norm.state_dict()},
         "head.weight": ["out.weight"], "head.bias": "out.bias"}  # fmt: skip


def theirs(**changed):
    torch.manual_seed(1)
    state = {"q.weight": torch.randn(1, 3), "k.weight": torch.randn(3, 3), "q.bias": torch.randn(1),
             "k.bias": torch.randn(3), "bn.weight": torch.randn(4), "bn.bias": torch.randn(4),
             "bn.running_mean": torch.randn(4), "bn.running_var": torch.rand(4),
             "bn.num_batches_tracked": torch.tensor(7), "out.weight": torch.randn(2, 4), "out.bias": torch.randn(2)}
    state |= {name.replace("__", "."): value for name, value in changed.items()}
    return {name: value for name, value in state.items() if value is not None}


def test_names_of_all_layers():
    table = [("a.{}.", "x.{}.y.", {"kv": ("k", "v"), "out": "o"}), ("b.", "z", {"": "", "norm": "_norm"})]
    assert weights.module_names(table, lambda ours: 2) == {
        "a.0.kv": ["x.0.y.k", "x.0.y.v"], "a.0.out": ["x.0.y.o"], "a.1.kv": ["x.1.y.k", "x.1.y.v"],
        "a.1.out": ["x.1.y.o"], "b.": ["z"], "b.norm": ["z_norm"]}  # fmt: skip
    asked = []
    weights.module_names(table, lambda ours: asked.append(ours) or 0)
    assert asked == ["a.{}."]
    assert weights.tensor_names(Net(), {"trunk": ["q", "k"], "elsewhere": ["e"]}) == {
        "trunk.weight": ["q.weight", "k.weight"], "trunk.bias": ["q.bias", "k.bias"]}  # fmt: skip


def test_tensors_are_put_together_and_numbers_kept():
    """In the order of the list; a number without dimensions, like BatchNorm's counter, too."""
    net, state = Net(), theirs()
    weights.load_renamed(net, state, {**NAMES, "norm.num_batches_tracked": ["bn.num_batches_tracked"]}, (), "ours")
    assert torch.equal(net.trunk.weight, torch.cat([state["q.weight"], state["k.weight"]]))
    assert torch.equal(net.trunk.bias, torch.cat([state["q.bias"], state["k.bias"]]))
    assert net.norm.num_batches_tracked == 7 and torch.equal(net.norm.running_var, state["bn.running_var"])
    assert torch.equal(net.head.weight, state["out.weight"]) and torch.equal(net.head.bias, state["out.bias"])


@pytest.mark.parametrize(("changed", "told"), [
    (dict(q__bias=None), r"missing in the file: q.bias \(1 in all\)"),
    (dict(extra__bias=torch.zeros(1)), r"unknown in the file: extra.bias \(1 in all\)"),
    (dict(q__bias=torch.zeros(2)), r"trunk.bias: \(5,\) in the file, \(4,\) here \(1 in all\)"),
])  # fmt: skip
def test_what_does_not_fit_changes_nothing(changed, told):
    for load in (lambda net, state: weights.load_renamed(net, state, NAMES, ("spare.",), "ours"),
                 lambda net, state: weights.load_parts(net, state, NAMES, ("spare.",), "ours")):  # fmt: skip
        net = Net()
        before = {name: x.clone() for name, x in net.state_dict().items()}
        with pytest.raises(UserError, match=told):
            load(net, theirs(**changed))
        assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
        load(net, theirs(spare__bias=torch.zeros(1)))


def test_ours_that_nobody_fills():
    names = {name: of for name, of in NAMES.items() if not name.startswith("head")}
    state = {name: x for name, x in theirs().items() if not name.startswith("out")}
    with pytest.raises(UserError, match="not filled here: head.weight, head.bias"):
        weights.load_renamed(Net(), state, names, (), "ours")
    weights.load_renamed(Net(), state, names, (), "ours", may_lack=("head.",))


def test_parts_that_are_there_are_filled_whole_and_the_rest_stays():
    net = Net()
    before = net.head.weight.clone()
    state = {name: x for name, x in theirs(other__weight=torch.zeros(1)).items() if not name.startswith("out")}
    told = weights.load_parts(net, state, NAMES, ("other.",), "a file")
    assert told == "a file: has norm, trunk; new here head; not used other"
    assert torch.equal(net.head.weight, before) and torch.equal(net.trunk.bias[1:], state["k.bias"])
    with pytest.raises(UserError, match="missing in the file: out.bias"):
        weights.load_parts(Net(), theirs(out__bias=None), NAMES, (), "a file")
    with pytest.raises(UserError, match="a file has nothing for this model; its first keys are z"):
        weights.load_parts(Net(), {"z": torch.zeros(1)}, NAMES, ("z",), "a file")
    assert weights.load_parts(Net(), theirs(), NAMES, (), "a file") == "a file: has head, norm, trunk"


def test_reading_folders_of_transformers(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="has no config.json"):
        weights.read_weights(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(UserError, match="neither model.safetensors nor pytorch_model.bin"):
        weights.read_weights(str(tmp_path))
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert weights.read_weights(str(tmp_path))[1]["a"] == 0
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    config, state = weights.read_weights(str(tmp_path))
    assert config == {"hidden_size": 3} and state["a"] == 1, "safetensors first"


class Cfg:
    tokenizer, vocab_size, world = "none", 400, "tiny"


def test_which_tokenizer(tmp_path):
    """A run's own before that of --tokenizer, that before the official one's; else one trained here. The size of the
    embedding is the tokenizer's, unless weights fix it."""
    for name, word in (("run", "circle"), ("given", "square"), ("official", "cross")):
        language.Tokenizer.train([word] * 3, 60, "wordpiece").save(tmp_path / name)
    corpus = data.Corpus("x", {"train": [data.Item(1, "a.jpg", ("a hexagon",))] * 3})

    def chosen(checkpoint=None, given="none", official="none", is_fixed=False, size=400):
        cfg = Cfg()
        cfg.tokenizer, cfg.vocab_size = str(given), size
        return weights.choose_tokenizer(cfg, str(official), checkpoint, corpus, "wordpiece", is_fixed), cfg

    run, given, official = (tmp_path / name for name in ("run", "given", "official"))
    for found, word in ((chosen(run, given, official), "circle"), (chosen(None, given, official), "square"),
                        (chosen(None, "none", official), "cross"), (chosen(), "hexagon")):  # fmt: skip
        assert len(found[0].encode(word)) == 1 and found[0].mask is not None
    assert chosen(None, given)[1].vocab_size == chosen(None, given)[0].vocab_size < 60
    assert chosen(None, given, is_fixed=True)[1].vocab_size == chosen(run)[1].vocab_size == 400
    for more in (dict(checkpoint=run), dict(given=given, is_fixed=True)):
        with pytest.raises(UserError, match="entries, the word embedding 5"):
            chosen(**more, size=5)


def test_what_a_tokenizer_is_trained_on(tmp_path):
    """Texts of training alone, cleaned; of scenes those of every task, so that a fine-tuned model knows its words."""
    items = [data.Item(i, "a.jpg", (f"Caption {i}.", "More")) for i in range(3)]
    corpus = data.Corpus("x", {"train": items, "val": [data.Item(9, "a.jpg", ("secret",))]})
    assert list(corpora.texts(corpus)) == ["caption 0", "more", "caption 1", "more", "caption 2", "more"]
    assert list(corpora.texts(corpus, most=1)) == ["caption 0", "more"]
    asked = data.Corpus("x", {"train": [data.Example("q", (1,), ("a.jpg",), "How MANY?")]})
    assert list(corpora.texts(asked)) == ["how many?"]
    small = corpora.load("scenes", n_train=30, n_val=1, n_test=1)
    said = list(corpora.texts(small, "tiny"))
    assert any("?" in text or text.startswith(("what", "how", "is ")) for text in said), "questions"
    assert any("object" in text for text in said), "choices"
    assert set(map(language.clean_caption, small.splits["train"][0].captions)) <= set(said)


def test_answers_of_a_run_of_official_weights_and_of_a_corpus(tmp_path):
    corpus, file = data.Corpus("vqa", {}, answers=("yes", "no")), str(tmp_path / "vqa.pth")
    assert weights.known_answers(corpus, None, "none", False) == ("yes", "no")
    assert weights.known_answers(None, None, "none", False) == ()
    with pytest.raises(UserError, match="which answer is which in .*vqa.pth.* into .*answers.json"):
        weights.known_answers(corpus, None, file, True)
    (tmp_path / "answers.json").write_text('["b", "a"]')
    assert weights.known_answers(corpus, None, file, True) == ("b", "a")
    assert weights.known_answers(corpus, None, file, False) == ("yes", "no"), "these weights have no answer head"
    assert weights.known_answers(corpus, tmp_path / "step_3", "none", False) == ("b", "a")


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and spellings


def test_sizes_are_read_from_shapes_and_numbers_of_layers():
    state = {"words": torch.zeros(7, 3), "a.layer.0.w": torch.zeros(5, 3), "a.layer.10.w": torch.zeros(5, 3),
             "a.layer.10.b": torch.zeros(5), "b.layer.0.w": torch.zeros(1)}  # fmt: skip
    shapes = {"vocab_size": ("words", 0), "width": ("words", 1), "patch": ("not there", 2)}
    found = weights.sizes_of(state, shapes, {"layers": "a.layer.", "others": "c.layer."})
    assert found == {"vocab_size": 7, "width": 3, "layers": 2}, "what tells nothing is not among them"


def test_positions_of_pictures_of_another_size():
    """Bicubic, worked out by hand; [CLS] keeps its row, the same size changes nothing, a picture's rows stay rows."""
    rows, columns = torch.tensor([3.0, 1, 4, 1]), torch.tensor([5.0, 9, 2, 6])
    table = torch.stack([rows[:, None].expand(4, 4), columns.expand(4, 4)], dim=2).reshape(16, 2)
    table = torch.cat([torch.tensor([[7.0, -7.0]]), table])
    assert weights.resize_positions(table, 4) is table
    large = weights.resize_positions(table, 8)
    assert large.shape == (65, 2) and torch.equal(large[0], table[0])
    grid = large[1:].view(8, 8, 2)
    assert torch.allclose(grid[:, :1, 0], grid[:, :, 0]) and torch.allclose(grid[:1, :, 1], grid[:, :, 1])
    # the middle of cell 3 of 8 is that of place 3.5 / 2 - 0.5 = 1.25 of 4; Keys' kernel with a = -0.75
    near = [-0.75 * (d**3 - 5 * d**2 + 8 * d - 4) if d > 1 else 1.25 * d**3 - 2.25 * d**2 + 1
            for d in (1.25, 0.25, 0.75, 1.75)]  # fmt: skip
    torch.testing.assert_close(grid[3, 0, 0].item(), sum(w * x for w, x in zip(near, (3, 1, 4, 1), strict=True)))
    torch.testing.assert_close(grid[0, 3, 1].item(), sum(w * x for w, x in zip(near, (5, 9, 2, 6), strict=True)))
    half = weights.resize_positions(table.bfloat16(), 2)
    assert half.dtype == torch.bfloat16 and half.shape == (5, 2)


def test_attention_is_parted():
    both, bias = torch.arange(12.0).view(6, 2), torch.arange(6.0)
    rest = {"a.out_proj.weight": bias, "in_proj": bias}
    found = weights.parted({"a.in_proj_weight": both, "a.in_proj_bias": bias, **rest})
    assert list(found) == [*(f"a.{q}_proj.{part}" for part in ("weight", "bias") for q in "qkv"), *rest]
    for i, q in enumerate("qkv"):
        assert torch.equal(found[f"a.{q}_proj.weight"], both[2 * i : 2 * i + 2])
        assert torch.equal(found[f"a.{q}_proj.bias"], bias[2 * i : 2 * i + 2])


OPENAI = [  # transformers' name, OpenAI's; in the middle of a name, layer by layer
    ("embeddings.class_embedding", "class_embedding"), ("embeddings.patch_embedding.weight", "conv1.weight"),
    ("embeddings.position_embedding.weight", "positional_embedding"), ("pre_layrnorm.", "ln_pre."),
    ("post_layernorm.", "ln_post."), ("encoder.layers.", "transformer.resblocks."), (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."), (".self_attn.out_proj.", ".attn.out_proj."), (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
]  # fmt: skip


def openais(tower: dict) -> dict:
    """transformers' vision tower as OpenAI's file has it, beside what is left of its text tower."""
    state = {}
    for key, x in tower.items():
        if ".self_attn." in key and "out_proj" not in key:
            continue
        for theirs, name in OPENAI:
            key = key.replace(theirs, name)
        state[f"visual.{key}"] = x
    for i in (0, 1):
        for part in ("weight", "bias"):
            rows = [tower[f"encoder.layers.{i}.self_attn.{q}_proj.{part}"] for q in "qkv"]
            state[f"visual.transformer.resblocks.{i}.attn.in_proj_{part}"] = torch.cat(rows)
    more = "positional_embedding text_projection token_embedding.weight ln_final.weight logit_scale visual.proj " \
           "transformer.resblocks.0.ln_1.weight transformer.resblocks.0.attn.in_proj_weight"  # fmt: skip
    return {"input_resolution": torch.tensor(16)} | dict.fromkeys(more.split(), torch.zeros(6, 2)) | state


def test_clips_vision_tower_in_all_its_spellings(tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

    sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    full = CLIPModel(CLIPConfig(vision_config=dict(sizes, image_size=16, patch_size=8),
                                text_config=dict(sizes, vocab_size=20), projection_dim=4))  # fmt: skip
    for p in full.parameters():
        torch.nn.init.normal_(p)
    tower = full.vision_model.state_dict()
    openai = openais(tower)
    wanted = {key.removeprefix("visual."): x for key, x in weights.parted(openai).items()
              if key.startswith("visual.") and key != "visual.proj"}  # fmt: skip
    assert {"class_embedding", "conv1.weight", "positional_embedding", "ln_pre.bias", "ln_post.weight",
            "transformer.resblocks.1.attn.k_proj.bias", "transformer.resblocks.0.mlp.c_proj.weight"} <= set(wanted)
    full.save_pretrained(tmp_path / "full")
    alone = CLIPVisionModel(full.config.vision_config)
    names = {key.removeprefix("vision_model."): key for key in alone.state_dict()}
    alone.load_state_dict({key: tower[name] for name, key in names.items()})
    alone.save_pretrained(tmp_path / "alone")
    ids, read = torch.arange(5)[None], [weights.read_weights(str(tmp_path / name))[1] for name in ("full", "alone")]
    for state in (openai, *read, tower, {f"vision_model.{key}": x for key, x in tower.items()},
                  {**tower, "embeddings.position_ids": ids},
                  {**full.state_dict(), "vision_model.embeddings.position_ids": ids}):  # fmt: skip
        found = weights.clip_vision(state)
        assert found.keys() == wanted.keys() and all(torch.equal(x, wanted[key]) for key, x in found.items())
    with pytest.raises(UserError, match="no vision tower of CLIP's; its first keys are text_model"):
        weights.clip_vision({"text_model.a": ids})


def test_roberta_in_all_its_spellings(tmp_path):
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaModel

    sizes = dict(vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    config = RobertaConfig(**sizes, max_position_embeddings=9, type_vocab_size=1)
    torch.manual_seed(0)
    masked, bare = RobertaForMaskedLM(config), RobertaModel(config)
    bare.load_state_dict(masked.roberta.state_dict(), strict=False)
    heads = {f"lm_head.{x}" for x in ("bias", "dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias")}
    for name, module in (("masked", masked), ("bare", bare)):
        module.save_pretrained(tmp_path / name)
        states = weights.read_weights(str(tmp_path / name))[1], module.state_dict()
        more = {("roberta." * (name == "masked")) + "embeddings.position_ids": torch.arange(9)[None]}
        for state in (*states, {**states[1], **more}):
            found, encoder = weights.roberta(state), masked.roberta.state_dict()
            assert {key for key in found if key.startswith("lm_head.")} == (heads if name == "masked" else set())
            assert found.keys() - heads == encoder.keys() and "encoder.layer.1.output.LayerNorm.bias" in found
            assert all(torch.equal(x, encoder[key]) for key, x in found.items() if key in encoder)
            assert name == "bare" or torch.equal(found["lm_head.bias"], masked.lm_head.bias)
    assert "pooler.dense.weight" in bare.state_dict() and "lm_head.decoder.weight" in masked.state_dict()
