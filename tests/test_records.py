"""Record files: what is read, what is refused and how, and what a kill may cost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava.ids import read_unique
from llava.records import (
    RecordAppender,
    RecordError,
    check_placeholders,
    check_record,
    check_trainable,
    dump,
    images_of,
    messages_of,
    question_of,
    read_jsonl,
    read_records,
    records_of_folder,
    rejected_path,
    rejection,
    write_json,
    write_records,
)

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def turns(*texts: str) -> list[dict[str, str]]:
    """A conversation that alternates human and gpt."""
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def record(identifier="a", **fields) -> dict:
    return {"id": identifier, "conversations": turns("What is this?", "A bus."), **fields}


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def message_of(path: Path) -> str:
    """The message with which a file of records is refused."""
    with pytest.raises(RecordError) as refused:
        list(read_records(path))
    return str(refused.value)


@pytest.fixture
def one_line() -> str:
    return dump(record("a"))


# Reading


def test_json_list_and_json_lines_give_the_same_records(tmp_path):
    records = [record("a"), record("b", image="b.jpg")]
    as_list = write(tmp_path / "a.json", json.dumps(records, indent=2))
    as_lines = write(tmp_path / "a.jsonl", "".join(json.dumps(item) + "\n" for item in records))
    assert list(read_records(as_list)) == records
    assert list(read_records(as_lines)) == records


def test_the_content_decides_the_format_not_the_ending(tmp_path, one_line):
    assert list(read_records(write(tmp_path / "lines.json", one_line + "\n"))) == [record("a")]
    assert list(read_records(write(tmp_path / "list.jsonl", f"\n [{one_line}]"))) == [record("a")]


@pytest.mark.parametrize(
    "template", ["{}\n{}\n", "{}\r\n{}\r\n", "{}\n\n  \n{}", "\ufeff{}\n{}\n", "\ufeff\r\n[{},{}]"]
)
def test_line_endings_empty_lines_bom_and_a_missing_last_newline(tmp_path, template):
    path = write(tmp_path / "a.jsonl", template.format(dump(record("a")), dump(record("b"))))
    assert [item["id"] for item in read_records(path)] == ["a", "b"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_characters_that_look_like_line_ends_do_not_split_a_record(tmp_path, character):
    text = f"first{character}second"
    path = tmp_path / "a.jsonl"
    assert write_records(path, [record("a", caption=text), record("b")]) == 2
    assert [item.get("caption") for item in read_records(path)] == [text, None]


def test_integer_ids_become_strings_and_the_rest_is_kept(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([record(17, image=["x.jpg", "y.jpg"], extra={"k": [1, None]})]))
    assert list(read_records(path)) == [record("17", image=["x.jpg", "y.jpg"], extra={"k": [1, None]})]


def test_empty_files_hold_no_records(tmp_path):
    assert list(read_records(write(tmp_path / "a.jsonl", ""))) == []
    assert list(read_records(write(tmp_path / "a.json", "[]"))) == []


# What is refused, and how


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ('{"id": "b", "id": "c", "conversations": []}', "a key occurs twice"),
        ('{"id": "b", "score": NaN}', "NaN is not allowed"),
        ('{"id": "b", "score": -Infinity}', "-Infinity is not allowed"),
        ('{"id": "b", "deep": {"k": 1, "k": 1}}', "a key occurs twice"),
        ('{"id": "b", "conv', "is not valid JSON"),
        ('{"id": "b"} {"id": "c"}', "is not valid JSON"),
        ('{"k":' * 100_000, "is not valid JSON"),
        ('{"id": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("null", "is a NoneType, not an object"),
        ('"text"', "is a str, not an object"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path, one_line, bad, problem):
    path = write(tmp_path / "bad.jsonl", f"{one_line}\n\n{bad}\n")
    message = message_of(path)
    assert problem in message
    assert str(path) in message
    assert "line 3" in message or "record 3" in message
    assert "Fix: " in message


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_a_number_that_would_become_infinite_is_refused(tmp_path, one_line, number):
    path = write(tmp_path / "bad.jsonl", one_line[:-1] + f', "score": {number}}}\n')
    assert "line 1" in message_of(path)


def test_a_lone_surrogate_is_refused_when_read_because_it_cannot_be_written(tmp_path, one_line):
    path = write(tmp_path / "bad.jsonl", one_line[:-1] + ', "caption": "\\ud800"}\n')
    assert "line 1" in message_of(path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings_than_utf8_are_refused(tmp_path, encoding):
    path = write(tmp_path / "bad.jsonl", dump(record("é")).encode(encoding) + b"\n")
    message = message_of(path)
    assert f"{path} line 1" in message
    assert "is not valid JSON" in message


def test_records_before_a_bad_one_are_already_delivered(tmp_path, one_line):
    stream = read_records(write(tmp_path / "bad.jsonl", f"{one_line}\n{{\n"))
    assert next(stream)["id"] == "a"
    with pytest.raises(RecordError):
        next(stream)


def test_a_list_item_that_is_no_object_is_named_by_its_place(tmp_path, one_line):
    assert "record 2: is a list, not an object" in message_of(write(tmp_path / "bad.json", f"[{one_line}, []]"))


@pytest.mark.parametrize("identifier", [None, "", 1.5, True, ["a"]])
def test_a_missing_or_odd_id_is_refused_and_the_fix_is_the_command_that_numbers(tmp_path, identifier):
    path = write(tmp_path / "bad.json", json.dumps([record(), record(identifier)]))
    message = message_of(path)
    assert f"{path} record 2: field id is {identifier!r}" in message
    assert "python -m llava.records FILE --number --output OUT" in message


def test_a_record_without_the_id_field_is_refused(tmp_path):
    path = write(tmp_path / "bad.json", json.dumps([{"conversations": turns("a", "b")}]))
    assert "field id is None" in message_of(path)


@pytest.mark.parametrize(
    ("fields", "problem", "fix"),
    [
        ({"conversations": []}, "field conversations is missing or empty", '"from": "human"|"gpt"'),
        ({"conversations": None}, "field conversations is missing or empty", '"from": "human"|"gpt"'),
        ({"conversations": "hello"}, "field conversations is missing or empty", '"from": "human"|"gpt"'),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "conversations[0] has no known speaker", '"from"'),
        ({"conversations": [*turns("x"), {"value": "y"}]}, "conversations[1] has no known speaker", '"from"'),
        ({"conversations": ["x"]}, "conversations[0] has no known speaker", '"from"'),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "conversations[0] has no known speaker", '"from"'),
        ({"conversations": [{"from": "human"}]}, "conversations[0] has no text", '"value"'),
        ({"conversations": [{"from": "human", "value": 3}]}, "conversations[0] has no text", '"value"'),
        ({"image": ""}, "field image holds ''", "a path below the image folder"),
        ({"image": 3}, "field image holds 3", "a path below the image folder"),
        ({"image": ["a.jpg", None]}, "field image holds None", "a path below the image folder"),
    ],
)
def test_a_bad_field_is_named_with_record_and_fix(fields, problem, fix):
    with pytest.raises(RecordError) as refused:
        check_record({**record("r7"), **fields}, "data.json record 4")
    message = str(refused.value)
    assert message.startswith("data.json record 4, id 'r7': ")
    assert problem in message
    assert fix in message.split("Fix: ")[1]


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_a_path_that_is_no_file_is_named(tmp_path, name):
    assert f"{tmp_path / name}: is no file" in message_of(tmp_path / name)


def test_read_unique_refuses_the_second_record_of_an_id_even_as_integer(tmp_path):
    path = write(tmp_path / "twice.json", json.dumps([record("7"), record("8"), record(7)]))
    stream = read_unique(path)
    assert [next(stream)["id"], next(stream)["id"]] == ["7", "8"]
    with pytest.raises(RecordError, match="id '7' occurs twice"):
        next(stream)


# Fields


def test_messages_use_roles_whatever_the_record_calls_them():
    mixed = [{"from": "system", "value": "s"}, {"role": "user", "content": "q"}, {"from": "gpt", "value": "a"}]
    expected = [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert [(m["role"], m["content"]) for m in messages_of(record(conversations=mixed))] == expected
    assert question_of(record(conversations=mixed)) == "q"


def test_a_record_without_a_human_turn_has_no_question():
    with pytest.raises(RecordError, match="'a' has no human turn"):
        question_of(record(conversations=[{"from": "gpt", "value": "x"}]))


def test_images_of_none_one_and_several():
    assert images_of(record()) == []
    assert images_of(record(image="a.jpg")) == ["a.jpg"]
    assert images_of(record(image=["a.jpg", "b.jpg"])) == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("image", "texts", "problem", "fix"),
    [
        ("a.jpg", ("What?", "x"), "1 images but 0 <image>", "one <image> in the human turn"),
        ("a.jpg", ("<image>\nWhat? <image>", "x"), "1 images but 2 <image>", "one <image> in the human turn"),
        (["a.jpg", "b.jpg"], ("<image>\nWhat?", "x"), "2 images but 1 <image>", "one <image> in the human turn"),
        (None, ("<image>\nWhat?", "x"), "0 images but 1 <image>", "remove <image>, or add the image field"),
    ],
)
def test_too_few_or_too_many_placeholders(image, texts, problem, fix):
    with pytest.raises(RecordError) as refused:
        check_placeholders(record("r", image=image, conversations=turns(*texts)), "f.json record 1")
    assert problem in str(refused.value)
    assert fix in str(refused.value)
    assert "f.json record 1, id 'r'" in str(refused.value)


@pytest.mark.parametrize(
    ("image", "texts"),
    [
        (None, ("What?", "x")),
        ("a.jpg", ("<image>\nWhat?", "x")),
        (["a", "b"], ("<image>\nand", "x", "<image>?", "y")),
    ],
)
def test_matching_placeholders_pass(image, texts):
    check_placeholders(record(image=image, conversations=turns(*texts)), "f.json record 1")


def test_trainable_wants_alternating_speakers_and_one_answer():
    check_trainable(record(), "f")
    check_trainable(record(conversations=[{"from": "system", "value": "s"}, *turns("q", "a", "q", "")]), "f")
    for bad, problem in [
        (turns("q"), "speakers are"),
        (turns("q", "a", "q"), "speakers are"),
        (list(reversed(turns("q", "a"))), "speakers are"),
        ([{"from": "system", "value": "s"}], "speakers are"),
        (turns("q", "  \n"), "every answer is empty"),
    ]:
        with pytest.raises(RecordError, match=problem):
            check_trainable(record(conversations=bad), "f")


# Writing whole files


def test_written_records_are_read_back_equal(tmp_path):
    records = [record("a", caption='é "quoted"\n<tab>\t漢字 😀 \u2028'), record("b", scores=[0.5, 1e-9, -3])]
    path = tmp_path / "new" / "folder" / "a.jsonl"
    assert write_records(path, iter(records)) == 2
    assert list(read_records(path)) == records
    assert path.read_bytes().count(b"\n") == 2
    assert list(path.parent.iterdir()) == [path]


def test_a_generator_that_raises_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.jsonl"
    write_records(path, [record("old")])
    before = path.read_bytes()

    def breaks():
        yield record("new")
        raise OSError("the source failed")

    with pytest.raises(OSError, match="the source failed"):
        write_records(path, breaks())
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_nan_is_not_written_and_the_old_file_stays(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"score": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"score": float("nan")})
    assert json.loads(path.read_text()) == {"score": 1.0}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_the_rejected_file_stands_beside_the_output():
    assert rejected_path("runs/x/cod.jsonl") == Path("runs/x/cod.rejected.jsonl")
    assert rejection(record("a"), "too dark", reply="?") == {"id": "a", "reason": "too dark", "reply": "?"}


# Growing files


def test_a_file_torn_at_any_byte_of_its_last_record_continues_with_the_records_before(tmp_path):
    first, last = record("a", caption="é\u2028"), record("b", caption="漢字")
    whole = (dump(first) + "\n" + dump(last) + "\n").encode()
    begin = whole.index(b"\n") + 1
    path = tmp_path / "a.jsonl"
    for size in range(begin, len(whole) + 1):
        path.write_bytes(whole[:size])
        with RecordAppender(path) as appender:
            appender.append(record("c"))
        expected = ["a", "b", "c"] if size == len(whole) else ["a", "c"]
        assert [row["id"] for row in read_jsonl(path)] == expected, f"cut after {size} bytes"


def test_a_torn_line_longer_than_one_block_is_cut(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"id": "a"}\n' + b"x" * 200_000)
    with RecordAppender(path):
        pass
    assert path.read_bytes() == b'{"id": "a"}\n'


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path):
    path = write(tmp_path / "a.jsonl", b"x" * 70_000)
    with RecordAppender(path):
        pass
    assert path.read_bytes() == b""


def test_every_append_can_be_read_at_once_by_another(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    assert list(read_jsonl(path)) == []
    with RecordAppender(path) as appender:
        for count in range(1, 4):
            appender.append({"id": str(count)})
            assert len(list(read_jsonl(path))) == count


def test_a_growing_file_is_read_without_the_line_that_is_still_being_written(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"id": "a"}\n{"id": "b"}\n{"id": "c"}')
    assert [row["id"] for row in read_jsonl(path)] == ["a", "b"]
    write(path, '{"id": "a"}\n{"id": \n{"id": "c"}\n')
    with pytest.raises(RecordError, match="line 2"):
        list(read_jsonl(path))


WRITER = """
import sys
from llava.records import RecordAppender
with RecordAppender(sys.argv[1]) as appender:
    for number in range(1_000_000):
        appender.append({"id": str(number), "text": "x" * 3000})
        if number >= 50:
            print(number, flush=True)
"""


def test_a_killed_process_loses_at_most_the_record_it_was_writing(tmp_path):
    path = tmp_path / "a.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    announced = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    rest = writer.stdout.read().split("\n")
    writer.stdout.close()
    assert writer.wait() == -signal.SIGKILL
    announced = max([announced, *(int(line) for line in rest[:-1] if line)])
    with RecordAppender(path) as appender:
        appender.append({"id": "resumed"})
    identifiers = [row["id"] for row in read_jsonl(path)]
    assert identifiers[-1] == "resumed"
    assert identifiers[:-1] == [str(number) for number in range(len(identifiers) - 1)]
    assert len(identifiers) - 1 >= announced + 1  # every announced record is there


# The command


def run_records(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llava.records", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=60, check=False)


def test_the_command_counts_valid_records_and_reports_the_first_bad_one(tmp_path):
    good = write(tmp_path / "good.json", json.dumps([record("a"), record("b")]))
    bad = write(tmp_path / "bad.json", json.dumps([record("a"), record("a")]))
    result = run_records(good, bad)
    assert result.returncode == 2
    assert result.stdout == f"{good}: 2 records, all valid, ids unique\n"
    assert result.stderr.startswith(f"error: {bad}: id 'a' occurs twice")
    assert "Traceback" not in result.stderr


def test_the_command_numbers_records_without_ids(tmp_path):
    source = write(tmp_path / "source.json", json.dumps([{"conversations": turns("q", "a")}, record("x", image="i")]))
    numbered = tmp_path / "numbered.jsonl"
    result = run_records(source, "--number", "--output", numbered)
    assert (result.returncode, result.stdout) == (0, f"2 records in {numbered}\n")
    expected = [{"conversations": turns("q", "a"), "id": "source-1"}, record("source-2", image="i")]
    assert list(read_unique(numbered)) == expected


def test_numbering_files_of_the_same_name_still_gives_unique_ids(tmp_path):
    paths = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder / "data.json", json.dumps([record(None)])))
    numbered = tmp_path / "numbered.jsonl"
    assert run_records(*paths, "--number", "--output", numbered).returncode == 0
    assert len(list(read_unique(numbered))) == 2


def test_numbering_something_that_is_no_record_is_one_sentence(tmp_path):
    source = write(tmp_path / "source.json", json.dumps([["not", "a", "record"]]))
    result = run_records(source, "--number", "--output", tmp_path / "numbered.jsonl")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "numbered.jsonl").exists()


def test_a_folder_of_images_becomes_records_in_the_order_of_their_paths(tmp_path):
    photos = tmp_path / "photos"
    (photos / "b").mkdir(parents=True)
    for name in ("b/2.JPG", "b/1.png", "a.webp", "b/notes.txt"):
        (photos / name).write_bytes(b"x")
    output = tmp_path / "records.jsonl"
    result = run_records("--from_folder", photos, "--question", "What is it?", "--output", output)
    assert (result.returncode, result.stdout) == (0, f"3 records in {output}; their image folder is {photos}\n")
    records = list(read_unique(output))
    assert [item["image"] for item in records] == ["a.webp", "b/1.png", "b/2.JPG"]
    assert records[0]["conversations"] == [{"from": "human", "value": "<image>\nWhat is it?"}]
    for item in records:
        check_placeholders(item, "records.jsonl")


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(RecordError, match=r"holds no image \(\.jpg, "):
        records_of_folder(tmp_path, "q")
    with pytest.raises(RecordError, match="is no folder"):
        records_of_folder(tmp_path / "absent", "q")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "give record files, or --from_folder FOLDER"),
        (("a.json", "--from_folder", "."), "give record files, or --from_folder FOLDER"),
        (("a.json", "--number"), "--output is missing"),
    ],
)
def test_incomplete_commands_say_what_is_missing(arguments, problem):
    result = run_records(*arguments)
    assert result.returncode == 2
    assert problem in result.stderr
