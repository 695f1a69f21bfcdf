"""What only the small world can tell: which sentences are true, and of how many scenes."""

import numpy as np

import scenes
from eval import same_ids
from scenes import Truth


def truth_metrics(hyps, scenes_by_id):
    """Exact judgement of captions of scenes. hyps: dict id -> caption; scenes_by_id: dict id -> scenes.Scene.

    caption_true        share of captions that are true of their own scene (unknown and unparsable are not true)
    caption_unparsable  share of captions outside the grammar
    caption_generality  mean over captions of the share of all these scenes that the caption is true of: "there is an
                        object" is always true and says nothing
    """
    ids = same_ids(hyps, scenes_by_id)
    true_of = {}  # caption -> the scenes it is true of; None: not parsable. Once per caption: models repeat themselves.
    for caption in dict.fromkeys(hyps[i] for i in ids):
        if scenes.is_true(caption, scenes_by_id[ids[0]]) is Truth.UNPARSABLE:  # of the sentence, whatever the scene
            true_of[caption] = None
        else:
            true_of[caption] = {i for i in ids if scenes.is_true(caption, scenes_by_id[i]) is Truth.TRUE}
    of = {i: true_of[hyps[i]] for i in ids}
    return {
        "caption_true": sum(i in (of[i] or ()) for i in ids) / len(ids),
        "caption_unparsable": sum(of[i] is None for i in ids) / len(ids),
        "caption_generality": sum(len(of[i] or ()) for i in ids) / len(ids) ** 2,
    }


def verdict(caption, scene):
    """One caption's judgement as a word: true, false, unknown or unparsable."""
    return scenes.is_true(caption, scene).value


def edited(caption, scene, luck):
    """The caption with a word changed so that it is false of the scene, or None where that cannot be done."""
    return scenes.edited(caption, scene, luck)


def synonyms(word):
    """The other single words of the same meaning, plurals for plurals; none for a word that stands alone."""
    found = []
    for table in scenes.WORDS.values():
        for meaning, words in table.items():
            words = [one for one in words if " " not in one] if meaning is not None else []
            for forms in (words, [scenes.plural(one) for one in words]):
                found += [one for one in forms if word in forms and one != word]
    return tuple(dict.fromkeys(found))


def truth_table(items, texts):
    """bool [scenes, texts]: whether the text is true of the scene (unknown and unparsable are not true)."""
    return np.array([[scenes.is_true(text, item.image) is Truth.TRUE for text in texts] for item in items])


def gallery_truth(scores, table):
    """{true@1, R@1_ceiling} of scores [scenes, texts] and the truth_table of the same.

    true@1: share of texts that are true of the scene ranked first. R@1_ceiling: what the best ranking could expect,
    the mean of 1 / number of scenes that the text is true of.
    """
    first = scores.argmax(0)
    return {"true@1": float(table[first, np.arange(len(first))].mean()),
            "R@1_ceiling": float((1 / np.maximum(1, table.sum(0))).mean())}  # fmt: skip


def how_it_sees(metrics, shuffled_metrics):
    """One sentence on whether a captioner of scenes looks at its pictures."""
    true, blind = metrics["caption_true"], shuffled_metrics["caption_true"]
    told = "it sees" if true > 0.3 and true > 4 * blind else "it hardly looks; train longer (--steps)"
    return f"{true:.0%} of the captions are true of their scene, {blind:.0%} with shuffled pictures: {told}."


def how_it_ranks(metrics, shuffled_metrics):
    """One sentence on whether the scenes that are ranked first for a caption make it true."""
    true, blind = metrics["true@1"], shuffled_metrics["true@1"]
    told = "it ranks by what it sees" if true > 0.3 and true > 4 * blind else "hardly a ranking; train longer (--steps)"
    return f"{true:.0%} of the scenes ranked first make the caption true, {blind:.0%} with shuffled pictures: {told}."
