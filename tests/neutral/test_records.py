"""Data files as records: the scanner, the index beside a file, and the forms of a record."""

import io
import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unillava.data.forms import map_media, measure, read_parts, to_request
from unillava.data.index import index_places, open_index
from unillava.data.records import IMAGE, TEXT, VIDEO, Records, open_records
from unillava.data.request import normalise
from unillava.data.scan import Damage, Found, line_and_column, lines_of, scan
from unillava.errors import DataError, RequestError

JSON = {"max_leaves": 12}
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text(max_size=12)
    | st.sampled_from(['"', "\\", "[{]},:", "\\u00e9", "\x7f\x85\u2028", "가나다 😀", "\\\\\\"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    **JSON,
)
objects = st.dictionaries(st.text(max_size=4), values, max_size=4)
chunks = st.sampled_from([1, 2, 3, 7, 16, 17, 64, 1000])
layouts = st.fixed_dictionaries(
    {"indent": st.sampled_from([None, 0, 2]), "ensure_ascii": st.booleans()}
)
bom = st.sampled_from([b"", b"\xef\xbb\xbf"])


def scanned(data, chunk=1 << 20, **options):
    return list(scan(io.BytesIO(data), chunk=chunk, **options))


def encoded(text):
    return text.encode("utf-8", "surrogatepass")


# --- the scanner -----------------------------------------------------------------------------


@given(st.lists(values, max_size=6), layouts, chunks, bom, st.sampled_from(["", " \n", "\r\n\t"]))
@settings(max_examples=60, deadline=None)
@example([1.5e300, -2.5, 10**30], {"indent": None, "ensure_ascii": True}, 1, b"", "")
def test_arrays_are_cut_into_their_elements(records, layout, chunk, mark, around):
    text = around + json.dumps(records, **layout) + around
    data = mark + encoded(text)
    try:
        data.decode()
    except UnicodeDecodeError:
        return  # half characters cannot be written as they are
    found = scanned(data, chunk)
    assert [item.value for item in found] == records
    for item, record in zip(found, records, strict=True):
        assert json.loads(data[item.start : item.end]) == record
        assert data[item.start : item.end].strip() == data[item.start : item.end]


@given(
    st.lists(objects, min_size=1, max_size=6),
    layouts,
    chunks,
    bom,
    st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_lines_are_cut_into_objects(records, layout, chunk, mark, line_end, ends):
    text = line_end.join(json.dumps(record, **layout) for record in records) + line_end * ends
    data = mark + encoded(text)
    try:
        data.decode()
    except UnicodeDecodeError:
        return
    found = scanned(data, chunk)
    assert [item.value for item in found] == records
    assert all(json.loads(data[item.start : item.end]) == item.value for item in found)


INSERTED = [b"\0\0\0", b'"', b"{", b"]", b",", b"\xff", b"\\", b"\n"]


def damaged(data, random_):
    """The data with one thing done to it that happens to files."""
    data = bytearray(data)
    place = random_.randrange(len(data))
    what = random_.randrange(4)
    if what == 0:
        return bytes(data[:place])
    if what == 1:
        data[place] = random_.randrange(256)
    elif what == 2:
        del data[place : place + random_.randrange(1, 9)]
    else:
        data[place:place] = random_.choice(
            [b"\0\0\0", b'"', b"{", b"]", b",", b"\xff", b"\\", b"\n"]
        )
    return bytes(data)


@given(st.lists(objects, min_size=1, max_size=5), layouts, chunks, st.booleans(), st.randoms())
@settings(max_examples=80, deadline=None)
def test_damaged_files(records, layout, chunk, is_array, random_):
    """Whatever is wrong: no crash, whole records only, the same in chunks of any size."""
    layout = layout | {"ensure_ascii": True}
    if is_array:
        whole = json.dumps(records, **layout)
    else:
        whole = "\n".join(json.dumps(record, **layout) for record in records)
    data = damaged(whole.encode(), random_)
    found = scanned(data, chunk)
    assert repr(found) == repr(scanned(data))
    before = 0
    for item in found:
        if isinstance(item, Damage):
            assert 0 <= item.start <= item.offset <= len(data)
            assert item.records == before
            line, column = line_and_column(io.BytesIO(data), item.offset)
            assert line == data[: item.offset].count(b"\n") + 1
            assert column >= 1
        else:
            before += 1
            # A number with a decimal point cut off is another number: compare what is written.
            assert repr(json.loads(data[item.start : item.end])) == repr(item.value)
    try:
        expected = json.loads(data.decode("utf-8-sig"))
    except ValueError:
        expected = None
    if is_array and isinstance(expected, list):
        assert repr([item.value for item in found]) == repr(expected)
    elif is_array and data.lstrip().startswith(b"["):
        assert any(isinstance(item, Damage) for item in found)


def test_thousands_of_files():
    """Cheap and wide, beside the properties."""
    random_ = random.Random(0)
    pieces = [
        1,
        -2.5,
        1e300,
        10**30,
        True,
        None,
        "a",
        "é가😀",
        'q"\\/\b\n',
        "[{]},:",
        "\x7f\x85\u2028",
    ]

    def value(depth=0):
        kind = random_.random()
        if depth > 3 or kind < 0.5:
            return random_.choice(pieces)
        if kind < 0.75:
            return [value(depth + 1) for _ in range(random_.randrange(4))]
        keys = [random_.choice('abcé"\\{') * n for n in range(random_.randrange(4))]
        return {key: value(depth + 1) for key in keys}

    for n in range(2000):
        records = [{"v": value()} for _ in range(random_.randrange(1, 6))]
        layout = {"indent": random_.choice([None, 0, 2]), "ensure_ascii": n % 3 == 0}
        if n % 2:
            data = json.dumps(records, **layout).encode()
        else:
            data = "\n".join(json.dumps(record, **layout) for record in records).encode()
        found = scanned(data, random_.choice([1, 3, 17, 100]))
        assert [item.value for item in found] == records
        assert all(json.loads(data[item.start : item.end]) == item.value for item in found)


def test_thousands_of_damaged_files():
    """Cheap and wide, beside the property: every single cut, and random changes."""
    records = [
        {"id": n, "image": "a.jpg", "conversations": [{"from": "human", "value": 'é "q" \\ \n'}]}
        for n in range(4)
    ]
    array = json.dumps(records, indent=1).encode()
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()
    for data in (array, lines):
        for end in range(len(data)):
            found = scanned(data[:end], 64)
            whole = [item.value for item in found if isinstance(item, Found)]
            assert whole == records[: len(whole)]
            # Lines that were cut off between two of them are whole.
            ends_whole = data is lines and data[end : end + 1] == b"\n" and end
            after_line_end = data is lines and data[:end].endswith(b"\n")
            assert ends_whole or after_line_end or isinstance(found[-1], Damage)
    random_ = random.Random(0)
    for n in range(3000):
        data = damaged((array, lines)[n % 2], random_)
        for item in scanned(data, random_.choice([5, 50, 5000])):
            assert isinstance(item, Damage | Found)


def test_lines_go_on_behind_a_damage():
    good = json.dumps({"id": 1})
    data = f'{good}\n{{"id": 2, "va\n{good}\n{good} rest\n{good}\n{{"id": \n'.encode()
    found = scanned(data)
    assert [isinstance(item, Damage) for item in found] == [False, True, False, True, False, True]
    damages = [item for item in found if isinstance(item, Damage)]
    assert [damage.records for damage in damages] == [1, 2, 3]
    assert "behind a record" in damages[1].problem
    assert "ends inside a record" in damages[2].problem


def test_an_array_goes_on_behind_a_record_that_is_not_utf_8():
    data = b'[{"id": 1}, {"id": "\xb0\xa1"}, {"id": 3}]'
    first, broken, last = scanned(data)
    assert (first.value, last.value) == ({"id": 1}, {"id": 3})
    assert "not UTF-8" in broken.problem
    assert data[broken.offset] == 0xB0


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b'[{"id": 1}, {"id"', "ends inside a record"),
        (b'[{"id": 1}, {"id": "abc', "ends inside a record"),
        (b'[{"id": 1}, {"id": "\\u12', "ends inside a record"),
        (b'[{"id": 1}, {"id": tr', "ends inside a record"),
        (b'[{"id": 1},', "ends inside the array"),
        (b'[{"id": 1}', "ends inside the array"),
        (b'[{"id": 1} {"id": 2}]', "Expecting ',' or ']'"),
        (b'[{"id": 1}] x', "behind the end of the array"),
        (b'[{"id": 1}, {"id": x}]', "Expecting value"),
        (b'[{"id": 1}, {id: 1}]', "property name"),
        (b'[{"id": 1}, \0\0\0\0', "null bytes"),
        (b'[{"a": "b\nc"}]', "Invalid control character"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[" + b"9" * 10_000 + b"]", "Exceeds the limit"),
        ('[{"id": 1}]'.encode("utf-16"), "UTF-16"),
        (b"\x1f\x8b\x08\x00", "compressed"),
        (b"PK\x03\x04xxxx", "zip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"<!DOCTYPE html><html>", "web page"),
        ("아".encode(), "begins with '아'"),
        (b"id,image\n1,a.jpg", "begins with 'i'"),
    ],
)
def test_what_is_said_about_a_damage(data, told):
    *_, damage = scanned(data)
    assert told in damage.problem


def test_a_string_that_never_ends_is_not_read_into_memory():
    data = b'[{"id": "' + b"x" * 5000
    (damage,) = scanned(data, chunk=64, largest=1000)
    assert "never ends" in damage.problem
    lines = b'{"id": "' + b"x" * 5000 + b'\n{"id": 1}\n'
    broken, good = scanned(lines, chunk=64, largest=1000)
    assert isinstance(broken, Damage)
    assert good.value == {"id": 1}


def test_lines_and_columns_are_those_of_an_editor():
    text = "[\n  가나{\r\n\n]"
    for mark in (b"", b"\xef\xbb\xbf"):
        data = mark + text.encode()
        places = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (2, 4), (2, 5), (2, 6), (2, 7), (3, 1)]
        for character, place in enumerate(places):
            offset = len(mark + text[:character].encode())
            assert line_and_column(io.BytesIO(data), offset) == place
    assert lines_of(io.BytesIO(b"a\nb\n\nc"), [0, 1, 2, 2, 5]) == [1, 1, 2, 2, 4]


# --- the index -------------------------------------------------------------------------------


def llava(n, text="Q", **media):
    turns = [("human", f"<image>\n{text}" if media else text), ("gpt", f"answer {n}")]
    return {
        "id": n,
        **media,
        "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
    }


RECORDS = [
    llava(0, image="a/0.jpg"),
    llava(1, "no picture"),
    llava(2, "한국어 질문", image="a/2.jpg"),
    llava(3, video="v.mp4"),
    {"image": "x.jpg", "conversations": [["<image>\nWhat?", "A cat."]]},
    {"something": "else"},
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def test_records_are_those_of_the_file(data):
    records = open_records(data)
    assert list(records) == RECORDS
    assert (records[-1], records[np.int64(0)]) == (RECORDS[-1], RECORDS[0])
    with pytest.raises(IndexError):
        records[6]
    assert records.modality.tolist() == [IMAGE, TEXT, IMAGE, VIDEO, IMAGE, TEXT]
    assert records.images.tolist() == [1, 0, 1, 0, 1, 0]
    assert records.videos.tolist() == [0, 0, 0, 1, 0, 0]
    assert records.words.tolist() == [4, 4, 5, 4, 4, 0]
    assert records.modality_lengths.tolist() == [4, -4, 5, 4, 4, -1]
    assert records.characters[1] == len("no picture") + len("answer 1")
    assert records.where(2) == "data.json record 2 (line 29)"
    assert data.read_text().splitlines()[28].strip() == "{"


def test_words_are_counted_as_llavas_sampler_does(data):
    for record, words in zip(RECORDS[:4], open_records(data).words, strict=False):
        assert words == sum(len(turn["value"].split()) for turn in record["conversations"])


def test_the_index_is_made_once_and_anew_when_the_file_changes(data, monkeypatch):
    made = []
    monkeypatch.setattr("unillava.data.index.scan", lambda file: made.append(1) or scan(file))
    open_records(data)
    open_records(data)
    assert len(made) == 1
    status = os.stat(data)
    longer = [*RECORDS, llava(6)]
    data.write_text(json.dumps(longer))
    assert list(open_records(data)) == longer
    assert len(made) == 2
    # Another content of the same size and time: the samples tell.
    data.write_text(json.dumps(longer).replace("answer", "ANSWER"))
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
    first = open_records(data)
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
    data.write_text(json.dumps(longer).replace("answer", "AnSwEr"))
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = open_records(data)
    assert first.files[0].index.identity[:2] == second.files[0].index.identity[:2]
    assert "AnSwEr" in json.dumps(second[0])


@pytest.mark.parametrize("content", [b"", b"{}", b"x" * 100, None])
def test_a_broken_index_is_made_anew(data, content):
    open_records(data)
    (place,) = [place for place in index_places(data) if place.exists()]
    whole = place.read_bytes()
    place.write_bytes(whole[:-5] if content is None else content)
    assert list(open_records(data)) == RECORDS
    assert place.read_bytes() == whole


def test_a_folder_that_cannot_be_written(data, tmp_path, monkeypatch):
    monkeypatch.setenv("UNILLAVA_CACHE", str(tmp_path / "cache"))
    beside, elsewhere = index_places(data)
    beside.mkdir()  # nothing can be written under that name
    assert list(open_records(data)) == RECORDS
    assert elsewhere.parent == tmp_path / "cache"
    assert elsewhere.exists()
    elsewhere.unlink()
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="index of a data file cannot be written") as caught:
        open_records(data)
    assert "UNILLAVA_CACHE" in str(caught.value)


def test_nothing_half_written_is_left(data, monkeypatch):
    def fails(file):
        yield from list(scan(file))[:2]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unillava.data.index.scan", fails)
    monkeypatch.setenv("UNILLAVA_CACHE", str(data.parent / "cache"))
    with pytest.raises(DataError, match="No space left"):
        open_records(data)
    assert sorted(path.name for path in data.parent.rglob("*")) == ["cache", "data.json"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('[{"id": 1},\n {"id": 2,\n  "x": oops}]', r"data.json, line 3, column 8 \(record 1\)"),
        ('[{"id": 1},\n {"id": "cut o', r"line 2, column 15 \(record 1\): the file ends inside"),
        ("", "the file is empty"),
        (b'[{"id": "\xb0\xa1"}]', "line 1, column 10 .* not UTF-8"),
    ],
)
def test_damaged_files_are_refused_with_line_and_column(tmp_path, content, told):
    path = tmp_path / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for _ in range(2):  # the second time from the index
        with pytest.raises(DataError, match=told) as caught:
            open_records(path)
    assert "unillava data check" in str(caught.value)
    records = open_records(path, allow_damage=True)
    assert len(records) == content.count('"id": 1' if isinstance(content, str) else b"none")


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            open_records(path)
    with pytest.raises(DataError, match="no data file"):
        open_records([])


def test_a_file_that_changes_meanwhile_is_noticed(data):
    records = open_records(data)
    travelled = pickle.loads(pickle.dumps(records))
    data.write_text(json.dumps(RECORDS[:2]))
    with pytest.raises(DataError, match="changed since"):
        travelled[0]
    with pytest.raises(DataError, match="changed since"):
        records[5]


def test_mixtures(tmp_path, data):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps(llava(n)) for n in range(100, 110)))
    joined = Records.join([open_records(data).take([3, 0]), open_records(other)])
    assert [record["id"] for record in joined] == [3, 0, *range(100, 110)]
    assert joined.modality.tolist() == [VIDEO, IMAGE] + [TEXT] * 10
    chosen = joined.take([11, 0, 0])
    assert [record["id"] for record in chosen] == [109, 3, 3]
    assert chosen.where(0) == "other.jsonl record 9 (line 10)"
    assert chosen.places([2, 0]) == [
        "data.json record 3 (line 43)",
        "other.jsonl record 9 (line 10)",
    ]
    assert Records.join([joined, open_records(other)])[-1]["id"] == 109
    both = open_records([data, other])
    assert len(both) == 16
    assert both[6]["id"] == 100
    braces = open_records(f"{tmp_path}/{{data.json,other.jsonl}}")
    assert list(braces) == list(both)


def _read(records, numbers, queue):
    queue.put([records[number]["id"] for number in numbers])


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_records_in_worker_processes(data, method):
    records = open_records(data).take([2, 1, 0])
    assert records[0]["id"] == 2  # the file is open now
    assert len(pickle.dumps(records)) < 2000
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=_read, args=(records, [n, 0], queue)) for n in range(3)]
    for worker in workers:
        worker.start()
    answers = sorted(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert answers == [[0, 2], [1, 2], [2, 2]]


MAKE = "import sys; from unillava.data.index import open_index; open_index(sys.argv[1])"


def test_several_processes_make_one_index(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(llava(n)) + "\n" for n in range(20000)))
    processes = [subprocess.Popen([sys.executable, "-c", MAKE, str(path)]) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".data.jsonl.unillava-index",
        "data.jsonl",
    ]
    assert open_records(path)[19999]["id"] == 19999


MEASURE = """
import sys
from backends.process import peak_resident_bytes
from unillava.data.records import open_records
before = peak_resident_bytes()
records = open_records(sys.argv[1])
records.modality_lengths
made = peak_resident_bytes()
for number in range(0, len(records), 50):
    records[number]
print(len(records), made - before, peak_resident_bytes() - made)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    """A file of 60 MB is indexed and read in far less."""
    path = tmp_path / "data.json"
    record = json.dumps(llava(0, "word " * 400, image="a.jpg"))
    path.write_text("[" + ", ".join([record] * 30000) + "]")
    taken = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
        )
        count, *found = map(int, done.stdout.split())
        assert count == 30000
        taken.append(found)
    (first, _), (second, read) = taken
    assert 0 < first < 45e6
    assert second < 5e6
    assert read < 3e6


# --- forms -----------------------------------------------------------------------------------


def messages_of(request):
    return [(message["role"], message["content"]) for message in request["messages"]]


def test_every_form_gives_the_same_request(tmp_path):
    asked, answer = "<image>\nWhat is it?", "A cat."
    tags = "<|reserved_special_token_3|>{}<|reserved_special_token_4|>"
    keys = [("from", "human", "gpt", "value"), ("role", "user", "assistant", "content")]
    keys += [("from", "user", "assistant", "value")]
    forms = [
        {"conversations": [{key: user, text: asked}, {key: assistant, text: answer}]}
        for key, user, assistant, text in keys
    ]
    forms += [{"conversations": [[asked, answer]]}, {"messages": forms[1]["conversations"]}]
    expected = [("user", asked), ("assistant", answer)]
    for form in forms:
        for media in ({"image": "a.jpg"}, {"image": ["a.jpg"]}, {"images": ["a.jpg"]}):
            request, name = to_request({"id": 7, **media, **form}, ("folder",))
            assert messages_of(request) == expected
            assert request["images"] == [os.path.join("folder", "a.jpg")]
            assert (request["videos"], name) == ([], 7)
            assert measure({**media, **form})[0] == 6
    processed = {
        "conversations": [
            {"from": "human", "value": tags.format("/data/a.jpg") + asked},
            {"from": "gpt", "value": "<text>" + answer},
        ]
    }
    request, name = to_request(processed, ("folder",))
    assert (messages_of(request), request["images"], name) == (expected, ["/data/a.jpg"], None)


def test_mindformers_files():
    tags = ("<|reserved_special_token_3|>", "<|reserved_special_token_4|>")
    value = f"{tags[0]}r/a.jpg{tags[1]}{tags[0]}r/b.png{tags[1]}<image>\n<image> differ?"
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "<text>In <text>."}]
    parts = read_parts({"conversations": turns})
    assert parts.images == ["r/a.jpg", "r/b.png"]
    assert parts.turns == [("user", "<image>\n<image> differ?"), ("assistant", "In <text>.")]
    # Its training loses every <text>.
    request, _ = to_request({"conversations": turns}, placement="mindformers")
    assert request["messages"][1]["content"] == "In ."
    video = {"conversations": [{"from": "human", "value": f"{tags[0]}v.MP4{tags[1]}<image>\nQ"}]}
    request, _ = to_request(video)
    assert (request["images"], request["videos"]) == ([], ["v.MP4"])
    assert request["messages"][0]["content"] == "<video>\nQ"
    text = {"conversations": [{"from": "human", "value": f"{tags[0]}{tags[1]}Q"}]}
    assert to_request(text)[0] == {
        "messages": [{"role": "user", "content": "Q"}],
        "images": [],
        "videos": [],
    }


def test_video_178k():
    """Its videos are asked for with `<image>`."""
    record = {
        "id": "v_1-7",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat happens?"},
            {"from": "gpt", "value": "Somebody dances."},
        ],
        "data_source": "0_30_s_academic_v0_1",
        "video": "academic_source/activitynet/v_1.mp4",
    }
    request, name = to_request(record, ("videos",))
    assert name == "v_1-7"
    messages, images, videos = normalise(request)
    assert (images, videos) == ([], [os.path.join("videos", record["video"])])
    assert messages[0]["content"][0] == {"type": "video"}


def first_turn(text, placement, **media):
    record = {"conversations": [[text, "A"]], **media}
    return to_request(record, placement=placement)[0]["messages"][0]["content"]


ONE, TWO = {"image": "a.jpg"}, {"image": ["a.jpg", "b.jpg"]}
# What the original systems make of a question, by section 3.3 of the PyTorch and A3 and B3 of
# the other reference.
PLACED = [
    ("Q\n<image>", ONE, {"llava": "<image>\nQ", "nx": "<image>\nQ", "mindformers": "<image> \nQ"}),
    ("<image>Q", ONE, {"llava": "<image>\nQ", "nx": "<image>Q", "mindformers": "<image> Q"}),
    ("<image>\nQ", ONE, {"llava": "<image>\nQ", "nx": "<image>\nQ", "mindformers": "<image> \nQ"}),
    ("a <image> b", ONE, {"llava": "<image>\na  b", "nx": "<image>\na  b"}),
    ("<image>", ONE, {"llava": "<image>", "nx": "<image>", "mindformers": "<image> "}),
    ("a <image> <image>", TWO, {"llava": "<image>\na", "nx": "a <image> <image>"}),
    ("QA_GT_caption_based_noisyQ <image>", ONE, {"nx": "<image>\nQA_GT_caption_based_noisyQ"}),
    ("Q <image>", {}, {"llava": "Q <image>", "nx": "Q <image>", "mindformers": "Q <image>"}),
]


@pytest.mark.parametrize(("text", "media", "expected"), PLACED)
def test_placements(text, media, expected):
    assert first_turn(text, "keep", **media) == text
    assert first_turn(text, "paddlemix", **media) == text
    for placement, placed in expected.items():
        placed = placed.replace("QA_GT_caption_based_noisy", "")
        assert first_turn(text, placement, **media) == placed


@given(
    st.lists(st.sampled_from(["<image>", "Q", " ", "\n", "가"]), max_size=8).map("".join),
    st.integers(0, 1),
)
@settings(max_examples=80, deadline=None)
def test_placements_by_the_original_rules(text, turn):
    """The rules written anew as plain code, for a first and a later question."""
    count = text.count("<image>")
    moved = ("<image>\n" + text.replace("<image>", "").strip()).strip()
    expected = {
        "keep": text,
        "llava": moved if count else text,
        "nx": moved if count == 1 and not text.startswith("<image>") else text,
    }
    alone = moved if count == 1 and not text.startswith("<image>") and turn == 0 else text
    expected["mindformers"] = alone.replace("<image>", "<image> ")
    pairs = [["first", "A"]] * turn + [[text, "B"]]
    for placement, placed in expected.items():
        request, _ = to_request({"image": "a", "conversations": pairs}, placement=placement)
        assert request["messages"][2 * turn]["content"] == placed


def test_first_turns_that_are_not_the_users():
    system, user, assistant = (
        {"from": speaker, "value": speaker} for speaker in ("system", "human", "gpt")
    )

    def roles(*turns):
        return [m["role"] for m in to_request({"conversations": list(turns)})[0]["messages"]]

    assert roles(assistant, user, assistant) == ["user", "assistant"]
    assert roles(system, assistant, user) == ["system", "user"]
    assert roles(system, user, assistant) == ["system", "user", "assistant"]
    assert roles(assistant) == []


def test_where_media_are_found(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.jpg").write_bytes(b"")
    folders = (str(tmp_path / "a"), str(tmp_path / "b"))
    sources = ["x.jpg", "none.jpg", "http://h/x.jpg", "data:image/png;base64,", "/abs/x.jpg"]
    request, _ = to_request({"image": sources, "conversations": [["Q", "A"]]}, folders)
    assert request["images"] == [
        str(tmp_path / "b" / "x.jpg"),
        str(tmp_path / "a" / "none.jpg"),
        *sources[2:],
    ]
    own = {"image": "x.jpg", "image_root": "/root", "conversations": [["Q", "A"]]}
    assert to_request(own, folders)[0]["images"] == ["/root/x.jpg"]
    parts = [{"type": "image", "image": "x.jpg"}, {"type": "text", "text": "Q"}, {"type": "image"}]
    request, _ = to_request(
        {"messages": [{"role": "user", "content": parts}], "image": "y.jpg"}, ("f",)
    )
    assert normalise(request)[1] == ["f/x.jpg", "f/y.jpg"]
    assert measure({"messages": [{"role": "user", "content": parts}]}) == (1, 1, 2, 0)


def test_by_default_media_lie_beside_the_file_or_in_the_working_directory(
    tmp_path, data, monkeypatch
):
    records = open_records(data)
    assert records.request(0)[0]["images"] == [str(tmp_path / "a/0.jpg")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    deep = tmp_path / "deep" / "data.json"
    deep.write_text(json.dumps(RECORDS))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.jpg").write_bytes(b"")
    assert os.path.samefile(open_records(deep).request(0)[0]["images"][0], tmp_path / "a/0.jpg")
    there = open_records(deep, image_folder="elsewhere").request(0)[0]["images"]
    assert there == ["elsewhere/a/0.jpg"]


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (17, "no conversation"),
        ({}, "no conversation"),
        ({"conversations": []}, "no conversation"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, r"conversations\[0\]"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, r"conversations\[0\]"),
        ({"conversations": [{"from": "human", "value": 3}]}, r"conversations\[0\]"),
        ({"conversations": [["Q", "A"], ["R"]]}, r"conversations\[1\]"),
        ({"conversations": [["Q", "A"], "R"]}, r"conversations\[1\]"),
        ({"conversations": [["Q", "A"]], "image": 5}, "no path"),
        ({"conversations": [["Q", "A"]], "image": ["a", None]}, "no path"),
        ({"conversations": [["Q", "A"]], "video": {"path": "v"}}, "no path"),
    ],
)
def test_records_that_cannot_be_understood(tmp_path, record, told):
    with pytest.raises(RequestError, match=told):
        to_request(record)
    assert measure(record) == (0, 0, 0, 0)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([llava(0), record]))
    records = open_records(path)
    with pytest.raises(RequestError, match=r"data.json record 1 \(line 1\): .*" + told):
        records.request(1)


@given(values)
@settings(max_examples=80, deadline=None)
def test_no_json_makes_the_forms_crash(value):
    for record in (value, {"conversations": value}, {"messages": value}, {"image": value}):
        measure(record)
        map_media(record, lambda source: source)
        try:
            request, _ = to_request(record)
            normalise(request)
        except RequestError:
            pass


def test_an_unknown_placement():
    with pytest.raises(RequestError, match="no such placement"):
        to_request(llava(0), placement="front")


def test_map_media_reaches_every_form():
    def change(source):
        return source.upper()

    assert map_media(llava(0, image="a"), change)["image"] == "A"
    assert map_media({"images": ["a", "b"], "video": "c"}, change) == {
        "images": ["A", "B"],
        "video": "C",
    }
    tagged = "<|reserved_special_token_3|>a<|reserved_special_token_4|>a"
    changed = map_media({"conversations": [{"from": "human", "value": tagged}]}, change)
    assert changed["conversations"][0]["value"] == tagged.replace(">a<", ">A<")
    parts = [{"type": "image", "image": "a"}, {"type": "text", "text": "a"}]
    changed = map_media({"messages": [{"role": "user", "content": parts}]}, change)
    assert changed["messages"][0]["content"] == [parts[0] | {"image": "A"}, parts[1]]


def test_the_index_of_a_large_record_count(tmp_path):
    """More rows than are written at a time."""
    path = tmp_path / "data.jsonl"
    count = (1 << 16) + 10
    path.write_text("".join(f'{{"id": {n}}}\n' for n in range(count)))
    told = []
    index = open_index(path, told.append)
    assert len(index.rows) == count
    assert 0 <= path.stat().st_size - sum(told) <= 1 << 20
    records = open_records(path)
    assert [records[n]["id"] for n in (0, 65535, 65536, count - 1)] == [0, 65535, 65536, count - 1]
