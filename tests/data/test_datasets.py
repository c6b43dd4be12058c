"""Data sources: examples read from valid files, and one-line errors for invalid ones."""

import csv
import gzip
import json
import os
import pickle
import re
from collections import Counter
from pathlib import Path

import pytest

from common.data import sources
from common.data.sources import Example, delimited, dlstudio, files
from common.errors import InputError
from tests import ROOT
from tools import fuzz_datasets

SHARED = ROOT / "../shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs {SHARED}")


def read(spec: object) -> list[Example]:
    """The examples, which a second reading repeats."""
    dataset = sources.load(str(spec))
    examples = list(dataset.examples())
    assert list(dataset.examples()) == examples
    assert all(example.label in dataset.classes for example in examples) or not dataset.classes
    return examples


def read_error(spec: object) -> str:
    """The message of the error that the source raises; one line."""
    with pytest.raises(InputError) as error:
        sources.fingerprint(str(spec))
        list(sources.load(str(spec)).examples())
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------ specs


@pytest.mark.parametrize(("spec", "size"), [("imdb", 25_000), ("rt", 8_530)])
def test_movie_reviews_have_two_balanced_classes(spec: str, size: int) -> None:
    labels = Counter(example.label for example in sources.load(spec).examples())
    assert labels == {"negative": size // 2, "positive": size // 2}


def test_unknown_source_error_lists_the_sources() -> None:
    for spec in ("imbd", "csw:file.csv", "csv", "imdb:x"):
        message = read_error(spec)
        assert message.startswith(f"--data {spec}: no such data set; expected one of imdb, rt, ")
        assert all(f"{kind}:" in message for kind in ("amazon", "dlstudio", "csv", "text", "hf"))


def test_invalid_specs_are_rejected(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("text,label\na,b\n")
    assert "none.csv: no such file or directory" in read_error(f"csv:{tmp_path}/none.csv")
    assert f"{tmp_path}/b.csv: no such" in read_error(f"csv:{table},{tmp_path}/b.csv")
    assert "no such file" in read_error(f"amazon:{tmp_path}/none")
    assert "expected one or two paths" in read_error(f"csv:{table},{table},{table}")
    assert "expected one or two paths" in read_error("csv:")
    assert "expected one path" in read_error(f"text:{tmp_path},{tmp_path}")
    assert "expected two archives" in read_error(f"dlstudio:{table}")
    assert "txt=b: expected OPTION=VALUE with one of text, label," in read_error(
        f"csv:{table}?txt=b"
    )
    assert "encoding=x: expected OPTION=" in read_error(f"jsonl:{table}?encoding=x")
    assert "text: expected OPTION=VALUE" in read_error(f"csv:{table}?text")
    assert "header=maybe: expected yes or no" in read_error(f"csv:{table}?header=maybe")
    assert "sep=;;: expected a character, or tab" in read_error(f"csv:{table}?sep=;;")
    assert "unknown encoding: utf-88" in read_error(f"csv:{table}?encoding=utf-88")
    assert "Is a directory" in read_error(f"csv:{tmp_path}")


def test_path_may_contain_the_separators_of_a_spec(tmp_path: Path) -> None:
    table = tmp_path / "what?x=1, and why.csv"
    table.write_text("text,label,stars\na,b,c\n")
    assert read(f"csv:{table}") == [Example("a", "b")]
    assert read(f"csv:{table}?label=stars") == [Example("a", "c")]


def test_fingerprint_depends_on_time_size_and_options(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("text,label\na,b\n")
    spec = f"csv:{table}"
    fingerprints = [sources.fingerprint(spec)]
    assert sources.fingerprint(spec) == fingerprints[0]
    os.utime(table, ns=(1, 1))
    fingerprints.append(sources.fingerprint(spec))
    table.write_text("text,label\na,bc\n")
    os.utime(table, ns=(1, 1))
    fingerprints += [sources.fingerprint(spec), sources.fingerprint(f"{spec}?text=label")]
    assert len(set(map(str, fingerprints))) == 4


def test_bytes_that_are_not_utf8_are_decoded_as_windows_1252() -> None:
    assert files.decode(b"caf\xe9 na\xc3\xafve \x93quote\x94 \x81") == "café naïve “quote” \x81"
    assert files.without_surrogates("a\ud800b é \ud83d\ude00") == "a\ufffdb é 😀"


# ----------------------------------------------------------------------------------------- amazon


@needs_shared
def test_all_amazon_sample_reviews_are_read() -> None:
    """The texts equal, byte by byte, the content of the tags."""
    examples = read(f"amazon:{SHARED}/amazon-reviews")
    assert Counter((category, label) for _, label, category, _ in examples) == {
        (category, label): 1_000
        for category in ("books", "electronics")
        for label in ("negative", "positive")
    }
    assert {example.split for example in examples} == {""}
    assert not any("<review" in example.text or "</" in example.text[-20:] for example in examples)
    raw = (SHARED / "amazon-reviews/books/negative.review").read_bytes()
    bodies = [part.partition(b"</review_text>")[0] for part in raw.split(b"<review_text>\n")[1:]]
    expected = [files.decode(body).strip() for body in bodies]
    assert [without_title(example) for example in examples[:1_000]] == expected
    assert examples[0].text.startswith("Horrible book, horrible.\n")


def without_title(example: Example) -> str:
    return example.text.partition("\n")[2]


def review(text: bytes, tag: bytes = b"review_text") -> bytes:
    return b"<review>\n<title>\nT\n</title>\n<%s>\n%s\n</%s>\n</review>\n" % (tag, text, tag)


def write_amazon(folder: Path, content: bytes) -> str:
    (folder / "books").mkdir(exist_ok=True)
    (folder / "books/positive.review").write_bytes(content)
    return f"amazon:{folder}"


def test_amazon_reviews_may_contain_any_bytes(tmp_path: Path) -> None:
    texts = [b"a & b < c", b"\x00\x1a\xff\xfe", b"<b>bold\n\n<title>\nline", b"\xc2\x85x\x0c\x1cy"]
    spec = write_amazon(tmp_path, b"<data>\n" + b"".join(map(review, texts)) + b"</data>")
    assert [without_title(e) for e in read(spec)] == [files.decode(text).strip() for text in texts]
    assert {e.text[:2] for e in read(spec)} == {"T\n"}
    spec = write_amazon(tmp_path, b"".join(map(review, texts)).replace(b"\n", b"\r\n"))
    assert len(read(spec)) == len(texts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"some text\n", "no review in it"),
        (review(b"a") + review(b" "), "line 16: the end of a review without a text"),
        (review(b"a", b"text"), "line 8: the end of a review without a text"),
        (review(b"a") + review(b"b")[:-20], "line 9: a review without an end"),
        (review(b"a").replace(b"</review>\n", b"") * 2, "line 1: a review without an end"),
        (review(b"a").replace(b"<review>\n", b""), "line 7: the end of a review without a text"),
    ],
)
def test_damaged_amazon_file_is_rejected(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "books/positive.review"
    assert read_error(write_amazon(tmp_path, content)) == f"{path}: {message}"


def test_amazon_folder_without_categories_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "positive.review").write_bytes(review(b"a"))
    assert "expected CATEGORY/positive.review" in read_error(f"amazon:{tmp_path}")


# --------------------------------------------------------------------------------------- dlstudio


def write_dlstudio(folder: Path, *contents: object) -> str:
    for name, content in zip(("train", "test"), contents, strict=True):
        data = content if isinstance(content, bytes) else pickle.dumps(content, 2)
        (folder / name).write_bytes(gzip.compress(data))
    return f"dlstudio:{folder}/train,{folder}/test"


GOOD = ({"books": [["a", "good", "one"], []]}, {"books": [["bad"]], "toys": []}, {"a", "bad"})


@needs_shared
def test_dlstudio_archives_contain_amazon_reviews() -> None:
    folder = SHARED / "dlstudio"
    train, test = (folder / f"sentiment_dataset_{name}_200.tar.gz" for name in ("train", "test"))
    examples = read(f"dlstudio:{train},{test}")
    assert Counter(example[1:] for example in examples) == {
        (label, category, split): count
        for label in ("negative", "positive")
        for category in ("books", "electronics")
        for split, count in (("train", 160), ("test", 40))
    }
    originals = {
        " ".join(re.sub(r"[^\w\s]|_", "", without_title(example).lower()).split())[:60]
        for example in read(f"amazon:{SHARED}/amazon-reviews")
    }
    num_equal = sum(example.text[:60] in originals for example in examples)
    assert num_equal > len(examples) / 2  # DLStudio changes the punctuation of the others


def test_dlstudio_archives_of_python_2_and_3_are_read(tmp_path: Path) -> None:
    assert read(write_dlstudio(tmp_path, GOOD, ({}, {"books": [["it's"]]}, []))) == [
        Example("a good one", "positive", "books", "train"),
        Example("", "positive", "books", "train"),
        Example("bad", "negative", "books", "train"),
        Example("it's", "negative", "books", "test"),
    ]
    python_2 = b"((dp1\nS'books'\np2\n(lp3\n(lp4\nS'caf\\xe9'\np5\naS'it\\'s'\naas(dp6\n(lp7\nt."
    assert read(write_dlstudio(tmp_path, python_2, GOOD))[0].text == "café it's"
    mixed = rb"((dS'books'|(l(lS'caf\xe9'|aS'na\xc3\xafve'|aV\u4e2d|aS'\xc3'|aV\ud800|aas(d(lt."
    mixed = mixed.replace(b"|", b"\n")
    assert read(write_dlstudio(tmp_path, mixed, GOOD))[0].text == "café naïve 中 Ã \ufffd"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"books": [["a"]]}, r"expected a pickle of \(positive, negative, vocabulary\)"),
        (([["a"]], {}, []), r"expected a pickle of \(positive, negative, vocabulary\)"),
        (({"books": {"a": 1}}, {}, []), "positive: expected a list of reviews"),
        (({1: []}, {}, []), "positive: expected a list of reviews"),
        (
            ({}, {"toys": [["a"], ["b", 2]]}, []),
            "negative, toys, review 1: expected a list of words",
        ),
        (({}, {"toys": ["words"]}, []), "negative, toys, review 0: expected a list of words"),
        (b"cos\nsystem\n(S'true'\ntR.", r"byte 0: the pickle wants to import os\.system"),
        (pickle.dumps(GOOD, 2)[:40], "damaged pickle|cut short"),
        (b"", "the pickle is cut short"),
    ],
)
def test_dlstudio_pickle_of_other_content_is_rejected(
    content: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"^{tmp_path}/test: (byte \d+: )?({message})"):
        read(write_dlstudio(tmp_path, GOOD, content))


def test_damaged_dlstudio_archive_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write_dlstudio(tmp_path, GOOD, GOOD)
    packed = (tmp_path / "test").read_bytes()
    (tmp_path / "test").write_bytes(packed[:-20])
    assert f"{tmp_path}/test: the archive is truncated at byte" in read_error(spec)
    (tmp_path / "test").write_bytes(packed[:20] + bytes(20) + packed[40:])
    assert f"{tmp_path}/test: before byte" in read_error(spec)
    (tmp_path / "test").write_bytes(pickle.dumps(GOOD))
    assert "Not a gzipped file" in read_error(spec)
    (tmp_path / "test").write_bytes(b"")
    assert "the file is empty" in read_error(spec)
    monkeypatch.setattr(dlstudio, "MAX_UNPACKED", 2**20)
    write_dlstudio(tmp_path, GOOD, b"(" * 2**22)
    assert read_error(spec) == f"{tmp_path}/test: unpacks to more than 1 MiB"
    words = ["word" * 100] * 1_000
    write_dlstudio(
        tmp_path, GOOD, ({"books": [words] * 1_000}, {}, [])
    )  # 4 kB that unpack to 400 MB
    assert read_error(spec) == f"{tmp_path}/test: more than 4 MiB of text"


# ------------------------------------------------------------------------------------------ tables


def write_table(kind: str, path: Path, names: list[str], rows: list[tuple]) -> str:
    if kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            dialect = "excel" if kind == "csv" else "excel-tab"
            csv.writer(file, dialect).writerows([names, *rows])
    elif kind == "jsonl":
        lines = (json.dumps(dict(zip(names, row, strict=True))) for row in rows)
        path.write_text("\n".join(lines))
    else:
        pa = pytest.importorskip("pyarrow")
        pq = pytest.importorskip("pyarrow.parquet")
        columns = zip(*rows, strict=True)
        pq.write_table(pa.table(dict(zip(names, map(list, columns), strict=True))), path)
    return f"{kind}:{path}"


KINDS = pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])


@KINDS
def test_columns_with_usual_names_are_recognised(kind: str, tmp_path: Path) -> None:
    names = ["id", "Review_Text", "Stars", "domain", "SPLIT"]
    rows = [
        (1, "Good, and 中文 too", 5, "books", "train"),
        (2, "So-so", 3, "toys", "Test"),
        (3, "left out", 2, "toys", "dev"),
        (4, "Bad", 1, "books", "training"),
    ]
    expected = [
        Example("Good, and 中文 too", "5", "books", "train"),
        Example("So-so", "3", "toys", "test"),
        Example("Bad", "1", "books", "train"),
    ]
    spec = write_table(kind, tmp_path / "table", names, rows)
    assert read(spec) == expected
    # Without a test row, the validation rows are the test split.
    spec = write_table(kind, tmp_path / "table", names, [rows[0], rows[2]])
    assert [example.split for example in read(spec)] == ["train", "test"]
    assert [e.split for e in read(f"{spec}?split=&category=&label=id")] == ["", ""]
    # Of two files, the first is the train split and the second the test split.
    test = write_table(kind, tmp_path / "other", ["text", "label"], [("x", "y")])
    assert [(e.text, e.split) for e in read(f"{spec},{test.partition(':')[2]}")] == [
        (rows[0][1], "train"),
        ("left out", "train"),
        ("x", "test"),
    ]


@KINDS
def test_options_select_columns(kind: str, tmp_path: Path) -> None:
    rows = [("a", "b", "c", True), ("a", "b", "e", False)]
    spec = write_table(kind, tmp_path / "table", ["text", "label", "body text", "mood"], rows)
    yes, no = ("True", "False") if kind in ("csv", "tsv") else ("true", "false")
    examples = read(f"{spec}?text=body text&label=mood&category=text")
    assert examples == [Example("c", yes, "a"), Example("e", no, "a")]


@KINDS
def test_incomplete_table_is_rejected(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "table"
    place = f"{path}: row 2" if kind == "parquet" else f"{path}: line {2 if kind == 'jsonl' else 3}"
    names = ["text", "label", "split"]

    def rows_error(*second: str) -> str:
        return read_error(write_table(kind, path, names, [("a", "b", "test"), second]))

    hint = "--skip-bad-rows leaves such rows out"
    assert rows_error(" ", "b", "test") == f"{place}: no text; {hint}"
    assert rows_error("a", "", "test") == f"{place}: no label; {hint}"
    assert rows_error("a", "b", "fold").startswith(f"{place}: the split is 'fold'; expected one")
    spec = write_table(kind, path, names, [("a", "b", "train")])
    assert read_error(f"{spec}?text=txt") == f"{path}: no column txt; columns: text, label, split"
    spec = write_table(kind, path, ["text", "mark"], [("a", "b")])
    assert read_error(spec) == (
        f"{path}: no column for the label: name it with ?label=COLUMN; columns: text, mark"
    )
    path.write_bytes(b"")
    assert read_error(spec) == f"{path}: the file is empty"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'text,label\nfine,1\n"not closed,1\nmore,2\n', "line 3: unexpected end of data: a quot"),
        (b'text,label\n"a "b" c",1\n', "line 2: ',' expected after '\"': a quotation mark"),
        (b"text,label\n\na,1\na,b,2\n", "line 4: 3 columns instead of 2"),
        (b"text,label\na,1\nna\xefve,2\n", "line 3: the byte 0xef is not utf-8; name the encoding"),
        (
            b"text,label,label\na,1,2\n",
            "more than one column label; columns: text, label, label",
        ),
        (b"\xff\xfet\0e\0x\0t\0", "line 1: the byte 0xff is not utf-8"),
        (b'text,label\n"' + b"x" * 200 + b'",1\n', "line 2: field larger than field limit"),
        (b"\n", "no column for the text"),
    ],
)
def test_damaged_csv_file_is_rejected(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    monkeypatch.setattr(delimited, "MAX_FIELD", 100)
    assert read_error(f"csv:{path}").startswith(f"{path}: {message}")


def test_compressed_file_is_rejected_with_a_hint(tmp_path: Path) -> None:
    for name, content, hint in (
        ("a.csv.gz", gzip.compress(b"text,label\n"), "a gzip file: decompress it first"),
        ("a.xlsx", b"PK\3\4 and more", "a zip file: save it as csv"),
    ):
        (tmp_path / name).write_bytes(content)
        for kind in ("csv", "jsonl"):
            assert read_error(f"{kind}:{tmp_path / name}") == f"{tmp_path / name}: {hint}"


def test_csv_encodings_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_bytes('\ufefftext,label\n"two\nlines, one ""cell""",1\r\n'.encode())
    assert read(f"csv:{path}") == [Example('two\nlines, one "cell"', "1")]
    path.write_text("text,label\ncafé,1\n", encoding="utf-16")
    assert read(f"csv:{path}?encoding=utf-16") == [Example("café", "1")]
    path.write_bytes(b"text,label\ncaf\xe9,1\n")
    assert read(f"csv:{path}?encoding=latin-1") == [Example("café", "1")]
    path.write_text('"3","A title","Some text"\n"1","B","C"\n')
    assert read(f"csv:{path}?header=no&text=3&label=1") == [
        Example("Some text", "3"),
        Example("C", "1"),
    ]
    path.write_text('sentence\tlabel\n"Tis so\t1\n')
    assert read(f"tsv:{path}") == [Example('"Tis so', "1")]
    path.write_text('sentence\tlabel\n"a\tb"\t1\n')
    assert read(f"tsv:{path}?quotes=yes") == [Example("a\tb", "1")]
    path.write_bytes("text,label\né,1".encode("utf-16-le"))
    assert "is not ascii" in read_error(f"csv:{path}?encoding=ascii")
    path.write_bytes(b"\xef\xbb\xbf")
    assert "no column for the text" in read_error(f"csv:{path}")


def test_csv_delimiter_is_detected_or_selected(tmp_path: Path) -> None:
    path = tmp_path / "table"
    for sep, name in ((",", ","), (";", ";"), ("\t", "tab"), ("|", "|")):
        path.write_text(f'"review, so; to | say"{sep}text{sep}label\n1{sep}"a{sep}b"{sep}c\n')
        assert read(f"csv:{path}") == [Example(f"a{sep}b", "c")]
        assert read(f"csv:{path}?sep={name}") == [Example(f"a{sep}b", "c")]
        assert read(f"csv:{path}?text=label&label=text") == [Example("c", f"a{sep}b")]
    path.write_text("text;note,label\n1;2;a,b\n")
    assert "columns: text;note, label" in read_error(f"csv:{path}?sep=,")
    assert "no column for the label" in read_error(f"csv:{path}?sep=;")
    assert read(f"csv:{path}?text=text;note") == [Example("1;2;a", "b")]
    # Without a header both delimiters fit, so the user must choose one.
    path.write_text("5,fine; really\n")
    spec = f"csv:{path}?header=no&label=1&text=2"
    assert read_error(spec) == f"{path}: the delimiter may be , or ;: choose one by ?sep=..."
    assert read(f"{spec}&sep=,") == [Example("fine; really", "5")]
    path.write_text("Urteil;Note\nfine;1\n")
    assert "columns: Urteil, Note" in read_error(f"csv:{path}")


def read_valid_rows(spec: str) -> tuple[list[str], dict[str, int]]:
    """The texts of the valid rows, and the number of invalid rows of each kind."""
    counts = Counter[str]()
    return [example.text for example in sources.load(spec).examples(counts)], counts


@KINDS
def test_skipped_bad_rows_are_counted_by_kind(kind: str, tmp_path: Path) -> None:
    rows = [("a", "1", "train"), (" ", "1", "test"), ("b", "", "test"), ("c", "1", "fold")]
    rows += [("", "", "x"), ("d", "2", "test")]
    spec = write_table(kind, tmp_path / "table", ["text", "label", "split"], rows)
    assert read_valid_rows(spec) == (
        ["a", "d"],
        {"no text": 2, "no label": 1, "an unknown split": 1},
    )


def test_malformed_lines_can_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text('text,label\n1,2,3\n"a "b" c",1\n"one,1\ntwo,1\n"x",1\nfine,1\n4\n')
    counts = {"another number of columns": 2, "a quotation mark that is not closed?": 4}
    assert read_valid_rows(f"csv:{path}") == (["fine"], counts)
    path.write_text('text,label\nfine,1\n"lost,1\nmore,1\n')  # the quoted cell never ends
    with pytest.raises(InputError, match="line 3: unexpected end of data"):
        read_valid_rows(f"csv:{path}")
    path.write_text('[]\n{"text"\n{"text": "fine", "label": 1}\n')
    assert read_valid_rows(f"jsonl:{path}") == (["fine"], {"not a JSON object": 2})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": 1}\n{"text": "a", "label"\n', "line 2: Expecting ':' delimiter"),
        ('{"text": "a", "label": 1}\n[1, 2]\n', "line 2: not a JSON object"),
        ('{"text": "a", "label": 1}\n\n{"text": "a"}\n', "line 3: no label"),
        (
            '{"text": "a", "label": 1}\n{"text": 3, "label": 1}\n',
            "line 2: the text is not a string",
        ),
        ('{"text": "a", "label": NaN}\n', "line 1: no label"),
        ('{"text": "a", "label": {}}\n', "line 1: no label"),
        ("[" * 100_000, "line 1: "),
        ('{"label": ' + "9" * 5_000 + "}", "line 1: Exceeds the limit"),
        ("\n \n", "no row in it"),
        (b'{"text": "a", "label": 1}\n{"text": "\xff"}', "line 2: 'utf-8' codec can't decode"),
    ],
)
def test_damaged_json_lines_are_rejected(
    content: str | bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_error(f"jsonl:{path}").startswith(f"{path}: {message}")


def test_json_labels_may_have_any_scalar_type(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    labels = [1, 1.0, -1, 2.5, "two words ", True, "\ud800"]
    path.write_text("".join(json.dumps({"text": "a", "label": x}) + "\n" for x in labels))
    assert [example.label for example in read(f"jsonl:{path}")] == [
        *("1", "1", "-1", "2.5", "two words", "true", "\ufffd")
    ]


def test_damaged_parquet_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "table"
    spec = write_table("parquet", path, ["text", "label"], [(f"a{i}", "b") for i in range(3_000)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert read_error(spec).startswith(f"{path}: after row 0: not a whole Parquet file: ")
    path.write_bytes(whole[:100] + bytes(2_000) + whole[2_100:])
    assert read_error(spec).startswith(f"{path}: after row ")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": pa.array([b"\x92"]).view("string"), "label": [1]}), path)
    assert "table: after row 0: not a whole Parquet file: 'utf-8' codec" in read_error(spec)
    write_table("parquet", path, ["text", "label"], [(None, "b")])
    assert read_error(spec) == f"{path}: row 1: no text; --skip-bad-rows leaves such rows out"


# ----------------------------------------------------------------------------------- text files


@pytest.fixture
def acl_imdb(tmp_path: Path) -> Path:
    """A folder in the layout of the IMDb archive aclImdb."""
    folder = tmp_path / "aclImdb"
    for name in ("train/pos/1_9", "train/pos/0_7", "train/neg/0_3", "train/unsup/0_0"):
        path = folder / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"It is {name}")
    (folder / "test/neg").mkdir(parents=True)
    (folder / "test/neg/0_1.txt").write_bytes(b"caf\xe9")
    (folder / "train/labeledBow.feat").write_text("0:1")
    return folder


def test_folder_of_text_files_is_read(acl_imdb: Path) -> None:
    folder = acl_imdb
    assert read(f"text:{folder}") == [
        Example("It is train/neg/0_3", "neg", split="train"),
        Example("It is train/pos/0_7", "pos", split="train"),
        Example("It is train/pos/1_9", "pos", split="train"),
        Example("café", "neg", split="test"),
    ]
    before = sources.fingerprint(f"text:{folder}")
    (folder / "test/neg/1_1.txt").write_text("one more")
    assert sources.fingerprint(f"text:{folder}") != before


def test_folder_of_another_layout_is_rejected(acl_imdb: Path, tmp_path: Path) -> None:
    assert read_error(f"text:{tmp_path}") == f"{tmp_path}: expected train/CLASS/*.txt in it"
    folder = acl_imdb
    (folder / "test/pos").mkdir()
    assert read_error(f"text:{folder}") == f"{folder}/test/pos: no .txt file in it"
    (folder / "test/pos/0.txt").write_text("")
    assert read_error(f"text:{folder}") == f"{folder}/test/pos/0.txt: the file is empty"
    (folder / "test/pos/0.txt").write_text(" \n")
    assert read_error(f"text:{folder}") == f"{folder}/test/pos/0.txt: no text in it"


# ----------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("count", [100, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", fuzz_datasets.KINDS)
def test_damaged_file_raises_only_input_errors(kind: str, count: int) -> None:
    num_rejected, max_seconds = fuzz_datasets.fuzz(kind, count)
    assert num_rejected or kind == "text"  # any bytes are a valid text
    assert max_seconds < 2
