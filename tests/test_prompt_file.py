"""prompts.json: what is written is what is prompted; anything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bright_volumes import volume_of
from fake_network import bright_pixels
from hypothesis import given
from hypothesis import strategies as st

from medsa_deploy.errors import PromptError
from medsa_deploy.runtime.volumes.structures import (
    Structure,
    labelling,
    shared_prompt,
    slice_prompts,
)
from medsa_deploy.stages import structures_of
from medsa_deploy.stages.run.prompt_file import read_prompts, structure_of

COORDINATE = st.one_of(st.integers(-999, 999), st.floats(-999, 999))
POINT = st.lists(COORDINATE, min_size=3, max_size=3)
LABELLED = st.builds(lambda point, label: [*point, label], POINT, st.sampled_from([0, 1, 1.0]))
TEXT = st.text(min_size=1).filter(lambda text: text.strip() and text.isprintable())
ENTRY = st.fixed_dictionaries(
    {"points": st.lists(st.one_of(POINT, LABELLED), min_size=1, max_size=3)},
    optional={
        "boxes": st.lists(st.lists(COORDINATE, min_size=6, max_size=6), max_size=2),
        "name": TEXT,
        "class": TEXT,
    },
)
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(st.sampled_from(["structures", "points", "boxes", "class"]), st.text()),
            inner,
            max_size=3,
        ),
    ),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts") / "prompts.json"


@given(st.lists(ENTRY, min_size=1, max_size=3))
def test_what_is_written_is_read(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"structures": entries}), encoding="utf-8")
    for entry, structure in zip(entries, read_prompts(path), strict=True):
        rows = [(*p, s) for p, s in zip(structure.points, structure.labels, strict=True)]
        assert rows == [tuple(p) if len(p) == 4 else (*p, 1) for p in entry["points"]]
        assert list(map(list, structure.boxes)) == entry.get("boxes", [])
        assert (structure.name, structure.class_name) == (entry.get("name"), entry.get("class"))


@given(JUNK)
def test_junk_is_refused_in_one_line(path: Path, junk: Any) -> None:
    path.write_text(json.dumps(junk), encoding="utf-8")
    message = ""
    try:
        assert all(structure.points or structure.boxes for structure in read_prompts(path))
    except PromptError as e:
        message = str(e)
    assert "\n" not in message


@given(st.binary(max_size=40))
def test_bytes_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(PromptError, match=r"prompts\.json (is not JSON|should be)"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", r"prompts\.json is not JSON"),
        ("[]", r'should be \{"structures": \[…\]\} with at least one structure'),
        ('{"structures": []}', "at least one structure"),
        ('{"structures": {}}', "at least one structure"),
        ('{"structures": [{"points": [[1, 2, 3]]}], "more": 1}', "should be"),
        ('{"structures": [3]}', r"structure 1 should be an object with some of the keys name, cl"),
        ('{"structures": [{"points": [[1, 2, 3]]}, {"point": []}]}', "structure 2 should be an ob"),
        ('{"structures": [{"name": "a"}]}', "structure 1 has no prompt: give it points or boxes"),
        ('{"structures": [{"points": [1, 2, 3]}]}', "a point in a volume should be x, y, z"),
        ('{"structures": [{"points": [[1, 2]]}]}', "structure 1: 1,2: a point in a volume should"),
        ('{"structures": [{"points": [[1, 2, 3, 2]]}]}', "label 1 or 0"),
        ('{"structures": [{"points": [[1, 2, 3, true]]}]}', r"found \[1, 2, 3, True\]"),
        ('{"structures": [{"points": [[1, 2, NaN]]}]}', r"found \[1, 2, nan\]"),
        ('{"structures": [{"points": [[1, 2, 1e999]]}]}', r"found \[1, 2, inf\]"),
        (f'{{"structures": [{{"points": [[1, 2, 1{"0" * 400}]]}}]}}', r"found \[1, 2, 1000"),
        ('{"structures": [{"points": [[1, 2, "3"]]}]}', r"found \[1, 2, '3'\]"),
        ('{"structures": [{"boxes": [[1, 2, 3, 4]]}]}', "a box in a volume should be x0, y0, z0"),
        ('{"structures": [{"boxes": [[1, 2, 3, 4, 5, 6]], "name": " "}]}', "one line of text"),
        ('{"structures": [{"boxes": [[1, 2, 3, 4, 5, 6]], "name": "a\\nb"}]}', "one line of text"),
        ('{"structures": [{"boxes": [[1, 2, 3, 4, 5, 6]], "name": "\\ud800"}]}', "one line of te"),
        ('{"structures": [{"boxes": [[1, 2, 3, 4, 5, 6]], "class": 2}]}', "its class should be on"),
        ("[" * 100_000, r"prompts\.json is not JSON"),
    ],
)
def test_what_is_wrong_is_said(path: Path, text: str, match: str) -> None:
    path.write_text(text)
    with pytest.raises(PromptError, match=match) as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_mark_of_byte_order_is_no_fault(path: Path) -> None:
    path.write_text(
        '\ufeff{"structures": [{"points": [[1, 2, 3]], "name": "肝"}]}', encoding="utf-8"
    )
    assert read_prompts(path)[0].name == "肝"


def test_files_that_cannot_be_read(path: Path) -> None:
    with pytest.raises(PromptError, match="cannot be read: Is a directory"):
        read_prompts(path.parent)
    with pytest.raises(PromptError, match="none cannot be read: No such file"):
        read_prompts(path.parent / "none")


def test_options_and_a_file_exclude_each_other(path: Path) -> None:
    path.write_text('{"structures": [{"points": [[1, 2, 3]]}]}')
    assert structures_of([], [], path) == [structure_of([(1, 2, 3)], [])]
    box, other = (0.0, 0, 0, 1, 1, 1), (0.0, 0, 0, 2, 2, 2)
    assert structures_of([(1, 2, 3, 0)], [box], None) == [structure_of([(1, 2, 3, 0)], [box])]
    assert structures_of([], [box, other], None) == [
        structure_of([], [box]),
        structure_of([], [other]),
    ]
    for points, boxes, file, match in (
        ([(1, 2, 3)], [], path, "--prompts holds all prompts"),
        ([], [box], path, "--prompts holds all prompts"),
        ([(1, 2, 3)], [box, other], None, "points go with one box only, or into --prompts"),
    ):
        with pytest.raises(PromptError, match=match):
            structures_of(points, boxes, file)


@given(
    st.lists(st.tuples(*(st.integers(0, n) for n in (4, 11, 19, 1))), min_size=1, max_size=6),
    st.sets(st.integers(0, 4)),
)
def test_each_slice_gets_its_own_prompts(rows: list[tuple[int, ...]], boxed: set[int]) -> None:
    structure = Structure(
        points=tuple((x, y, z) for x, y, z, _ in rows),
        labels=tuple(label for *_, label in rows),
        boxes=tuple((x, 1, 2, x + 1, 8, 16 - x) for x in boxed),
    )
    sets = slice_prompts(structure, volume_of(np.zeros((5, 12, 20), np.uint8)))
    assert list(sets) == sorted({row[0] for row in rows} | boxed)
    for index, prompt in sets.items():
        on_slice = [(z, y, label) for x, y, z, label in rows if x == index]
        assert [(*p, s) for p, s in zip(prompt.points, prompt.labels, strict=True)] == on_slice
        assert prompt.points.shape == (len(on_slice), 2)
        if index in boxed:
            assert prompt.box is not None
            assert prompt.box.tolist() == [2, 1, 16 - index, 8]
        else:
            assert prompt.box is None
    together = shared_prompt(sets.values())
    assert len(together.points) == len(together.labels) == len(rows)
    if boxed:
        assert together.box is not None
        assert together.box.tolist() == [2, 1, 16 - min(boxed), 8]
    else:
        assert together.box is None


@given(st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=6), st.integers(1, 4))
def test_every_structure_has_labels_that_have_names(names: list[str | None], classes: int) -> None:
    structures = [Structure(name=None if classes > 1 else name) for name in names]
    labels_of = labelling(structures, bright_pixels(classes=classes).manifest)
    assert len(labels_of.channels) == len(names)
    labels = {label for channels in labels_of.channels for _, label in channels}
    assert labels == set(range(1, len(labels_of.names) + 1))
    assert len(set(labels_of.names)) == len(labels_of.names)
    if classes == 1:
        for name, ((mask, label),) in zip(names, labels_of.channels, strict=True):
            assert mask == 0
            assert name in (None, labels_of.names[label - 1])
