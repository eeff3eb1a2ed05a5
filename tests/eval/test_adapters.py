"""Adapters to VLMEvalKit and lmms-eval, against their base classes.

The stand-ins state the contracts as VLMEvalKit 0.2rc1 (ms-vlmeval 0.0.20) and lmms-eval 0.7.3 have them. Where
VLMEVALKIT_DIR names a checkout (or a folder with its package) and LMMS_EVAL_DIR a folder with the package lmms_eval,
the same tests run against the real base.py, inference.py, registry_v2.py and model.py; what these import is stubbed.
"""

import hashlib
import importlib
import json
import logging
import mimetypes
import os
import pickle
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from llava.errors import UserError
from llava.eval import lmms_model, vlmevalkit
from llava.eval.outside import arrange, prompt_of
from llava.generate.candidates import Draw, Prompt, Sampling
from llava.generate.sampling import complete
from tests.loopback import Loopback, completion

LETTER = "Answer with the option's letter from the given choices directly."


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    paths = [tmp_path / "wide.png", tmp_path / "tall.png"]
    Image.effect_noise((90, 40), 90).convert("RGB").save(paths[0])
    Image.linear_gradient("L").resize((40, 70)).convert("RGB").save(paths[1])
    return paths


def ours(model, processor, images: list[Path], text: str, length: int = 8) -> str:
    prompt = Prompt([Image.open(path).convert("RGB") for path in images], [text], [Draw(0, 0)])
    return complete(model, processor, [prompt], Sampling(temperature=0, max_new_tokens=length))[0][0].text


def module(monkeypatch, name: str, folder: Path | None = None, **content) -> types.ModuleType:
    """A stub; with a folder a package whose other modules are the real ones in there."""
    made = types.ModuleType(name)
    made.__path__ = [str(folder)] if folder else []
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def real_folder(variable: str, package: str) -> Path:
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set")
    return Path(os.environ[variable]).resolve() / package


# The parts of a message


def test_texts_and_images_keep_their_places(photos):
    first, second = photos
    assert arrange([first, "Look.", second, "Which?"]) == [first, "Look.", second, "Which?"]
    assert arrange([first, second, "<image> or <image>?"]) == [first, "or", second, "?"]
    assert arrange([first, "<image>"]) == [first]
    assert arrange([first, "two <image> but <image> one"]) == [first, "two but one"]
    assert arrange(["no image <image> here", ""]) == ["no image here"]


def test_a_message_is_what_training_saw(photos):
    prompt = prompt_of([*photos, "What is it?"], [])
    assert prompt.messages == ["<image>\n<image>\nWhat is it?"]
    assert [image.size for image in prompt.images] == [(90, 40), (40, 70)]
    prompt = prompt_of([photos[1], "and", Image.open(photos[0]), "differ how?"], [])
    assert prompt.messages == ["<image>\nand\n<image>\ndiffer how?"]
    assert [image.size for image in prompt.images] == [(40, 70), (90, 40)]


# VLMEvalKit: its base class

BASE = """
class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image", "video"]

    def __init__(self):
        self.dump_image_func = None

    def set_dump_image(self, dump_image_func):
        self.dump_image_func = dump_image_func

    def dump_image(self, line, dataset):
        return self.dump_image_func(line)

    def generate(self, message, dataset=None):
        for part in message:
            assert part["type"] in self.allowed_types, f"Invalid input type: {part['type']}"
        return self.generate_inner(message, dataset)
"""


def parse_file(value: str) -> tuple[str | None, str]:
    """What a message's value is, by its ending: (MIME type, path), or (None, text)."""
    return mimetypes.guess_type(value)[0], value


@pytest.fixture(params=["stand-in", "real"])
def kit(request, monkeypatch) -> type:
    """The model's class over VLMEvalKit's BaseModel."""
    package = real_folder("VLMEVALKIT_DIR", "vlmeval") if request.param == "real" else None
    nothing = dict.fromkeys(["concat_images_vlmeval", "encode_image_to_base64", "listinstr"])
    module(monkeypatch, "vlmeval", package)
    module(monkeypatch, "vlmeval.smp", parse_file=parse_file, **nothing)
    module(monkeypatch, "vlmeval.dataset", DATASET_TYPE=lambda name: "MCQ" if "MCQ" in name else "VQA")
    module(monkeypatch, "vlmeval.vlm", package and package / "vlm")
    monkeypatch.delitem(sys.modules, "vlmeval.vlm.base", raising=False)
    if package is None:
        content = {}
        exec(BASE, content)
        module(monkeypatch, "vlmeval.vlm.base", BaseModel=content["BaseModel"])
    yield vlmevalkit.model_class()
    sys.modules.pop("vlmeval.vlm.base", None)


def test_a_checkpoint_answers_through_vlmevalkit_as_it_does_here(kit, checkpoint, model, processor, photos):
    adapter = kit(str(checkpoint), None, None, 8)
    assert (adapter.is_api, adapter.INTERLEAVE) == (False, True)
    image, second = ({"type": "image", "value": str(path)} for path in photos)
    text = {"type": "text", "value": "What is in the photo?"}
    assert adapter.generate([image, text]) == ours(model, processor, photos[:1], "<image>\nWhat is in the photo?")
    said = adapter.generate([second, text, image], "any")
    assert said == ours(model, processor, photos[::-1], "<image>\nWhat is in the photo?\n<image>")
    assert adapter.generate([text]) == ours(model, processor, [], "What is in the photo?")
    with pytest.raises(AssertionError, match="video"):
        adapter.generate([{"type": "video", "value": "a.mp4"}])


def test_multiple_choice_is_asked_in_our_words_and_the_rest_in_vlmevalkits(kit, photos):
    adapter = kit(None, "http://127.0.0.1:1/v1", "toy", 8)
    assert [adapter.use_custom_prompt(name) for name in ("ToyMCQ", "ToyVQA", None)] == [True, False, False]
    adapter.set_dump_image(lambda line: [str(path) for path in photos])
    line = {"index": 0, "question": "Which?", "hint": "Look.", "A": "one", "B": 2, "C": float("nan"), "D": None}
    assert adapter.build_prompt(line, "ToyMCQ") == [
        {"type": "image", "value": str(photos[0])}, {"type": "image", "value": str(photos[1])},
        {"type": "text", "value": f"Look.\nWhich?\nA. one\nB. 2\n{LETTER}"},
    ]  # fmt: skip
    adapter.set_dump_image(lambda line: str(photos[0]))
    assert adapter.build_prompt({**line, "hint": float("nan")}, dataset="ToyMCQ")[1]["value"].startswith("Which?\nA.")


def test_a_served_model_is_asked_greedily_and_a_refusal_is_told_as_vlmevalkit_tells_it(kit, photos, capsys):
    def answer(number, body):
        return (200, completion(["a cat"]), {}) if number == 0 else (400, {"error": {"message": "too large"}}, {})

    with Loopback(answer) as server:
        adapter = kit(None, server.base_url, "toy", 8)
        message = [
            {"type": "text", "value": "First:"}, {"type": "image", "value": str(photos[1])},
            {"type": "image", "value": str(photos[0])}, {"type": "text", "value": "Which?"},
        ]  # fmt: skip
        assert adapter.is_api
        assert adapter.generate(message) == "a cat"
        assert adapter.generate(message) == "Failed to obtain answer via API."
    [asked, _] = server.requests
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("toy", 0, 8)
    parts = asked["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "image_url", "text"]
    assert len(parts[1]["image_url"]["url"]) != len(parts[2]["image_url"]["url"])
    assert "too large" in capsys.readouterr().err


def test_vlmevalkits_own_inference_runs_it_and_continues(checkpoint, model, processor, photos, monkeypatch, tmp_path):
    package, pandas = real_folder("VLMEVALKIT_DIR", "vlmeval"), pytest.importorskip("pandas")

    def dump(value, path):
        Path(path).write_bytes(pickle.dumps(value))

    module(monkeypatch, "vlmeval", package)
    module(
        monkeypatch, "vlmeval.smp", parse_file=parse_file, dump=dump, load=lambda path: pickle.loads(Path(path).read_bytes()),
        get_logger=logging.getLogger, get_pred_file_format=lambda: "pkl",
        get_pred_file_path=lambda folder, name, data, use_env_format: f"{folder}/{name}_{data}.xlsx",
        get_rank_and_world_size=lambda: (0, 1), **dict.fromkeys(["concat_images_vlmeval", "encode_image_to_base64", "listinstr"]),
    )  # fmt: skip
    module(monkeypatch, "vlmeval.dataset", DATASET_TYPE=lambda name: "MCQ")
    module(monkeypatch, "vlmeval.config", supported_VLM={})
    module(monkeypatch, "vlmeval.utils", track_progress_rich=None)
    module(monkeypatch, "vlmeval.vlm", package / "vlm")
    for name in ("vlmeval.vlm.base", "vlmeval.inference"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    inference = importlib.import_module("vlmeval.inference")
    made, built = vlmevalkit.model_class(), []
    sys.modules["vlmeval.config"].supported_VLM["toy"] = lambda: built.append(1) or made(str(checkpoint), None, None, 8)
    rows = [{"index": number, "question": "Which?", "A": "one", "B": str(number)} for number in range(3)]

    class Data:
        dataset_name = "ToyMCQ"

        def __init__(self):
            self.data = pandas.DataFrame(rows)

        def __len__(self):
            return len(self.data)

        def dump_image(self, line):
            return [str(photos[line["index"] % 2])]

    inference.infer_data_job("toy", str(tmp_path), "toy", Data())
    predictions = pickle.loads((tmp_path / "toy_ToyMCQ.xlsx").read_bytes())["prediction"]
    assert list(predictions) == [
        ours(model, processor, [photos[number % 2]], f"<image>\nWhich?\nA. one\nB. {number}\n{LETTER}")
        for number in range(3)
    ]
    inference.infer_data_job("toy", str(tmp_path), "toy", Data())
    assert built == [1]  # the second time everything was there
    for name in ("vlmeval.vlm.base", "vlmeval.inference"):
        sys.modules.pop(name, None)


# VLMEvalKit: the command

RUN = """
import argparse, json, logging, os
from vlmeval.config import supported_VLM

def main():
    parser = argparse.ArgumentParser()
    for flag in ("--data", "--model"):
        parser.add_argument(flag, nargs="+")
    for flag in ("--work-dir", "--mode", "--judge", "--image"):
        parser.add_argument(flag)
    parser.add_argument("--reuse", action="store_true")
    args = parser.parse_args()
    [name] = args.model
    for data in args.data:
        if data == "Broken":
            logging.getLogger("elsewhere").error(f"Model {name} x Dataset {data} combination failed: no, skipping.")
            continue
        if data == "Unknown":
            continue
        message = [{"type": "image", "value": args.image}, {"type": "text", "value": "What is in the photo?"}]
        answer = supported_VLM[name]().generate(message, data)
        with open(os.path.join(args.work_dir, name, f"{name}_{data}.json"), "w") as file:
            json.dump({**vars(args), "answer": answer}, file)

if __name__ == "__main__":
    raise SystemExit("main is called by whoever loads this")
"""


@pytest.fixture(params=["run.py", "vlmeval/run.py"])
def checkout(request, tmp_path, monkeypatch) -> Path:
    """A folder laid out like VLMEvalKit: a checkout, or the package alone."""
    folder = tmp_path / "VLMEvalKit"
    files = {
        "vlmeval/__init__.py": "", "vlmeval/config.py": "supported_VLM = {}\n", "vlmeval/vlm/__init__.py": "",
        "vlmeval/vlm/base.py": BASE, "vlmeval/dataset.py": "def DATASET_TYPE(name):\n    return 'VQA'\n", request.param: RUN,
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "vlmeval"]:
        del sys.modules[name]


def call(monkeypatch, main, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    main()


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(path).encode() + path.read_bytes() for path in files)).hexdigest()


def test_the_model_is_added_to_a_checkout_of_which_nothing_changes(
    checkout, checkpoint, model, processor, photos, tmp_path, monkeypatch
):
    before, work = digest(checkout), tmp_path / "work"
    words = ["--vlmevalkit_dir", checkout, "--model_name_or_path", checkpoint, "--work_dir", work, "--reuse"]
    words += ["--max_new_tokens", 8, "--image", photos[0], "--data", "ToyA", "ToyB"]
    call(monkeypatch, vlmevalkit.main, *words)
    assert digest(checkout) == before
    name = checkpoint.name
    found = json.loads((work / name / f"{name}_ToyB.json").read_text())
    assert found == {
        "data": ["ToyA", "ToyB"], "model": [name], "work_dir": str(work), "mode": "all", "judge": None,
        "reuse": True, "image": str(photos[0]), "answer": ours(model, processor, photos[:1], "<image>\nWhat is in the photo?"),
    }  # fmt: skip
    assert json.loads((work / name / "run.json").read_text())["status"] == "complete"
    call(monkeypatch, vlmevalkit.main, *words[:-1], "--judge", "exact_matching")  # further benchmarks, same folder
    assert json.loads((work / name / f"{name}_ToyA.json").read_text())["judge"] == "exact_matching"
    with pytest.raises(UserError, match="max_new_tokens was 8"):
        call(monkeypatch, vlmevalkit.main, *words, "--max_new_tokens", 9)


@pytest.mark.parametrize(
    ("benchmark", "message"), [("Broken", "Dataset Broken combination failed: no"), ("Unknown", "no predictions for Unknown")]
)  # fmt: skip
def test_what_vlmevalkit_skips_is_an_error(checkout, checkpoint, tmp_path, monkeypatch, benchmark, message):
    words = ["--vlmevalkit_dir", checkout, "--model_name_or_path", checkpoint, "--work_dir", tmp_path / "work"]
    with pytest.raises(UserError, match=message):
        call(monkeypatch, vlmevalkit.main, *words, "--data", benchmark)


def test_the_dry_run_of_vlmevalkit_prints_its_command(checkout, checkpoint, tmp_path, monkeypatch, capsys):
    words = ["--vlmevalkit_dir", checkout, "--work_dir", "runs/kit", "--data", "MMStar", "--dry_run", "--limit", "20"]
    call(monkeypatch, vlmevalkit.main, *words, "--model_name_or_path", checkpoint, "--judge", "gpt-4o", "--reuse")
    run = next(path for path in (checkout / "run.py", checkout / "vlmeval" / "run.py") if path.is_file())
    assert capsys.readouterr().out == (
        f"model        init: {checkpoint}\n"
        f"runs         python {run} --data MMStar --model init --work-dir runs/kit --mode all --judge gpt-4o --reuse --limit 20\n"
        "writes       runs/kit/init/ (nothing was written)\n"
    )
    call(monkeypatch, vlmevalkit.main, *words, "--base_url", "http://127.0.0.1:8000/v1", "--model", "org/sicog")
    assert "model        org--sicog: served at http://127.0.0.1:8000/v1\n" in capsys.readouterr().out
    assert "vlmeval" not in sys.modules


def test_a_folder_that_is_no_vlmevalkit_is_named_with_the_fix(checkout, tmp_path):
    with pytest.raises(UserError, match=r"has no vlmeval/config\.py\. Fix: VLMEVALKIT_DIR names a checkout"):
        vlmevalkit.run_file(tmp_path)
    with pytest.raises(UserError, match=f"names its parent, {checkout}"):
        vlmevalkit.run_file(checkout / "vlmeval")
    (checkout / "vlmeval" / "config.py").write_text("")
    with pytest.raises(UserError, match="no supported_VLM"):
        vlmevalkit.run_file(checkout)


def test_vlmevalkit_that_lacks_a_requirement_is_named_with_the_fix(checkout):
    (checkout / "vlmeval" / "config.py").write_text("import not_installed\nsupported_VLM = {}\n")
    with pytest.raises(UserError, match=r"cannot be imported \(No module named 'not_installed'\)"):
        vlmevalkit.load_run(checkout)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ([], "which model"),
        (["--model_name_or_path", "a", "--base_url", "b"], "which model"),
        (["--base_url", "b"], "needs --model"),
        (["--model_name_or_path", "absent"], "absent has no config.json"),
    ],
)
def test_the_model_must_be_named_once_and_exist(checkout, monkeypatch, model, message):
    words = ["--vlmevalkit_dir", checkout, "--work_dir", "w", "--data", "MMStar", "--dry_run"]
    with pytest.raises(UserError, match=message):
        call(monkeypatch, vlmevalkit.main, *words, *model)


# lmms-eval: its base class and registry


class StandInBase(ABC):
    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *row: None)

    @classmethod
    def create_from_arg_string(cls, words, additional):
        given = dict(word.split("=", 1) for word in words.split(","))
        return cls(**given, **{key: value for key, value in additional.items() if value is not None})

    @property
    def rank(self):
        return self._rank

    @abstractmethod
    def loglikelihood(self, requests): ...

    @abstractmethod
    def generate_until(self, requests): ...

    @abstractmethod
    def generate_until_multi_round(self, requests): ...


@dataclass(frozen=True)
class StandInManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


@pytest.fixture(params=["stand-in", "real"])
def lmms(request, monkeypatch):
    """lmms-eval's package as far as a model sees it."""
    package = real_folder("LMMS_EVAL_DIR", "lmms_eval") if request.param == "real" else None
    names = ("lmms_eval.api.model", "lmms_eval.models.registry_v2")
    parse = lambda words: dict(word.split("=", 1) for word in words.split(","))  # noqa: E731
    module(monkeypatch, "lmms_eval", package, utils=types.SimpleNamespace(simple_parse_args_string=parse))
    module(monkeypatch, "lmms_eval.api", package and package / "api")
    module(monkeypatch, "lmms_eval.models", package and package / "models")
    if package is None:
        module(monkeypatch, names[0], lmms=StandInBase)
        module(monkeypatch, names[1], ModelManifest=StandInManifest)
    yield request.param
    for name in (*names, "lmms_eval.api.instance"):
        sys.modules.pop(name, None)


@pytest.fixture
def adapter(lmms, checkpoint, tmp_path):
    """The model as lmms-eval makes it from its command line, with two documents of a task."""
    words = f"pretrained={checkpoint},max_new_tokens=8,resume={tmp_path / 'answers'}"
    given = {"batch_size": "2", "max_batch_size": None, "device": None}
    made = lmms_model.model_class().create_from_arg_string(words, given)
    made.max_new_tokens = int(made.max_new_tokens)
    return made


def requests(adapter, photos, *settings, content=None) -> list:
    """One request a settings dict, on alternating documents of the task `toy`."""
    adapter.task_dict["toy"] = {"test": [{"path": path, "question": f"What is in {path.stem}?"} for path in photos]}

    def messages_of(document):
        image = {"type": "image", "url": Image.open(document["path"])}
        return [{"role": "user", "content": content or [image, {"type": "text", "text": document["question"]}]}]

    return [
        types.SimpleNamespace(args=("context", messages_of, given, number % len(photos), "toy", "test"))
        for number, given in enumerate(settings)
    ]


def test_lmms_eval_finds_the_model_by_its_entry_point(lmms):
    found = lmms_model.manifest()
    assert (found.model_id, found.chat_class_path) == ("llava_uhd", "llava.eval.lmms_model.LlavaUHD")
    made = lmms_model.LlavaUHD
    assert issubclass(made, sys.modules["lmms_eval.api.model"].lmms)
    assert made.is_simple is False
    assert not made.__abstractmethods__


def test_the_real_registry_takes_the_entry_point(lmms, monkeypatch):
    if lmms == "stand-in":
        pytest.skip("LMMS_EVAL_DIR is not set")
    registry_module = importlib.import_module("lmms_eval.models.registry_v2")
    registry = registry_module.ModelRegistryV2()
    entry = types.SimpleNamespace(load=lambda: lmms_model.manifest)
    monkeypatch.setattr(registry, "_select_entry_points", lambda group: [entry] if group == "lmms_eval.models" else [])
    registry.load_entrypoint_manifests()
    assert registry.resolve("llava_uhd").model_type == "chat"
    assert registry.get_model_class("llava_uhd").__name__ == "LlavaUHD"
    assert registry.get_model_class("llava_uhd", force_simple=True).is_simple is False


def test_without_lmms_eval_the_module_loads_and_the_class_does_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(ImportError):
        _ = lmms_model.LlavaUHD
    with pytest.raises(AttributeError):
        _ = lmms_model.Other


def test_answers_through_lmms_eval_are_ours_in_the_order_of_the_requests(adapter, model, processor, photos):
    short, long = {"max_new_tokens": 3, "temperature": 0}, {"do_sample": False}
    said = adapter.generate_until(requests(adapter, photos, long, short, short, long, long))
    assert said == [
        ours(model, processor, [photos[number % 2]], f"<image>\nWhat is in {photos[number % 2].stem}?", length)
        for number, length in enumerate([8, 3, 3, 8, 8])
    ]
    assert (adapter.rank, adapter.world_size if hasattr(adapter, "world_size") else 1) == (0, 1)
    assert str(adapter.device) == "cpu"


def test_several_images_keep_their_order_and_placeholders_say_where(adapter, model, processor, photos):
    images = [{"type": "image", "url": str(photos[1])}, {"type": "image", "url": Image.open(photos[0])}]
    content = [*images, {"type": "text", "text": "Is <image> left of <image>?"}]
    [said] = adapter.generate_until(requests(adapter, photos, {}, content=content))
    assert said == ours(model, processor, photos[::-1], "Is\n<image>\nleft of\n<image>\n?")


def test_a_killed_evaluation_goes_on_where_it_was(adapter, photos, tmp_path, monkeypatch):
    from llava.generate import sampling

    asked, stream = [], sampling.stream

    def watched(model, processor, prompts, *others):
        for (key, request), prompt in prompts:
            asked.append(key)
            if len(asked) == 3:
                raise KeyboardInterrupt
            yield from stream(model, processor, [((key, request), prompt)], *others)

    monkeypatch.setattr(sampling, "stream", watched)
    wanted = requests(adapter, photos, {}, {}, {}, {})
    with pytest.raises(KeyboardInterrupt):
        adapter.generate_until(wanted)
    kept = tmp_path / "answers" / "rank_0.jsonl"
    kept.rename(kept.with_name("rank_7.jsonl"))  # the number of ranks may differ
    said = adapter.generate_until(wanted)
    assert len(asked) == 3 + 2
    assert len(set(asked)) == 4  # the same document twice is two requests
    assert said[:2] == said[2:]
    assert len(lmms_model.earlier(tmp_path / "answers")) == 4


def test_generation_settings_of_tasks():
    def of(**given):
        return lmms_model.sampling_of(given, 100)

    greedy = Sampling(temperature=0, max_new_tokens=100)
    assert of() == of(temperature=0, top_p=0) == of(temperature=None, until=["\n"]) == greedy
    assert of(temperature=0.7, do_sample=False) == of(do_sample=True) == greedy
    assert of(num_beams=3, max_new_tokens=7) == Sampling(temperature=0, num_beams=3, max_new_tokens=7)
    assert of(temperature=0.7, top_p=None, top_k=5) == Sampling(0.7, 1.0, 5, 1, 100)


def test_an_answer_ends_before_the_first_stop_string():
    assert lmms_model.cut("a cat\n\nQ: next", ["Q:", "\n\n"]) == "a cat"
    assert lmms_model.cut("a cat\nand", "\n") == "a cat"
    assert lmms_model.cut("a cat", ["\n\n", ""]) == "a cat"
    assert lmms_model.cut("a cat", None) == "a cat"


def test_what_it_cannot_answer_is_said(adapter, photos):
    with pytest.raises(NotImplementedError, match="output_type generate_until"):
        adapter.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one message at a time"):
        adapter.generate_until_multi_round([])
    with pytest.raises(UserError, match="toy has video"):
        adapter.generate_until(requests(adapter, photos, {}, content=[{"type": "video", "url": "a.mp4"}]))
    spoken = [{"role": "user", "content": []}, {"role": "assistant", "content": []}]
    with pytest.raises(UserError, match="words into the model's mouth"):
        lmms_model.parts_of(spoken, "toy")
    text = [{"type": "text", "text": "Be brief."}]
    assert lmms_model.parts_of([{"role": "system", "content": text}, {"role": "user", "content": text}], "toy") == [
        "Be brief.", "Be brief.",
    ]  # fmt: skip


# lmms-eval: the command


def test_the_dry_run_of_lmms_eval_prints_its_command(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(lmms_model.importlib.util, "find_spec", lambda name: None)
    words = ["--work_dir", "runs/lmms", "--dry_run", "--limit", "8", "--tasks", "mme", "mmstar"]
    call(monkeypatch, lmms_model.main, *words, "--model_name_or_path", checkpoint)
    assert capsys.readouterr().out == (
        f"model        init: {checkpoint}\n"
        "lmms-eval    not installed here\n"
        f"runs         python -m lmms_eval --model llava_uhd --model_args pretrained={checkpoint},max_new_tokens=1024,"
        "resume=runs/lmms/init/answers --tasks mme,mmstar --batch_size 16 --output_path runs/lmms/init --log_samples "
        "--limit 8\nwrites       runs/lmms/init/ (nothing was written)\n"
    )
    call(monkeypatch, lmms_model.main, *words, "--base_url", "http://127.0.0.1:8000/v1", "--model", "sicog")
    assert (
        "python -m lmms_eval --model openai --model_args model=sicog,base_url=http://127.0.0.1:8000/v1,num_concurrent=16 "
        "--tasks mme,mmstar --batch_size 16 --output_path runs/lmms/sicog --log_samples --use_cache runs/lmms/sicog/cache "
    ) in capsys.readouterr().out


def test_what_keeps_lmms_eval_from_starting_is_named_with_the_fix(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(lmms_model.importlib.util, "find_spec", lambda name: None)
    words = ["--work_dir", tmp_path / "work", "--tasks", "mme"]
    with pytest.raises(UserError, match="lmms-eval is not installed"):
        call(monkeypatch, lmms_model.main, *words, "--model_name_or_path", checkpoint)
    assert not (tmp_path / "work").exists()
    with pytest.raises(UserError, match="--gen_kwargs max_new_tokens=64"):
        call(monkeypatch, lmms_model.main, *words, "--base_url", "b", "--model", "toy", "--max_new_tokens", 64)
    with pytest.raises(UserError, match="has a comma"):
        call(monkeypatch, lmms_model.main, *words, "--model_name_or_path", "a,b")


@pytest.mark.parametrize("finished", [True, False])
def test_lmms_eval_that_leaves_no_results_is_an_error(checkpoint, monkeypatch, tmp_path, finished):
    folder = tmp_path / "work" / "init"

    def evaluate(command):
        assert command[command.index("--output_path") + 1] == str(folder)
        if finished:
            (folder / "20260101_results.json").write_text("{}")

    monkeypatch.setattr(lmms_model.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(lmms_model, "evaluate", evaluate)
    words = ["--work_dir", tmp_path / "work", "--tasks", "mme", "--model_name_or_path", checkpoint]
    if finished:
        call(monkeypatch, lmms_model.main, *words)
        assert json.loads((folder / "run.json").read_text())["status"] == "complete"
    else:
        with pytest.raises(UserError, match="left no results"):
            call(monkeypatch, lmms_model.main, *words)
