"""tools/score.py answers: result files of the official forms, scored, or refused as a server would."""

import json

import pytest
from test_benchmarks import write

import corpora
from common import UserError
from tools import official, score

GIVEN = [[0.0, 1.0, 2.0, 3.0]] * 4


def results(name, folder, split=""):
    """A right result file of the tiny data set `name` in `folder`, written by our own writers: its path."""
    corpus = corpora.load(name, folder)
    items = list(corpus.splits[split or corpus.finally_evaluated()[0]])
    path = folder / "results"
    if name == "vqa":
        official.write_vqa_results(path, {item.example_id: "no" for item in items})
    elif name == "snli_ve":
        official.write_ve_results(path, {item.example_id: corpora.ENTAILMENT[item.label] for item in items})
    elif name == "vcr":
        answers = {item.example_id: [0.0, 0.0, 9.0, 1.0] for item in items}  # the label is 2, the rationale's 3
        official.write_vcr_results(path, answers, dict.fromkeys(answers, [[9.0, 0, 0, 0]] * 2 + [GIVEN[0]] * 2))
    else:
        official.write_nlvr2_results(path, {item.example_id: bool(item.label) for item in items})
    return path


@pytest.mark.parametrize(("name", "printed"), [
    ("vqa", "vqa_accuracy"), ("nlvr2", "nlvr2_consistency"), ("nlvr1", "nlvr1_accuracy"), ("snli_ve", "ve_accuracy"),
    ("vcr", "vcr_q2ar")])  # fmt: skip
def test_what_evaluation_writes_is_scored(tmp_path, capsys, name, printed):
    path = results(name, write(tmp_path, name))
    score.main(["answers", name, str(path), "--root", str(tmp_path)])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == [printed]]
    value = float(line.split()[1])
    assert value == pytest.approx(0.3 if name == "vqa" else 1.0)  # one of the ten says "no"


@pytest.mark.parametrize("name", ["vqa", "vcr"])
def test_a_hidden_split_is_checked_only(tmp_path, capsys, name):
    path = results(name, write(tmp_path, name), "server_test")
    score.main(["answers", name, str(path), "--root", str(tmp_path), "--split", "server_test"])
    assert "one for each of server_test, in the official form: ready for the server" in capsys.readouterr().out
    with pytest.raises(UserError, match="is not in this split"):
        score.main(["answers", name, str(path), "--root", str(tmp_path), "--split", "val"])
    with pytest.raises(UserError, match="did you mean server_test"):
        score.main(["answers", name, str(path), "--root", str(tmp_path), "--split", "server_tst"])


def drop(lines):
    del lines[-1]


def twice(lines):
    lines.append(lines[-1])


REFUSED = {
    "vqa: one is lacking": ("vqa", drop, "1 of 4 questions have no answer"),
    "vqa: one twice": ("vqa", twice, "1000 has an answer already|has an answer already"),
    "vqa: another's": ("vqa", lambda rows: rows.append({"question_id": 5, "answer": "x"}), "5 is not in this split"),
    "vqa: a number": ("vqa", lambda rows: rows[0].update(answer=2), 'entry 0: it needs "question_id"'),
    "vqa: an id as text": ("vqa", lambda rows: rows[1].update(question_id="1000"), "entry 1: it needs"),
    "vqa: an id that is true": ("vqa", lambda rows: rows[0].update(question_id=True), "entry 0: it needs"),
    "ve: an id that is a list": ("snli_ve", lambda lines: lines.append('{"pairID": [1], "label": 0}'), "line 2: it n"),
    "vqa: no object": ("vqa", lambda rows: rows.append(3), "entry 4: it needs"),
    "nlvr2: one is lacking": ("nlvr1", drop, "1 of 1 questions have no answer, the first: dev-3-0"),
    "nlvr2: one twice": ("nlvr2", twice, "line 2: test1-7-0-0 has an answer already"),
    "nlvr2: small letters": ("nlvr2", lambda lines: lines.append("dev-7-0-1,true"), "line 2: it must be like"),
    "nlvr2: no comma": ("nlvr2", lambda lines: lines.append("True"), "line 2: it must be like"),
    "ve: no label": ("snli_ve", lambda lines: lines.append('{"pairID": "a"}'), 'line 2: it needs "pairID"'),
    "ve: another label": ("snli_ve", lambda lines: lines.append('{"pairID": "a", "label": 1}'), "label 1 is none"),
    "ve: no JSON": ("snli_ve", lambda lines: lines.append("pair"), 'line 2: it needs "pairID"'),
    "vcr: no head": ("vcr", lambda lines: lines.pop(0), "its first line must be annot_id,answer_0"),
    "vcr: 19 columns": ("vcr", lambda lines: lines.append("val-1" + ",0.25" * 19), "line 3: it needs an id and 20"),
    "vcr: no number": ("vcr", lambda lines: lines.append("val-1,x" + ",0.25" * 19), "line 3: it needs an id and 20"),
    "vcr: NaN": ("vcr", lambda lines: lines.append("val-1,nan" + ",0.25" * 19), "line 3: it needs an id and 20"),
    "vcr: a score": ("vcr", lambda lines: lines.append("val-1,7.5" + ",0.25" * 19), "line 3: it needs an id and 20"),
    "vcr: one is lacking": ("vcr", drop, "1 of 1 questions have no answer, the first: val-0"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_server_would_refuse(tmp_path, what):
    name, change, message = REFUSED[what]
    path = results(name, write(tmp_path, name))
    if name == "vqa":
        rows = json.loads(path.read_text())
        change(rows)
        path.write_text(json.dumps(rows))
    else:
        lines = path.read_text().splitlines()
        change(lines)
        path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        score.main(["answers", name, str(path), "--root", str(tmp_path)])


@pytest.mark.parametrize("name", ["vqa", "nlvr2", "snli_ve", "vcr"])
def test_no_file_and_no_text(tmp_path, name):
    write(tmp_path, name)
    with pytest.raises(UserError, match="nothing cannot be read"):
        score.main(["answers", name, str(tmp_path / "nothing"), "--root", str(tmp_path)])
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="bytes cannot be read"):
        score.main(["answers", name, str(tmp_path / "bytes"), "--root", str(tmp_path)])
