import hashlib
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import UserError
from stages.contract import Item
from stages.images import decode
from stages.read.admit import admit
from stages.read.settings import ReadSettings


def items_of(files: dict[tuple[str, str], bytes]) -> list[Item]:
    return [Item(f"{label}/{name}", label, lambda data=data: data) for (label, name), data in files.items()]


def test_every_bad_file_is_set_aside_with_its_reason_and_the_rest_is_admitted(bad_files, pictures):
    files = {("red_star", name): data for name, (data, _) in bad_files.items()} | pictures
    admission = admit(items_of(files), ReadSettings(uri="x"))
    assert len(admission.admitted) == len(pictures)
    assert len(admission.quarantined) == len(bad_files) >= 10
    for quarantined in admission.quarantined:
        data, reason = bad_files[quarantined.origin.removeprefix("red_star/")]
        assert reason in quarantined.reason, quarantined.origin
        assert quarantined.sha256 == (hashlib.sha256(data).hexdigest() if data else "")
        assert quarantined.label == "red_star"


def test_a_reference_says_what_it_is(pictures):
    admission = admit(items_of(pictures), ReadSettings(uri="x"))
    for reference in admission.admitted:
        data = pictures[reference.label, reference.origin.split("/")[1]]
        assert reference.sha256 == hashlib.sha256(data).hexdigest()
        assert (reference.width, reference.height) == decode(data).size
    order = [(r.label, r.sha256) for r in admission.admitted]
    assert order == sorted(order)


def test_sample_photographs_are_admitted(photographs):
    items = [Item(name, "photograph", path.read_bytes) for name, path in photographs.items()]
    admission = admit(items, ReadSettings(uri="x"))
    assert [q.origin for q in admission.quarantined] == [
        "multipage_rgb.tif"
    ]  # planes that Pillow does not know
    assert len(admission.admitted) == len(photographs) - 1 > 25


def test_the_limits_of_the_settings_hold(pictures):
    sizes = {origin: len(data) for origin, data in pictures.items()}
    largest = max(sizes.values())
    admission = admit(items_of(pictures), ReadSettings(uri="x", max_bytes=largest - 1))
    assert len(admission.quarantined) == sum(size == largest for size in sizes.values())
    for quarantined in admission.quarantined:
        assert quarantined.reason == f"more than {largest - 1} bytes"
        assert quarantined.sha256 == ""  # a source reads no further than the limit
    admission = admit(items_of(pictures), ReadSettings(uri="x", max_pixels=20 * 30))
    assert {(r.width, r.height) for r in admission.admitted} == {(30, 20)}
    assert all("more than 600" in q.reason for q in admission.quarantined)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_answer_depends_on_the_set_of_files_alone(pictures, bad_files, draw):
    contents = [*list(pictures.values())[:4], bad_files["page.jpg"][0], b""]
    chosen = draw.draw(
        st.dictionaries(
            st.tuples(st.sampled_from(["owl", "fox"]), st.sampled_from("abcdefgh")),
            st.sampled_from(contents),
            min_size=1,
        )
    )
    config = ReadSettings(uri="x", per_class=draw.draw(st.sampled_from([None, 1, 2, 3])))
    items = items_of(chosen)
    admission = admit(items, config)
    assert admit(draw.draw(st.permutations(items)), config) == admission

    # The same, said plainly: of each class the first distinct good images in hash order, by their least name.
    for label in ("owl", "fox"):
        good: dict[str, str] = {}
        for (class_of_file, name), data in sorted(chosen.items()):
            if class_of_file == label and data in contents[:4]:
                good.setdefault(hashlib.sha256(data).hexdigest(), f"{label}/{name}")
        expected = sorted(good.items())[: config.per_class]
        assert [(r.sha256, r.origin) for r in admission.admitted if r.label == label] == expected
    origins = [r.origin for r in admission.admitted] + [q.origin for q in admission.quarantined]
    assert sorted(origins) == sorted(item.origin for item in items)


def test_why_a_good_image_is_not_used(pictures):
    a, b, c = list(pictures.values())[:3]
    first, second, third = sorted([a, b, c], key=lambda data: hashlib.sha256(data).digest())
    files = {
        ("owl", "z"): first,
        ("owl", "y"): first,
        ("owl", "b"): second,
        ("owl", "a"): third,
        ("fox", "z"): first,
    }
    admission = admit(items_of(files), ReadSettings(uri="x", per_class=2))
    assert [r.origin for r in admission.admitted] == ["fox/z", "owl/y", "owl/b"]
    assert {q.origin: q.reason for q in admission.quarantined} == {
        "owl/z": "duplicate of owl/y",
        "owl/a": "beyond per_class=2",
    }


def test_an_io_error_passes(pictures):
    def fail() -> bytes:
        raise PermissionError(13, "Permission denied")

    items = [*items_of(pictures), Item("owl/x.jpg", "owl", fail)]
    random.Random(0).shuffle(items)
    with pytest.raises(PermissionError):
        admit(items, ReadSettings(uri="x"))


def test_memory_stays_bounded(pictures):
    """However long the source, few items are read ahead of the ones that are done."""
    data = next(iter(pictures.values()))
    read, made = 0, 0

    def count() -> bytes:
        nonlocal read
        read += 1
        return data

    def source():
        nonlocal made
        for number in range(1_000):
            made += 1
            assert made - read <= 64
            yield Item(f"owl/{number}", "owl", count)

    admission = admit(source(), ReadSettings(uri="x"))
    assert read == 1_000
    assert len(admission.admitted) == 1


def test_names_must_fit_the_labels(pictures):
    config = ReadSettings(uri="refs", names={"red_star": "five-pointed star"})
    assert len(admit(items_of(pictures), config).admitted) == len(pictures)
    assert config.readable("red_star") == "five-pointed star"
    assert config.readable("old_red_star") == "old red star"
    with pytest.raises(
        UserError, match=r"no label 'redstar' in 'refs'; its labels are Zürich tram, red_star"
    ):
        admit(items_of(pictures), ReadSettings(uri="refs", names={"redstar": "star"}))
    with pytest.raises(UserError, match="'Zürich tram' and 'red_star' both read 'red star'"):
        admit(items_of(pictures), ReadSettings(uri="refs", names={"Zürich tram": "red star"}))


def test_a_pickle_is_never_opened(bad_files, tmp_path):
    class Touch:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "opened"),))

    import pickle

    admission = admit([Item("a", "owl", lambda: pickle.dumps(Touch()))], ReadSettings(uri="x"))
    assert len(admission.quarantined) == 1
    assert not (tmp_path / "opened").exists()
