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
