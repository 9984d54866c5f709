import tarfile

import pytest

from schemas.errors import UserError


def test_labels_from_each_member(pictures, write, read, tmp_path):
    write.webdataset(str(tmp_path), pictures)
    expected = [label for label, _ in list(pictures)[::2] + list(pictures)[1::2]]
    for settings in ({"label": "txt"}, {"label": "json", "json_key": "class"}):
        items, _ = read("webdataset", tmp_path, **settings)
        assert [item.label for item in items] == expected
    classes = sorted(set(expected))
    items, _ = read("webdataset", tmp_path)
    assert [item.label for item in items] == [str(classes.index(label)) for label in expected]
    items, _ = read("webdataset", tmp_path, classes=classes)
    assert [item.label for item in items] == expected


def test_a_file_a_folder_a_glob_and_braces(pictures, write, read, tmp_path, memory):
    for root in (str(tmp_path), memory):
        write.webdataset(f"{root}/shards", pictures)
        write.file(f"{root}/shards/README.md", b"two tars")
        both, _ = read("webdataset", f"{root}/shards", label="txt")
        assert len(both) == len(pictures)
        for pattern in ("shards/*.tar", "shards/{000000..000001}.tar", "shards/00000[01].tar"):
            items, _ = read("webdataset", f"{root}/{pattern}", label="txt")
            assert [item.origin for item in items] == [item.origin for item in both], pattern
        one, _ = read("webdataset", f"{root}/shards/000001.tar", label="txt")
        assert [item.origin for item in one] == [i.origin for i in both if i.origin.startswith("000001.tar/")]
        deep, _ = read("webdataset", f"{root}/*/000001.tar", label="txt")
        assert [item.origin for item in deep] == [f"shards/{item.origin}" for item in one]


def test_a_tar_that_braces_name_must_exist(pictures, write, read, tmp_path):
    write.webdataset(str(tmp_path), pictures)
    with pytest.raises(UserError, match=r"000002\.tar', which .* names, does not exist"):
        read("webdataset", f"{tmp_path}/{{000000..000002}}.tar")
    with pytest.raises(UserError, match="unbalanced brace"):
        read("webdataset", f"{tmp_path}/{{000000.tar")
    with pytest.raises(UserError, match=r"holds no \.tar file"):
        read("webdataset", f"{tmp_path}/*.tgz")


def test_odd_samples_are_counted_and_refused(pictures, write, read, tmp_path):
    data = pictures["red_star", "0.jpg"]
    files = [
        ("a/good.jpg", data),
        ("a/good.json", b'{"class": "owl"}'),
        ("a/number.png", pictures["red_star", "1.png"]),
        ("a/number.json", b'{"class": 7}'),
        ("b/no_label.jpg", data),
        ("c/no_image.json", b'{"class": "owl"}'),
        ("d/no_key.jpg", data),
        ("d/no_key.json", b'{"label": "owl"}'),
        ("e/no_json.jpg", data),
        ("e/no_json.json", b"owl"),
        ("f/a_list.jpg", data),
        ("f/a_list.json", b'{"class": ["owl"]}'),
        ("g/null.jpg", data),
        ("g/null.json", b'{"class": null}'),
        ("h/two.words.jpg", data),  # the extension is "words.jpg"
        (".hidden", b"x"),
    ]
    write.file(f"{tmp_path}/x.tar", write.tar(files))
    items, admission = read("webdataset", tmp_path, label="json", json_key="class")
    assert [(r.origin, r.label) for r in admission.admitted] == [
        ("x.tar/a/number.png", "7"),
        ("x.tar/a/good.jpg", "owl"),
    ]
    assert {q.origin.removeprefix("x.tar/"): q.reason for q in admission.quarantined} == {
        "b/no_label.jpg": "no label: the sample has no .json",
        "c/no_image": "no image in the sample",
        "d/no_key.jpg": "no label: the JSON has no key 'class'",
        "e/no_json.jpg": "no label: the JSON has no key 'class'",
        "f/a_list.jpg": "the label is neither text nor a whole number but list",
        "g/null.jpg": "no label",
        "h/two": "no label: the sample has no .json",
    }
    assert len(items) == 9


def test_the_image_extension_can_be_chosen(pictures, write, read, tmp_path):
    a, b = pictures["red_star", "0.jpg"], pictures["red_star", "1.png"]
    files = [("1.input.jpg", a), ("1.output.png", b), ("1.cls", b"3")]
    write.file(f"{tmp_path}/x.tar", write.tar(files))
    for extension, data in (("input.jpg", a), ("output.png", b)):
        items, _ = read("webdataset", tmp_path, image=[extension])
        assert [(item.label, item.read()) for item in items] == [("3", data)]
    with pytest.raises(UserError, match=r"no sample with an image \(references\.image: jpg"):
        read("webdataset", tmp_path)


def test_a_label_beyond_the_classes_is_refused(pictures, write, read, tmp_path):
    data = list(pictures.values())
    files = [
        ("1.jpg", data[0]),
        ("1.cls", b"1"),
        ("2.jpg", data[1]),
        ("2.cls", b"2"),
        ("3.jpg", data[2]),
        ("3.cls", b"x"),
        ("4.jpg", data[3]),
        ("4.cls", b"-1"),
    ]
    write.file(f"{tmp_path}/x.tar", write.tar(files))
    _, admission = read("webdataset", tmp_path, classes=["owl", "fox"])
    assert [r.label for r in admission.admitted] == ["fox"]
    assert [q.reason for q in admission.quarantined] == [
        f"the label {label!r} is no number from 0 to 1 of `classes`" for label in ("2", "x", "-1")
    ]


@pytest.mark.parametrize(
    "damage", ["text", "empty", "cut in a member", "cut between members", "no end", "header"]
)
def test_a_damaged_tar_stops_with_its_name(damage, pictures, write, read, tmp_path):
    write.webdataset(str(tmp_path), pictures)
    path = tmp_path / "000000.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    third = members[2].offset
    path.write_bytes(
        {
            "text": b"not a tar\n" * 200,
            "empty": b"",
            "cut in a member": data[: members[0].offset_data + 10],
            "cut between members": data[:third],
            "no end": data[: members[-1].offset_data + 512 * -(-members[-1].size // 512)],
            "header": data[:third] + b"garbage!" + data[third + 8 :],
        }[damage]
    )
    with pytest.raises(
        UserError, match=r"000000\.tar' is (no complete, uncompressed tar|damaged or cut off)"
    ):
        read("webdataset", tmp_path, label="txt")


def test_a_member_that_is_there_twice_is_refused(pictures, write, read, tmp_path):
    data = pictures["red_star", "0.jpg"]
    write.file(f"{tmp_path}/x.tar", write.tar([("1.jpg", data), ("1.cls", b"1"), ("1.jpg", data)]))
    with pytest.raises(UserError, match=r"has the member '1\.jpg' twice"):
        read("webdataset", tmp_path)


def test_a_json_label_needs_its_key(read):
    with pytest.raises(ValueError, match="json_key"):
        read("webdataset", "x", label="json")
    with pytest.raises(ValueError, match="json_key"):
        read("webdataset", "x", json_key="class")
