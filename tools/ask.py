"""What a trained model says of pictures: --caption, --score and --ask of every model file."""

from dataclasses import replace

import torch

import common
import data
import language
import regions
from common import UserError

COMMANDS = {
    "caption": dict(nargs="+", metavar="PICTURE", help="print a caption for each picture (with --init RUN)"),
    "score": dict(nargs="+", metavar="WHAT", help="PICTURE TEXT [TEXT ...]: print how well each text fits the picture"),
    "ask": dict(nargs="+", metavar="WHAT", help="PICTURE QUESTION [QUESTION ...]: print the answers (runs of vqa)"),
    "eval-only": dict(nargs="*", metavar="RUN", help="evaluate finished runs, or the one of --init, side by side"),
}


def answer_commands(command, given: dict, model_class, model_name: str, decoding: list[str], check) -> None:
    """A line for each picture, text or question. command: the namespace of `common.parse_flags`."""
    all_asked = [name for name in ("caption", "score", "ask") if getattr(command, name)]
    if len(all_asked) > 1 or command.eval_only is not None:
        raise UserError(f"--{all_asked[0]} and {', '.join(all_asked[1:]) or 'eval-only'}: give one of them at a time")
    asked = all_asked[0]
    common.allow(given, ["init", "device", *decoding], f"--{asked}")
    first, *rest = getattr(command, asked)
    if given.get("init", "none") == "none":
        raise UserError(f"--{asked} needs a trained model: add --init RUN, e.g. --init runs/{model_name}-scenes")
    if asked != "caption" and not rest:
        raise UserError(f"--{asked} {first}: a picture and a text are needed, the text in quotes")
    model = model_class.from_run(given["init"], common.choose_device(given.get("device", "auto"))[0])
    model.cfg = replace(model.cfg, **given)
    check(model.cfg)
    if asked == "caption":
        for picture in (first, *rest):
            print(f"{picture}: {model.caption(picture)}")
    for text in rest if asked == "score" else ():
        print(f"{model.score(first, text):.3f}  {text}")
    for question in rest if asked == "ask" else ():
        print(f"{question}  {model.answer(first, question)}")


class Verbs:
    """caption, score and answer for a model that has a tokenizer and cfg, and these functions of its own:
    caption_batch(batch, beam), encode_images(batch), encode_texts(texts), answer_scores(batch); see tools/exam.py."""

    def caption(self, picture, beam: int = 0) -> str:
        """A caption for one picture, see `regions.of_picture`. beam 0: the run's own."""
        if not hasattr(self, "caption_batch"):
            raise UserError("this model has no decoder and gives no captions, it scores and answers: --score, --ask")
        self._need("lm_head", "--task pretrain or caption", "captions")
        return self.caption_batch(self._look(picture), beam or self.cfg.beam)[0]

    @torch.no_grad()
    def score(self, picture, text: str) -> float:
        """How well a text fits a picture, the dot product of their vectors: -1 to 1."""
        self._need("ism", "--task pretrain or retrieval", "similarities")
        return (self.encode_texts([text]) @ self.encode_images(self._look(picture)).T).item()

    def answer(self, picture, question: str) -> str:
        """The most probable answer."""
        self._need("answers", "--task vqa", "answers")
        batch = self._look(picture) | self.tokenized([question])
        return self.answers[self.answer_scores(batch).argmax().item()]

    def tokenized(self, texts: list[str]) -> dict:
        """Texts as written -> what data.pad_texts gives, on the model's device."""
        tok = self.tokenizer
        rows = [[tok.encode(language.clean_caption(text), self.cfg.max_len)] for text in texts]
        return data.to_device(self, data.pad_texts(rows, tok.bos, tok.eos, tok.pad))

    def _need(self, part: str, task: str, what: str) -> None:
        if not getattr(self, part, None):
            raise UserError(f"this run is of --task {self.cfg.task} and gives no {what}: take a run of {task}")

    def _look(self, picture) -> dict:
        """The regions or, where the model reads pixels, the pixels of one picture, as a loader's batch has them: with
        cfg.short_side in the picture's own shape, with cfg.image_size and cfg.frame a square."""
        cfg = self.cfg
        if hasattr(cfg, "regions"):
            return data.pad_regions([regions.of_picture(picture, cfg.regions, cfg.data, cfg.world, cfg.max_regions)])
        keeps_shape = hasattr(cfg, "short_side")
        try:
            image = data.load_image(regions.scene_named(picture, cfg.world) or picture,
                                    cfg.short_side if keeps_shape else cfg.image_size)  # fmt: skip
        except data.BadImage as bad:
            raise UserError(f"{bad}; give another file, or of scenes SPLIT:NUMBER, like test:0") from bad
        if keeps_shape:
            return data.pad_pixels([data.within(image, cfg.short_side, cfg.long_side)], 32)
        return {"pixels": data.to_pixels(image, cfg.image_size, frame=cfg.frame)[None]}
